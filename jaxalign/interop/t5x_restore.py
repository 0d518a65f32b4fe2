"""Parameters of a T5X checkpoint onto devices, all of them or some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxalign.interop.assignment import Report, Rules, assigned
from jaxalign.interop.leaves import Leaf
from jaxalign.interop.placing import place_leaf, sharding_of
from jaxalign.interop.t5x_files import Checkpoint
from jaxalign.interop.t5x_formats import T5XError
from jaxalign.interop.t5x_layouts import find
from jaxalign.interop.t5x_network import TARGET, check_leaf, missing

Initial = Mapping[str, Any] | Callable[[str], Any]


def restore(
    checkpoint: Checkpoint,
    like: Mapping[str, Any],
    *,
    assignment_map: Rules = (),
    initial: Initial | None = None,
    dtype: Any = None,
) -> tuple[dict[str, Any], Report]:
    """Reads a network's parameters, each part straight onto the device that holds it.

    At no time does the host hold more than one parameter, and of several processes each
    reads the parts of its own devices only.

    Args:
      checkpoint: an opened one.
      like: nested, a shape and dtype for each parameter, in either layout of layers;
        one with a ``sharding`` is laid out by it, others go to the first local device.
      assignment_map: pairs ``(pattern, replacement)`` of T5X's ``assignment_map``. The
        first pattern that matches a parameter's whole name (``target/`` and its path in
        `like`) says which array of the checkpoint it is taken from, groups of the
        pattern written as ``\\\\1``; a replacement of None leaves it to `initial`. What
        no pattern matches is taken from its own name.
      initial: values of what the checkpoint does not have: a tree like `like`, or a
        function of a parameter's path. By default all has to be in the checkpoint.
      dtype: of the result; that of `like` by default. Rounds where it has fewer bits
        than what is stored.

    Returns:
      The parameters in the structure of `like`, and what became of every array.

    Raises:
      T5XError: a parameter that the checkpoint lacks or has in another shape, named
        before anything is read; or an array that is damaged.
      ValueError: a pattern that matches no parameter.
    """
    wanted = traverse_util.flatten_dict(dict(like), sep="/")
    names = assigned(wanted, assignment_map, TARGET)
    leaves: dict[str, Leaf] = {}
    absent = []
    for path, name in names.items():
        leaf = None if name is None else find(checkpoint.leaves, name)
        if leaf is not None:
            check_leaf(checkpoint, path, leaf, wanted[path].shape)
            leaves[path] = leaf
        elif name is not None and (initial is None or name != TARGET + path):
            absent.append(name)
    if absent:
        raise missing(checkpoint, absent)
    fresh = tuple(path for path in wanted if path not in leaves)
    if fresh and initial is None:
        raise T5XError(
            f"{fresh[0]} and what else the assignment map leaves out ({len(fresh)} in "
            "all) need initial values: give `initial`."
        )
    placed = {}
    # Layers that lie in one stored array follow each other, so that it stays at hand.
    for path in sorted(leaves, key=lambda path: leaves[path].names):
        placed[path] = place_leaf(
            leaves[path], sharding_of(wanted[path]), dtype or wanted[path].dtype
        )
    for path in fresh:
        placed[path] = _initial(initial, path, wanted[path], dtype)
    used = {name for leaf in leaves.values() for name in leaf.names}
    stored = {name for name in checkpoint.leaves if name.startswith(TARGET)}
    report = Report(
        {path: leaf.names for path, leaf in leaves.items()},
        fresh,
        tuple(sorted(stored - used)),
    )
    in_order = {path: placed[path] for path in wanted}
    return traverse_util.unflatten_dict(in_order, sep="/"), report


def _initial(initial: Any, path: str, like: Any, dtype: Any) -> jax.Array:
    value = initial(path) if callable(initial) else None
    if value is None:
        flat = traverse_util.flatten_dict(dict(initial), sep="/")
        if path not in flat:
            raise T5XError(f"initial has no value for {path}, nor has the checkpoint.")
        value = flat[path]
    if tuple(value.shape) != tuple(like.shape):
        raise T5XError(
            f"The initial value of {path} must have shape {tuple(like.shape)}, got "
            f"{tuple(value.shape)}."
        )
    return jax.device_put(jnp.asarray(value, dtype or like.dtype), sharding_of(like))
