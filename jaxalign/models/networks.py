"""What a network of a run is: made, described, written down, started from another."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import flax.linen as nn
import jax
from flax import traverse_util

from jaxalign import user_code
from jaxalign.batch import example
from jaxalign.models import processor
from jaxalign.models.config import T5Config
from jaxalign.models.conversion import unstack_layers
from jaxalign.models.stacks import PARAM_SCAN_AXIS

Params = dict[str, Any]
_Module = TypeVar("_Module", bound=type[nn.Module])


@runtime_checkable
class EncoderDecoder(Protocol):
    """What objectives, scoring and decoding ask of a language model; see `models.T5`.

    A Flax module with these methods, called by ``apply(..., method=name)``. Another
    family of encoder-decoders is another class with them, marked by `register`.
    """

    config: Any

    def encode(self, input_tokens: Any, segment_ids: Any, **settings: Any) -> Any:
        """States ``[B, Le, E]`` of packed prompts ``[B, Le]``."""

    def decode(
        self,
        encoded: Any,
        encoder_segment_ids: Any,
        decoder_input_tokens: Any,
        decoder_segment_ids: Any,
        prompt_segment_ids: Any,
        **settings: Any,
    ) -> Any:
        """States ``[B, K, Ld, E]`` of packed responses ``[B, K, Ld]``."""

    def head(self, states: Any) -> tuple[Any, Any]:
        """The two factors of the logits: states ``[..., E]``, kernel ``[E, V]``."""

    def cross_key_values(self, encoded: Any) -> Any:
        """Keys and values that every decode step attends to."""

    def init_self_cache(self, batch: int, n: int, length: int) -> Any:
        """An empty cache; axes 0 and 1 of every leaf: prompt, continuation."""

    def decode_step_states(
        self,
        tokens: Any,
        position: Any,
        self_cache: Any,
        cross_kv: Any,
        encoder_mask: Any,
        cursor: Any = None,
    ) -> tuple[Any, Any]:
        """States ``[B, N, E]`` of one position's tokens ``[B, N]``, and the cache."""


KINDS: dict[str, type[nn.Module]] = {}


def register(kind: _Module) -> _Module:
    """Marks a class of networks that checkpoints may hold, under its own name.

    It is a Flax module over the response batch (``module(batch)``) whose ``config`` is
    a `T5Config`; its other attributes are JSON values.
    """
    KINDS[kind.__name__] = kind
    return kind


def stored(network: nn.Module) -> dict[str, Any]:
    """A network as JSON: ``{"kind", "options", "shape", "execution"}``.

    >>> from jaxalign import models
    >>> stored(models.ScalarModel(models.T5Config(8, 4, 1, 4, 4, 1, 1)))["options"]
    {'read': 'response_last', 'trunk': True}
    """
    options = {
        field.name: getattr(network, field.name)
        for field in dataclasses.fields(network)
        if field.name not in ("config", "parent", "name")
    }
    return {
        "kind": type(network).__name__,
        "options": options,
        "shape": network.config.architecture(),
        "execution": network.config.execution(),
    }


def restored(description: Mapping[str, Any]) -> nn.Module:
    """The network that `stored` described, as this machine can compute it.

    Raises:
      ValueError: for a kind that nothing imported so far registers.
    """
    kind = description["kind"]
    if kind not in KINDS:
        raise ValueError(
            f"The checkpoint holds a network of the kind {kind!r}, which is not "
            f"registered.{user_code.hint(kind, KINDS)} Import the module that defines "
            f"it, marked with @models.register; known: {sorted(KINDS)}."
        )
    config = T5Config.stored(description["shape"], description.get("execution", {}))
    processor.warn_of_bfloat16(config.dtype)
    return KINDS[kind](config=config, **description.get("options", {}))


def graft(fresh: Params, trained: Mapping[str, Any]) -> Params:
    """`fresh` with each leaf that `trained` has under the same name and shape.

    So a reward model starts from a policy: its trunk is taken over, its head is new.

    >>> import numpy
    >>> fresh = {"encoder": numpy.zeros(2), "head": numpy.zeros(3)}
    >>> graft(fresh, {"encoder": numpy.ones(2), "decoder": numpy.ones(5)})
    {'encoder': array([1., 1.]), 'head': array([0., 0., 0.])}
    """
    found = traverse_util.flatten_dict(dict(trained), sep="/")
    flat = traverse_util.flatten_dict(fresh, sep="/")
    taken = {
        name: found[name] if name in found and found[name].shape == leaf.shape else leaf
        for name, leaf in flat.items()
    }
    return traverse_util.unflatten_dict(taken, sep="/")


def init_params(model: nn.Module, key: jax.Array) -> Params:
    """Random float32 parameters of a network.

    Both layer layouts get the same numbers from the same key.

    Args:
      model: a module with a ``config`` whose ``__call__`` takes a response batch.
      key: a PRNG key; the same key gives the same parameters.

    Returns:
      A plain nested dict of arrays, named as in T5X.
    """
    return _init(model, key)


def _scanned(model: nn.Module) -> nn.Module:
    """The same network with one layer of each stack to trace instead of all of them."""
    config = dataclasses.replace(model.config, scan_layers=True, remat_policy="none")
    return model.clone(config=config)


@functools.partial(jax.jit, static_argnums=0)
def _init(model: nn.Module, key: jax.Array) -> Params:
    # Always through the scanned layout, which also compiles one layer instead of all.
    params = nn.unbox(_scanned(model).init({"params": key}, example())["params"])
    return params if model.config.scan_layers else unstack_layers(params)


def logical_axes(model: nn.Module) -> Params:
    """The logical axis names of every parameter, in :func:`init_params`'s structure.

    Returns:
      Nested dict whose leaves are tuples such as ``("embed", "mlp")``; pass
      ``is_leaf=lambda x: isinstance(x, tuple)`` when mapping over it.
    """
    return traverse_util.unflatten_dict(_described(model)[1])


def shapes(model: nn.Module) -> Params:
    """Shape and dtype of every parameter; nothing is computed."""
    return traverse_util.unflatten_dict(_described(model)[0])


@functools.lru_cache(maxsize=32)  # asked for several times in a start
def _described(model: nn.Module) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Shapes and logical axes of the parameters, by path."""
    boxed = jax.eval_shape(
        lambda: _scanned(model).init({"params": jax.random.key(0)}, example())["params"]
    )
    axes = {
        path: tuple(box.names)
        for path, box in traverse_util.flatten_dict(dict(boxed)).items()
    }
    stacked = nn.unbox(boxed)
    if model.config.scan_layers:
        return traverse_util.flatten_dict(stacked), axes
    apart = traverse_util.flatten_dict(jax.eval_shape(unstack_layers, stacked))

    def of_layer(path: tuple[str, ...]) -> tuple[str, ...]:
        if path in axes:
            return axes[path]
        names = axes[path[0], path[0], *path[2:]]
        return names[:PARAM_SCAN_AXIS] + names[PARAM_SCAN_AXIS + 1 :]

    return apart, {path: of_layer(path) for path in apart}


def describe(model: nn.Module) -> str:
    """A network in one line: layers, width and parameters.

    >>> from jaxalign import models
    >>> describe(models.T5(models.T5Config(384, 64, 4, 16, 128, 2, 2)))
    '2 + 2 layers of width 64, 246,784 parameters'
    """
    config = model.config
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(model)))
    return (
        f"{config.num_encoder_layers} + {config.num_decoder_layers} layers of width "
        f"{config.emb_dim}, {total:,} parameters"
    )
