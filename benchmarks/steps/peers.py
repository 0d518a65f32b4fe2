"""Other libraries' steps, timed by scripts of their own in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

_MEDIAN = re.compile(r"median\s+([\d.]+)\s*s")
_ARGUMENTS = ("8", "128", "64", "6")  # rows, encoder length, decoder length, steps


class Peer(NamedTuple):
    """A peer's median, or why there is none.

    >>> Peer(None, "t5x: not installed").seconds is None
    True
    """

    seconds: float | None
    note: str


def folder() -> Path:
    """Where the peers' scripts are: BENCH_PEERS, else ``../shared/bench``."""
    return Path(os.environ.get("BENCH_PEERS", "../shared/bench"))


def time_peer(script: str, *more: str, timeout: int = 900) -> Peer:
    """Runs a peer's script.

    The threads of this process's machine are given to it, and the environment, in which
    ``T5X_SRC`` names the folder of T5X's checkout.

    Args:
      script: file name in `folder`; prints ``median 1.234s``.
      more: arguments after its sizes, such as ``bfloat16``.
      timeout: seconds.

    Returns:
      The median, or the reason why it could not run.
    """
    path = folder() / script
    if not path.is_file():
        return Peer(None, f"{path} is not there; set BENCH_PEERS")
    if "t5x" in script and "T5X_SRC" not in os.environ:
        return Peer(None, "T5X_SRC names no folder with a T5X checkout")
    threads = str(len(os.sched_getaffinity(0)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    try:
        done = subprocess.run(
            [sys.executable, str(path), *_ARGUMENTS, *more],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Peer(None, f"{script} took more than {timeout} s")
    found = _MEDIAN.search(done.stdout)
    if done.returncode or not found:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return Peer(None, f"{script} does not run here: {''.join(last)}")
    return Peer(float(found.group(1)), "")
