"""Parameters of other projects' checkpoints, described before any of them is read.

A `Foreign` says what a checkpoint holds: the kind and the shape of the network, its
vocabulary, and a `Leaf` for each parameter, which reads from disk the part that is
asked for. A reader looks at names and shapes only; `place` then puts leaf by leaf on
the devices, and a writer takes leaf by leaf, so that no machine holds a whole model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax import traverse_util

from jaxalign.interop import leaves as views
from jaxalign.interop.leaves import Leaf
from jaxalign.interop.placing import place_leaf, sharding_of
from jaxalign.models import networks
from jaxalign.models.config import T5Config, T5Shape
from jaxalign.models.stacks import PARAM_SCAN_AXIS
from jaxalign.vocabularies import Vocabulary

_LAYER = re.compile(r"(?P<stack>encoder|decoder)/layers_(?P<number>\d+)/(?P<rest>.+)")
_STACK = re.compile(r"(?P<stack>encoder|decoder)/(?P=stack)/(?P<rest>.+)")


class Source(NamedTuple):
    """Where a parameter comes from: a tensor, as it is or transposed."""

    name: str
    transposed: bool = False


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
    if flat and set(flat) != set(leaves):
        raise ValueError(
            "The shardings are not those of this network's parameters: "
            f"{sorted(set(flat) ^ set(leaves))[:4]} differ (scan_layers, or another "
            "kind of network?)."
        )
    placed = {
        path: place_leaf(leaf, flat.get(path) or sharding_of(leaf), dtype)
        for path, leaf in leaves.items()
    }
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
        ordered = [leaf for _, leaf in sorted(numbered.items())]
        found[name] = views.stacked(ordered, PARAM_SCAN_AXIS)
    return found


def flat(params: Mapping[str, Any]) -> dict[str, Leaf]:
    """The leaves of parameters, nested or flat, in the layout that they have."""
    return {
        path: value if isinstance(value, Leaf) else views.of_array(value, path)
        for path, value in traverse_util.flatten_dict(dict(params), sep="/").items()
    }


def unstack(params: Mapping[str, Any]) -> dict[str, Leaf]:
    """The leaves of parameters in either layout, layers apart.

    Args:
      params: nested, or flat by path; arrays or `Leaf`. A sharded array of several
        processes is gathered when it is read, by all of them.
    """
    found = {}
    for path, leaf in flat(params).items():
        match = _STACK.fullmatch(path)
        if not match:
            found[path] = leaf
            continue
        for i in range(leaf.shape[PARAM_SCAN_AXIS]):
            name = f"{match['stack']}/layers_{i}/{match['rest']}"
            found[name] = views.layer(leaf, i, PARAM_SCAN_AXIS)
    return found
