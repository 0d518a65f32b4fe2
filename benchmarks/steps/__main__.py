"""``python -m benchmarks.steps``: time steps on this machine; docs/performance.md."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from benchmarks.steps import suite


def main(argv: Sequence[str] | None = None) -> int:
    """Measures; returns 1 where ``--check`` finds a case that became slower."""
    parser = argparse.ArgumentParser("benchmarks.steps", description=__doc__)
    parser.add_argument(
        "--cases",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="comma-separated; default: those with targets",
    )
    parser.add_argument("--all", action="store_true", help="cases without targets too")
    parser.add_argument("--steps", type=int, default=6, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=2, help="of case and peer")
    parser.add_argument("--output", default="benchmarks/results.json")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare with --output instead of writing it; status 1 if slower",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname).1s %(message)s")
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    try:
        found = suite.run(
            args.cases,
            everything=args.all,
            steps=args.steps,
            rounds=args.rounds,
            output=args.output,
            check=args.check,
        )
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for line in found:
        print(f"slower: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
