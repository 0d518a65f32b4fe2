"""``python -m jaxalign.cli``: the command line without its installed script."""

import sys

from jaxalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
