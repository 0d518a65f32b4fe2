"""Parameters of other projects' checkpoints, described before any of them is read.

A `Foreign` says what a checkpoint holds: the kind and the shape of the network, its
vocabulary, and a `Leaf` for each parameter, which reads from disk the part that is
asked for. A reader looks at names and shapes only; `place` then puts leaf by leaf on
the devices, and a writer takes leaf by leaf, so that no machine holds a whole model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from jaxalign.models import networks
from jaxalign.models.config import T5Config, T5Shape
from jaxalign.models.stacks import PARAM_SCAN_AXIS
from jaxalign.vocabularies import Vocabulary

_LAYER = re.compile(r"(?P<stack>encoder|decoder)/layers_(?P<number>\d+)/(?P<rest>.+)")
_STACK = re.compile(r"(?P<stack>encoder|decoder)/(?P=stack)/(?P<rest>.+)")

Index = tuple[slice, ...]


class Source(NamedTuple):
    """Where a parameter comes from: a tensor, as it is or transposed."""

    name: str
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that has not been read.

    Attributes:
      shape: of the whole.
      dtype: of what `read` gives.
      read: the part that an index of slices names.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def transposed(self) -> Leaf:
        """The same with its axes in reverse."""
        return Leaf(self.shape[::-1], self.dtype, lambda at: self.read(at[::-1]).T)


def whole(leaf: Leaf) -> np.ndarray:
    """All of an array."""
    return leaf.read((slice(None),) * len(leaf.shape))


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What a checkpoint of another project holds.

    Attributes:
      kind: the network's class, a name in ``models.networks.KINDS``.
      shape: of the network.
      vocabulary: its tokenizer, with the ids of padding, EOS and start; None where the
        folder has none.
      names: the tensor behind each parameter, by the parameter's path with layers
        apart (``encoder/layers_0/...``).
      leaves: the parameters, not read, by the same paths.
      options: other attributes of the network's class.
      left_over: tensors of the checkpoint that the network does not use.
    """

    kind: str
    shape: T5Shape
    vocabulary: Vocabulary | None
    names: Mapping[str, Source]
    leaves: Mapping[str, Leaf]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    left_over: tuple[str, ...] = ()

    def model(self, **execution: Any) -> nn.Module:
        """The network, computed as `models.T5Config`'s fields of execution say."""
        config = T5Config(**dataclasses.asdict(self.shape), **execution)
        return networks.KINDS[self.kind](config=config, **self.options)


def place(
    leaves: Mapping[str, Leaf],
    shardings: Any = None,
    dtype: Any = None,
    *,
    scan_layers: bool = False,
) -> dict[str, Any]:
    """Reads parameters, each straight onto its devices.

    Args:
      leaves: by path, layers apart.
      shardings: a tree of shardings in the structure of the result; the first local
        device by default. A process reads the parts that its devices hold.
      dtype: of the result, float32 by default.
      scan_layers: stack the layers.

    Returns:
      Parameters in the structure of ``models.init_params``.
    """
    dtype = np.dtype(dtype or np.float32)
    leaves = stack(leaves) if scan_layers else leaves
    flat = traverse_util.flatten_dict(shardings or {}, sep="/")
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if flat and set(flat) != set(leaves):
        raise ValueError(
            "The shardings are not those of this network's parameters: "
            f"{sorted(set(flat) ^ set(leaves))[:4]} differ (scan_layers, or another "
            "kind of network?)."
        )
    placed = {}
    for path, leaf in leaves.items():
        placed[path] = jax.make_array_from_callback(
            leaf.shape,
            flat.get(path, alone),
            lambda at, leaf=leaf: np.ascontiguousarray(leaf.read(at), dtype),
        )
    return traverse_util.unflatten_dict(placed, sep="/")


def stack(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The leaves of a network with ``scan_layers``; see ``models.stack_layers``."""
    found: dict[str, Leaf] = {}
    layers: dict[str, dict[int, Leaf]] = {}
    for path, leaf in leaves.items():
        if match := _LAYER.fullmatch(path):
            name = f"{match['stack']}/{match['stack']}/{match['rest']}"
            layers.setdefault(name, {})[int(match["number"])] = leaf
        else:
            found[path] = leaf
    for name, numbered in layers.items():
        found[name] = _stacked([numbered[i] for i in range(len(numbered))])
    return found


def _stacked(layers: list[Leaf]) -> Leaf:
    axis, first = PARAM_SCAN_AXIS, layers[0]

    def read(at: Index) -> np.ndarray:
        inner = at[:axis] + at[axis + 1 :]
        return np.stack([leaf.read(inner) for leaf in layers[at[axis]]], axis)

    shape = (*first.shape[:axis], len(layers), *first.shape[axis:])
    return Leaf(shape, first.dtype, read)


def unstack(params: Mapping[str, Any]) -> dict[str, Leaf]:
    """The leaves of parameters in either layout, layers apart.

    Args:
      params: nested, or flat by path; leaves are arrays or `Leaf`. A sharded array of
        several processes is gathered when it is read, by all of them.
    """
    found = {}
    for path, leaf in traverse_util.flatten_dict(dict(params), sep="/").items():
        match = _STACK.fullmatch(path)
        if not match:
            found[path] = leaf if hasattr(leaf, "read") else _of_array(leaf)
            continue
        for i in range(leaf.shape[PARAM_SCAN_AXIS]):
            name = f"{match['stack']}/layers_{i}/{match['rest']}"
            found[name] = _layer(leaf, i)
    return found


def _of_array(array: Any) -> Leaf:
    return Leaf(array.shape, np.dtype(array.dtype), lambda at: _host(array)[at])


def _layer(stacked: Any, number: int) -> Leaf:
    axis = PARAM_SCAN_AXIS
    shape = (*stacked.shape[:axis], *stacked.shape[axis + 1 :])

    def read(at: Index) -> np.ndarray:
        if hasattr(stacked, "read"):
            one = slice(number, number + 1)
            return np.squeeze(stacked.read((*at[:axis], one, *at[axis:])), axis)
        return _host(stacked[(slice(None),) * axis + (number,)])[at]

    return Leaf(shape, np.dtype(stacked.dtype), read)


def _host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
