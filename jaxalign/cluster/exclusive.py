"""Functions that write to one place, one at a time: over processes, hosts and jobs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign import locks

_P = ParamSpec("_P")
_T = TypeVar("_T")


def in_main(function: Callable[[], int | None]) -> int:
    """Calls a function in process 0; every process gets its number, 0 for none.

    Raises:
      ValueError: in every process, where it fails in process 0.

    >>> in_main(lambda: 3)
    3
    """
    if jax.process_count() == 1:
        return int(function() or 0)
    found, problem = -1, None
    if jax.process_index() == 0:
        try:
            found = int(function() or 0)
        except Exception as error:  # noqa: BLE001 - raised below, by every process
            problem = error
    told = multihost_utils.broadcast_one_to_all(
        np.array([found, problem is not None], np.int32)
    )
    if told[1]:
        raise problem or ValueError("Process 0 refused to begin; see its message.")
    return int(told[0])


@contextlib.contextmanager
def holding(place: Any, what: str, *, is_file: bool = False) -> Iterator[None]:
    """Holds a place's lock (`jaxalign.locks`); of several processes the first does.

    Raises:
      HeldError: in every process, when another job writes there.
    """
    with contextlib.ExitStack() as stack:

        def take() -> int:
            stack.enter_context(locks.hold(place, what, is_file=is_file))
            return 1

        in_main(take)
        yield


def one_run_at_a_time(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Makes ``function(run, ...)`` hold the lock of the run's directory."""

    @functools.wraps(function)
    def locked(run: Any, *args: Any, **kwargs: Any) -> Any:
        if not run.run_dir:
            return function(run, *args, **kwargs)
        with holding(run.run_dir, "run directory"):
            return function(run, *args, **kwargs)

    return locked


def one_output_at_a_time(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Makes ``function(output=...)`` hold the lock of its output."""

    @functools.wraps(function)
    def locked(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("output"):
            return function(*args, **kwargs)
        with holding(kwargs["output"], "output", is_file=True):
            return function(*args, **kwargs)

    return locked
