"""Adapters: few parameters that train beside a network's, which rest.

An adapter's own parameters (`LoRA.init`) lie beside the kernels that they adapt, and
`LoRA.expand` makes of them what a layer reads (`jaxalign.models.adapted`). A network
with an adapter is thus the same module on a larger tree: every layout, objective and
decoder works on it, and without the leaves (`plain`) it is the network that was
adapted, of which there is no second copy.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxalign.batch import example
from jaxalign.models.adapted import (
    Tree,
    exactly,
    is_adapter,
    merge,
    merge_in_place,
    overlay,
    plain,
)
from jaxalign.models.layers import Dense, Embed
from jaxalign.models.soft_prompt import SoftPrompt

__all__ = [
    "IA3",
    "Adapter",
    "LoRA",
    "SoftPrompt",
    "adaptable",
    "check_targets",
    "is_adapter",
    "merge",
    "merge_in_place",
    "overlay",
    "plain",
    "restored",
    "stored",
    "targeted",
]

_RANK = "rank"  # the logical axis of rank
_STACKED = re.compile(r"(?P<stack>encoder|decoder)/(?P=stack)/(?P<rest>.+)")
_APART = re.compile(r"(?P<stack>encoder|decoder)/layers_(?P<layer>\d+)/(?P<rest>.+)")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank updates of kernels: ``x W + s (x A) B`` (Hu et al., 2106.09685).

    ``B`` is 0 at first, so that training starts at the base network, to the bit
    (with ``dora``, to rounding).

    Attributes:
      rank: of the update.
      alpha: the update is scaled by ``s = alpha / rank``.
      targets: the kernels: those in whose module's path the regular expression is
        found, such as ``encoder/layers_0/attention/query``. PEFT's choice for T5 by
        default; ``"attention/|mlp/"`` takes all.
      dropout: of what goes into ``A``, one mask for all positions of a row. On where
        the objective's own dropout is.
      rslora: ``s = alpha / sqrt(rank)`` (Kalajdzievski, 2312.03732).
      dora: also learn each column's length, and let the update turn it only (Liu et
        al., 2402.09353). The length that it is divided by has no gradient, as there.

    >>> import numpy
    >>> base = {"attention": {"query": {"kernel": numpy.ones((4, 6))}}}
    >>> own = LoRA(rank=2).init(jax.random.key(0), base)
    >>> jax.tree.map(lambda leaf: leaf.shape, own)
    {'attention': {'query': {'lora_a': (4, 2), 'lora_b': (2, 6)}}}
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "attention/(query|value)"
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    adds: ClassVar[str] = "low-rank updates"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_regex("LoRA.targets", self.targets)
        if isinstance(self.rank, bool) or not isinstance(self.rank, int):
            raise ValueError(f"LoRA.rank must be a whole number, got {self.rank!r}.")
        if self.rank < 1:
            raise ValueError(f"LoRA.rank must be at least 1, got {self.rank}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA.dropout must be in [0, 1), got {self.dropout}.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"LoRA.alpha must be positive, got {self.alpha}.")

    @property
    def scale(self) -> float:
        """``s``."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def init(self, key: jax.Array, base: Tree) -> Tree:
        """The adapter's parameters for a network's; the same in both layouts.

        Args:
          key: of ``A``, which is uniform as a linear layer's kernel is in PyTorch.
          base: the network's parameters.
        """
        found = {}
        for module, kernel in targeted(base, self.targets).items():
            inner, *layers, outer = kernel.shape
            bound = 1.0 / math.sqrt(inner)
            draw = functools.partial(
                jax.random.uniform,
                shape=(inner, self.rank),
                minval=-bound,
                maxval=bound,
            )
            found[f"{module}/lora_a"] = _by_layer(draw, key, module, layers)
            found[f"{module}/lora_b"] = jnp.zeros((self.rank, *layers, outer))
            if self.dora:
                found[f"{module}/magnitude"] = _lengths(kernel)
        return traverse_util.unflatten_dict(found, sep="/")

    def axes(self, base: Tree) -> Tree:
        """Logical axes of the adapter's parameters, given those of the network's."""
        found = {}
        for module, (inner, *layers, outer) in targeted(base, self.targets).items():
            found[f"{module}/lora_a"] = (inner, *layers, _RANK)
            found[f"{module}/lora_b"] = (_RANK, *layers, outer)
            if self.dora:
                found[f"{module}/magnitude"] = (outer, *layers)
        return traverse_util.unflatten_dict(found, sep="/")

    def expand(self, tree: Tree, *, training: bool = False) -> Tree:
        """What layers read: of a network's parameters with this adapter's beside them.

        Args:
          tree: both, as of `overlay`.
          training: whether to drop.
        """
        flat = traverse_util.flatten_dict(tree, sep="/")
        for name in [name for name in flat if name.endswith("/lora_b")]:
            module = name.removesuffix("/lora_b")
            a, b = flat[f"{module}/lora_a"], self.scale * flat[name]
            flat[name] = b
            if training and self.dropout:
                keep = jnp.full((1, *a.shape[1:-1]), 1.0 - self.dropout)
                flat[f"{module}/lora_keep"] = keep
            if self.dora:
                kernel = jax.lax.stop_gradient(flat[f"{module}/kernel"])
                lengths = _lengths(kernel, *jax.lax.stop_gradient((a, b)))
                flat[f"{module}/gain"] = flat.pop(f"{module}/magnitude") / lengths
        return traverse_util.unflatten_dict(flat, sep="/")


@dataclasses.dataclass(frozen=True)
class IA3:
    """Learned gains on keys, values and hidden units (Liu et al., 2205.05638).

    All gains are 1 at first.

    Attributes:
      targets: the kernels, as of `LoRA`; what comes out of their products is scaled.
      inputs: those of them, by regular expression, whose inputs are scaled instead.

    >>> import numpy
    >>> base = {"mlp": {"wo": {"kernel": numpy.ones((4, 6))}}}
    >>> IA3().init(jax.random.key(0), base)["mlp"]["wo"]["gain_in"].shape
    (4,)
    """

    targets: str = "attention/(key|value)|mlp/wo"
    inputs: str = "mlp/"

    adds: ClassVar[str] = "gains"
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_regex("IA3.targets", self.targets)
        _check_regex("IA3.inputs", self.inputs)

    def init(self, key: jax.Array, base: Tree) -> Tree:
        """The adapter's parameters for a network's."""
        del key
        return self._beside(base, lambda kernel: kernel.shape, jnp.ones)

    def axes(self, base: Tree) -> Tree:
        """Logical axes of the adapter's parameters, given those of the network's."""
        return self._beside(base, tuple, tuple)

    def _beside(self, base: Tree, sizes: Any, make: Any) -> Tree:
        found = {}
        for module, kernel in targeted(base, self.targets).items():
            inner, *layers, outer = sizes(kernel)
            if re.search(self.inputs, module):
                found[f"{module}/gain_in"] = make((inner, *layers))
            else:
                found[f"{module}/gain"] = make((outer, *layers))
        return traverse_util.unflatten_dict(found, sep="/")

    def expand(self, tree: Tree, *, training: bool = False) -> Tree:
        """What layers read: the parameters as they are."""
        del training
        return tree


Adapter = LoRA | IA3 | SoftPrompt
KINDS: dict[str, type] = {"LoRA": LoRA, "IA3": IA3, "SoftPrompt": SoftPrompt}


def stored(adapter: Adapter) -> dict[str, Any]:
    """An adapter as JSON.

    >>> stored(IA3())["kind"]
    'IA3'
    """
    return {"kind": type(adapter).__name__, **dataclasses.asdict(adapter)}


def restored(description: Mapping[str, Any]) -> Adapter:
    """The adapter that `stored` described."""
    settings = dict(description)
    kind = settings.pop("kind")
    if kind not in KINDS:
        raise ValueError(f"unknown adapter {kind!r}; known: {sorted(KINDS)}.")
    return KINDS[kind](**settings)


def targeted(base: Mapping[str, Any], targets: str) -> dict[str, Any]:
    """The kernels whose module's path matches, by that path.

    Raises:
      ValueError: where there is none, with the paths that there are.
    """
    flat = traverse_util.flatten_dict(dict(base), sep="/")
    modules = {n.removesuffix("/kernel"): k for n, k in flat.items() if "/kernel" in n}
    found = {name: k for name, k in modules.items() if re.search(targets, name)}
    if not found:
        raise ValueError(
            f"targets={targets!r} is found in no module's path. The paths: "
            f"{', '.join(_kinds(modules))}."
        )
    return found


def adaptable(network: nn.Module) -> frozenset[str]:
    """Paths of the modules whose kernels an adapter can stand beside."""
    return frozenset(
        "/".join(module.path)
        for module, _ in _calls(network)
        if isinstance(module, Dense)
    )


def _calls(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules that a network calls, with the method; nothing is computed."""
    found = []

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        found.append((context.module, context.method_name))
        return call(*args, **kwargs)

    def trace() -> Any:
        with nn.intercept_methods(look):
            return network.init({"params": jax.random.key(0)}, example())

    jax.eval_shape(trace)
    return found


def check_targets(adapter: Adapter, base: Tree, network: nn.Module) -> None:
    """Refuses an adapter beside kernels whose layers would not look at it.

    Raises:
      ValueError: naming them.
    """
    if isinstance(adapter, SoftPrompt):
        adapter.check(base)
        if not any(m == "prompt" and isinstance(o, Embed) for o, m in _calls(network)):
            raise ValueError(
                f"{type(network).__name__} puts no soft prompt before its tokens: "
                "encode and decode have to by jaxalign.models.soft_prompt, as those "
                "of jaxalign.models.T5 do. Or set ADAPTER = @adapters.LoRA()."
            )
        return
    wrong = {*targeted(base, adapter.targets)} - adaptable(network)
    if wrong:
        raise ValueError(
            f"{type(adapter).__name__}.targets={adapter.targets!r} matches "
            f"{', '.join(_kinds(wrong))}, which take no adapter: write an expression "
            "for attention and feed-forward kernels, such as 'attention/|mlp/'."
        )


def _kinds(modules: Iterable[str]) -> list[str]:
    """Paths, one for all layers of a stack."""
    return sorted({re.sub(r"layers_\d+", "layers_*", name) for name in modules})


def _by_layer(draw: Any, key: jax.Array, module: str, layers: list[int]) -> jax.Array:
    """Random numbers that depend on a kernel's stack, number and name alone."""
    match = _APART.fullmatch(module) or _STACKED.fullmatch(module)
    name = "/".join(match.group("stack", "rest")) if match else module
    digest = hashlib.sha256(name.encode()).digest()
    key = jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))
    if layers:
        each = [draw(jax.random.fold_in(key, i)) for i in range(layers[0])]
        return jnp.stack(each, axis=1)
    number = int(match["layer"]) if match and "layer" in match.groupdict() else 0
    return draw(jax.random.fold_in(key, number))


def _lengths(kernel: Any, a: Any = None, b: Any = None) -> jax.Array:
    """``[out]`` lengths of the columns of ``kernel + a @ b``, which is never made."""
    squares = jnp.sum(jnp.square(jnp.asarray(kernel)), axis=0)
    if a is not None:
        across = exactly("i...r,i...o->r...o", a, kernel)
        inner = exactly("i...r,i...s->r...s", a, a)
        turned = exactly("r...s,s...o->r...o", inner, b)
        squares = squares + jnp.sum((2.0 * across + turned) * b, axis=0)
    # [layers, out] when scanned: a leaf has its layers second.
    return jnp.moveaxis(jnp.sqrt(squares), -1, 0)


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{name} must be a regular expression, got {pattern!r}: {error}."
        ) from error
