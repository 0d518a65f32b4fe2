"""Parameters of a T5X checkpoint onto devices, all of them or some."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxalign.interop.leaves import Leaf, of_array
from jaxalign.interop.t5x_files import Checkpoint
from jaxalign.interop.t5x_formats import T5XError
from jaxalign.interop.t5x_layouts import find
from jaxalign.interop.t5x_network import TARGET, check_leaf, missing

# Up to so many bytes the parts of a process are read in one go: chunks that lie in many
# of them are unpacked once.
_AT_ONCE = 1 << 30

AssignmentMap = Sequence[tuple[str, str | None]]
Initial = Mapping[str, Any] | Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every array.

    Attributes:
      loaded: the stored arrays that each parameter came from, by its path.
      initialised: parameters that were not taken from the checkpoint.
      left_over: parameters of the checkpoint that nothing was loaded from.
    """

    loaded: Mapping[str, tuple[str, ...]]
    initialised: tuple[str, ...]
    left_over: tuple[str, ...]

    def __str__(self) -> str:
        """All of it, in lines.

        >>> print(Report({"encoder/x": ("target/encoder/x",)}, ("head/kernel",), ()))
        1 parameter loaded
        1 initialised: head/kernel
        0 left over
        """
        count = len(self.loaded)
        lines = [f"{count} parameter{'s' * (count != 1)} loaded"]
        for name in ("initialised", "left_over"):
            found = getattr(self, name)
            listed = f": {', '.join(found)}" if found else ""
            lines.append(f"{len(found)} {name.replace('_', ' ')}{listed}")
        return "\n".join(lines)


def restore(
    checkpoint: Checkpoint,
    like: Mapping[str, Any],
    *,
    assignment_map: AssignmentMap = (),
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
    names = _assigned(wanted, assignment_map)
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
        placed[path] = _place(leaves[path], wanted[path], dtype)
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


def _assigned(
    wanted: Mapping[str, Any], assignment_map: AssignmentMap
) -> dict[str, str | None]:
    """The stored name that each parameter is taken from; None for none."""
    rules = []
    for pattern, replacement in assignment_map:
        try:
            rules.append((re.compile(pattern), replacement))
        except re.error as error:
            raise ValueError(
                f"assignment_map: {pattern!r} is no regular expression: {error}."
            ) from error
    names: dict[str, str | None] = {}
    unused = {rule.pattern for rule, _ in rules}
    for path in wanted:
        names[path] = TARGET + path
        for rule, replacement in rules:
            if match := rule.fullmatch(TARGET + path):
                unused.discard(rule.pattern)
                names[path] = _expanded(match, replacement)
                break
    if unused:
        raise ValueError(
            f"assignment_map: {sorted(unused)} match no parameter of the network. A "
            f"pattern has to match a whole name, such as {TARGET}{next(iter(wanted))}."
        )
    return names


def _expanded(match: re.Match[str], replacement: str | None) -> str | None:
    try:
        return None if replacement is None else match.expand(replacement)
    except (re.error, IndexError) as error:
        raise ValueError(
            f"assignment_map: {replacement!r} does not fit {match.re.pattern!r}: "
            f"{error}."
        ) from error


def _place(leaf: Leaf, like: Any, dtype: Any) -> jax.Array:
    """Reads a parameter onto its devices; devices that hold copies share one read."""
    dtype = jnp.dtype(dtype or like.dtype)
    sharding = _sharding(like)
    held = sharding.addressable_devices_indices_map(leaf.shape).values()
    parts = {_bounds(index, leaf.shape) for index in held}
    box = tuple(
        (min(low for low, _ in axis), max(high for _, high in axis))
        for axis in zip(*parts, strict=True)
    )
    source, corner = leaf, tuple(0 for _ in box)
    size = math.prod(high - low for low, high in box) * leaf.dtype.itemsize
    if len(parts) > 1 and size <= _AT_ONCE:
        block = leaf.read([slice(*bounds) for bounds in box])
        source, corner = of_array(block), tuple(low for low, _ in box)
    blocks: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def block_of(index: tuple[slice, ...]) -> np.ndarray:
        part = _bounds(index, leaf.shape)
        if part not in blocks:
            shifted = [
                slice(low - first, high - first)
                for (low, high), first in zip(part, corner, strict=True)
            ]
            blocks[part] = source.read(shifted).astype(dtype, copy=False)
        return blocks[part]

    return jax.make_array_from_callback(leaf.shape, sharding, block_of)


def _bounds(
    index: Sequence[slice], shape: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    return tuple(
        part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
    )


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
    return jax.device_put(jnp.asarray(value, dtype or like.dtype), _sharding(like))


def _sharding(like: Any) -> jax.sharding.Sharding:
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return getattr(like, "sharding", None) or alone
