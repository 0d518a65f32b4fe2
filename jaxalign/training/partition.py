"""Which parameters of a run's networks train, and what an adapter makes of the rest.

A train state holds the parameters that train apart from those that rest, leaf by leaf:
``params`` and ``frozen`` may have parts of the same network. `Partition.split` parts
networks and `Partition.join` puts them together again, without a copy. Only what trains
has a gradient and an optimizer's state.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util

from jaxalign import user_code
from jaxalign.models import adapters

REFERENCE = "reference"  # the network that fills the ``ref`` columns of a batch

Networks = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which parameters train.

    Attributes:
      main: the network that the adapter is beside.
      resting: networks that no step changes, beside the reference.
      adapter: trains in place of the main network's own parameters.
      trainable: regular expression: the parameters that train are those in whose names,
        such as ``policy/decoder/layers_0/mlp/wo/kernel``, it is found; an adapter's do
        always. None: all, but those that an adapter stands for.
      untrained: likewise, those that do not train.

    >>> import numpy
    >>> networks = {"policy": {"encoder": numpy.zeros(2), "decoder": numpy.ones(3)}}
    >>> params, frozen = Partition(trainable="decoder").split(networks)
    >>> params
    {'policy': {'decoder': array([1., 1., 1.])}}
    >>> frozen
    {'policy': {'encoder': array([0., 0.])}}
    """

    main: str = "policy"
    resting: tuple[str, ...] = ()
    adapter: adapters.Adapter | None = None
    trainable: str | None = None
    untrained: str | None = None

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name, its network's first, trains."""
        network = name.partition("/")[0]
        if network in (REFERENCE, *self.resting):
            return False
        if network == self.main and self.adapter and adapters.is_adapter(name):
            return True
        if self.untrained is not None and re.search(self.untrained, name):
            return False
        if self.trainable is not None:
            return bool(re.search(self.trainable, name))
        return not (self.adapter and network == self.main)

    @property
    def whole(self) -> bool:
        """Whether networks train or rest as wholes."""
        return (self.adapter or self.trainable or self.untrained) is None

    @property
    def rests_on_base(self) -> bool:
        """Whether nothing but an adapter trains of the main network."""
        return self.adapter is not None and self.trainable is None

    def split(self, networks: Mapping[str, Any]) -> tuple[Networks, Networks]:
        """The parameters that train, and those that rest: ``{name: parameters}``."""
        if self.whole:
            held = (REFERENCE, *self.resting)
            rest = {name: tree for name, tree in networks.items() if name in held}
            return {n: t for n, t in networks.items() if n not in held}, rest
        flat = traverse_util.flatten_dict(dict(networks), sep="/")
        train = {name: leaf for name, leaf in flat.items() if self.trains(name)}
        rest = {name: leaf for name, leaf in flat.items() if name not in train}
        return _nested(train), _nested(rest)

    def join(
        self,
        params: Mapping[str, Any],
        frozen: Mapping[str, Any],
        *,
        training: bool = False,
    ) -> Networks:
        """The networks as an objective reads them, adapter and all.

        Args:
          params: those that train.
          frozen: those that rest.
          training: whether an adapter drops.
        """
        networks = adapters.overlay(frozen, params)
        if self.adapter is None:
            return networks
        main = self.adapter.expand(networks[self.main], training=training)
        return {**networks, self.main: main}

    def reference(self, frozen: Mapping[str, Any]) -> Any:
        """The reference among what rests: a network, or the base of an adapter.

        None where it is neither.
        """
        if REFERENCE in frozen or not self.rests_on_base:
            return frozen.get(REFERENCE)
        return frozen.get(self.main)

    def with_adapter(self, networks: Networks, key: jax.Array) -> Networks:
        """The networks with a new adapter's parameters beside the main one's."""
        if self.adapter is None:
            return networks
        base = networks[self.main]
        own = self.adapter.init(key, base)
        return {**networks, self.main: adapters.overlay(base, own)}

    def with_axes(self, axes: Networks) -> Networks:
        """As `with_adapter`, of logical axes."""
        if self.adapter is None:
            return axes
        base = axes[self.main]
        own = self.adapter.axes(base)
        return {**axes, self.main: adapters.overlay(base, own)}

    def stored(self) -> dict[str, Any]:
        """What a checkpoint says of its main network, as JSON."""
        adapter = self.adapter and adapters.stored(self.adapter)
        found = {
            "adapter": adapter,
            "trainable": self.trainable,
            "untrained": self.untrained,
        }
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def restored(cls, name: str, about: Mapping[str, Any]) -> Partition:
        """That of the network `name`, of which a checkpoint says so."""
        adapter = about.get("adapter")
        return cls(
            name,
            adapter=adapter and adapters.restored(adapter),
            trainable=about.get("trainable"),
            untrained=about.get("untrained"),
        )

    def check(self, networks: Mapping[str, Any], modules: Mapping[str, Any]) -> None:
        """Refuses expressions that name nothing, before anything is compiled.

        Args:
          networks: shapes of all parameters, without the adapter's.
          modules: the networks.

        Raises:
          ValueError: saying what there is.
        """
        if self.adapter is not None:
            base = networks[self.main]
            adapters.check_targets(self.adapter, base, modules[self.main])
        held = (REFERENCE, *self.resting)
        flat = traverse_util.flatten_dict(dict(networks), sep="/")
        names = [name for name in flat if name.partition("/")[0] not in held]
        for macro in ("trainable", "untrained"):
            pattern = getattr(self, macro)
            if pattern is None:
                continue
            try:
                found = any(re.search(pattern, name) for name in names)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"{macro.upper()} must be a regular expression, got {pattern!r}: "
                    f"{error}."
                ) from error
            if not found:
                shown = sorted({re.sub(r"layers_\d+", "layers_*", n) for n in names})
                raise ValueError(
                    f"{macro.upper()}={pattern!r} is found in no parameter's name."
                    f"{user_code.hint(pattern, shown)} The names: {', '.join(shown)}."
                )
        if self.adapter is None and not any(
            self.trains(name) for name in names if name.startswith(f"{self.main}/")
        ):
            raise ValueError(
                f"TRAINABLE={self.trainable!r} and UNTRAINED={self.untrained!r} leave "
                f"nothing of the main network {self.main!r} to train."
            )


def _nested(flat: Mapping[str, Any]) -> Networks:
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def parted(tree: Any, like: Mapping[str, Any]) -> tuple[Any, Any]:
    """The leaves of a tree that `like` has, and the others."""
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    wanted = traverse_util.flatten_dict(dict(like), sep="/")
    there = {name: leaf for name, leaf in flat.items() if name in wanted}
    rest = {name: leaf for name, leaf in flat.items() if name not in wanted}
    return _nested(there), _nested(rest)
