"""A network's parameters with an adapter's beside them, and what layers make of both.

An adapter puts leaves beside a kernel, under names of its own:

=============  ==========================================  ===============
leaf           shape, for a kernel ``[in, out]``           of
=============  ==========================================  ===============
``lora_a``     ``[in, rank]``                              LoRA
``lora_b``     ``[rank, out]``; scaled once expanded       LoRA
``magnitude``  ``[out]``; becomes ``gain``                 DoRA
``gain_in``    ``[in]``, on what goes into the product     IA3
``gain``       ``[out]``, on what comes out of it          IA3
``lora_keep``  ``[1]``: the share that dropout keeps       LoRA's training
=============  ==========================================  ===============

and ``soft_prompt [length, emb_dim]`` beside the embedding of tokens
(`jaxalign.models.soft_prompt`), which is in no kernel's product and cannot be merged.

Layers that are scanned have their axis second in every leaf, as in all parameters.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

Tree = dict[str, Any]

SOFT_PROMPT = "soft_prompt"
NAMES = ("lora_a", "lora_b", "magnitude", "gain_in", "gain", "lora_keep", SOFT_PROMPT)

UNMERGED = (
    "A soft prompt is no change of a network's parameters and cannot be merged into "
    "them: generate, score, eval, steer, serve and jaxalign.load read the run that "
    "trained it as it is, and jaxalign convert RUN FOLDER --format=peft writes it as "
    "an adapter for peft."
)

exactly = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> Tree:
    """Two trees as one, the leaves of `above` where both have one.

    >>> overlay({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": 4})
    {'a': {'x': 1, 'y': 3}, 'b': 4}
    """
    found = dict(below)
    for name, value in above.items():
        under = found.get(name)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        found[name] = overlay(under, value) if both else value
    return found


def plain(tree: Mapping[str, Any]) -> Tree:
    """A network's own parameters, without what an adapter put beside them."""
    flat = traverse_util.flatten_dict(dict(tree), sep="/")
    kept = {name: leaf for name, leaf in flat.items() if not is_adapter(name)}
    return traverse_util.unflatten_dict(kept, sep="/")


def is_adapter(path: str) -> bool:
    """Whether a parameter's path is one of an adapter's."""
    return path.rpartition("/")[2] in NAMES


def merge(params: Mapping[str, Any]) -> Tree:
    """A network's parameters with its adapter multiplied into its kernels.

    Args:
      params: expanded, as `jaxalign.training.checkpoints.load` gives them; those of a
        network without an adapter come back as they are.

    Returns:
      Parameters of the network alone. Their function is that of `params`, to rounding.

    Raises:
      ValueError: for a soft prompt, which is no change of parameters.

    >>> import numpy
    >>> kernel, ones = numpy.ones((2, 2)), numpy.ones((2, 1))
    >>> merge({"kernel": kernel, "lora_a": ones, "lora_b": ones.T})
    {'kernel': Array([[2., 2.],
           [2., 2.]], dtype=float32)}
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    kept = {}
    for name, leaf in flat.items():
        if name.rpartition("/")[2] == SOFT_PROMPT:
            raise ValueError(UNMERGED)
        if is_adapter(name):
            continue
        module, _, last = name.rpartition("/")
        beside = {
            key: flat[path]
            for key in NAMES
            if (path := f"{module}/{key}".lstrip("/")) in flat
        }
        kept[name] = _merged(leaf, beside) if last == "kernel" and beside else leaf
    return traverse_util.unflatten_dict(kept, sep="/")


def merge_in_place(adapter: Any, base: Any, own: Any) -> Tree:
    """`merge` of an adapter's parameters and its base's, which it gives up.

    An adapter that cannot be merged stays beside its base, for layers to read.
    """
    if not adapter.merges:
        return adapter.expand(overlay(base, own))

    def merged(base: Any, own: Any) -> Tree:
        return merge(adapter.expand(overlay(base, own)))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, base)
    function = jax.jit(merged, out_shardings=shardings, donate_argnums=0)
    with warnings.catch_warnings():
        # What was trained in place of the base's own is not merged into it.
        warnings.filterwarnings("ignore", message="Some donated buffers")
        return function(base, own)


def _merged(kernel: jax.Array, beside: Mapping[str, jax.Array]) -> jax.Array:
    if "lora_a" in beside:
        pair = jnp.asarray(beside["lora_a"]), jnp.asarray(beside["lora_b"])
        kernel = kernel + exactly("i...r,r...o->i...o", *pair)
    if "gain_in" in beside:
        kernel = kernel * beside["gain_in"][..., None]
    if "gain" in beside:
        kernel = kernel * jnp.moveaxis(jnp.asarray(beside["gain"]), 0, -1)
    return kernel


def adapted(
    module: nn.Module,
    x: jax.Array,
    product: Callable[[jax.Array, jax.Array], jax.Array],
    kernel: jax.Array,
) -> jax.Array:
    """``x @ kernel`` in a layer, with whatever an adapter put beside the kernel.

    Args:
      module: the layer, in ``apply``.
      x: in the dtype that it computes in.
      product: how it multiplies.
      kernel: in that dtype.
    """

    def beside(name: str) -> jax.Array | None:
        if not module.has_variable("params", name):
            return None
        return module.get_variable("params", name).astype(x.dtype)

    if (gain := beside("gain_in")) is not None:
        x = x * gain
    y = product(x, kernel)
    if (a := beside("lora_a")) is not None:
        keep = beside("lora_keep")
        if keep is not None and module.has_rng("dropout"):
            shape = (*x.shape[:-2], 1, x.shape[-1])
            kept = jax.random.bernoulli(module.make_rng("dropout"), keep[0], shape)
            x = jnp.where(kept, x / keep, 0).astype(x.dtype)
        y = y + product(product(x, a), beside("lora_b"))
    if (gain := beside("gain")) is not None:
        y = y * gain
    return y
