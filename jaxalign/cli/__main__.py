"""``python -m jaxalign.cli``: the command line without its installed script."""

import sys

from jaxalign.cli import main

sys.exit(main())
