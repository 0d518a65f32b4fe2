"""T5X's Adafactor, for layers apart or stacked in one array."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.models.stacks import PARAM_SCAN_AXIS


def layers_axis(path: tuple[str, ...], shape: tuple[int, ...]) -> int | None:
    """The axis along which a parameter stacks the layers of an ``nn.scan``, or None.

    T5X names the scanned module like the stack that holds it, ``decoder/decoder/...``.

    >>> layers_axis(("encoder", "encoder", "mlp", "wo", "kernel"), (1024, 8, 512))
    1
    >>> layers_axis(("encoder", "layers_0", "mlp", "wo", "kernel"), (1024, 512))
    """
    stacked = any(
        outer == inner and outer in ("encoder", "decoder")
        for outer, inner in zip(path, path[1:], strict=False)
    )
    return PARAM_SCAN_AXIS if stacked and len(shape) > 1 else None


class _Axes(NamedTuple):
    rows: tuple[int, ...]  # the axis that v_col averages over; () if not factored
    columns: tuple[int, ...]  # the axis that v_row averages over
    block: tuple[int, ...]  # all axes of one layer: the extent of an RMS


class AdafactorState(NamedTuple):
    """Second moments, in trees of the parameters' structure.

    Every array has its parameter's rank and size 1 along averaged axes, so that the
    parameter's sharding fits the rest. Unused ones hold a single 0.
    """

    count: jax.Array
    v_row: Any
    v_col: Any
    v: Any


class _Leaf(NamedTuple):
    update: Any
    v_row: jax.Array
    v_col: jax.Array
    v: jax.Array


def _rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))


def scale_by_adafactor(
    decay_rate: float,
    clipping_threshold: float | None,
    multiply_by_parameter_scale: bool,
    min_dim_size_to_factor: int,
    factored: bool,
    epsilon1: float,
    epsilon2: float,
) -> optax.GradientTransformation:
    """Adafactor's rescaling (Shazeer and Stern 2018, Algorithms 4-6), per layer.

    As `optax.adafactor` for parameters that hold one layer. Where ``nn.scan`` stacks
    layers in one array, Optax would clip and scale by the root mean square of all
    layers together and might factor the layer axis; here, as in T5X, each layer is its
    own block, so that both layouts of a model train alike. Arguments: of `adafactor`.
    """

    def axes(path: Any, param: jax.Array) -> _Axes:
        names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        stack = layers_axis(names, param.shape)
        block = tuple(i for i in range(param.ndim) if i != stack)
        # The two largest axes of one layer, the later first among equals, as in T5X.
        sizes = [param.shape[i] for i in block]
        by_size = [block[i] for i in np.argsort(sizes, kind="stable")]
        if not factored or len(block) < 2 or sorted(sizes)[-2] < min_dim_size_to_factor:
            return _Axes((), (), block)
        return _Axes((by_size[-2],), (by_size[-1],), block)

    def unzip(count: jax.Array, leaves: Any) -> tuple[Any, AdafactorState]:
        def field(name: str) -> Any:
            get = operator.attrgetter(name)
            return jax.tree.map(get, leaves, is_leaf=lambda x: isinstance(x, _Leaf))

        moments = (field(name) for name in ("v_row", "v_col", "v"))
        return field("update"), AdafactorState(count, *moments)

    def init(params: Any) -> AdafactorState:
        def zeros(path: Any, param: jax.Array) -> _Leaf:
            rows, columns, _ = axes(path, param)
            unused = jnp.zeros((1,) * param.ndim, jnp.float32)
            if not rows:
                return _Leaf(None, unused, unused, jnp.zeros_like(param))
            v_row = jnp.zeros_like(jnp.mean(param, axis=columns, keepdims=True))
            v_col = jnp.zeros_like(jnp.mean(param, axis=rows, keepdims=True))
            return _Leaf(None, v_row, v_col, unused)

        leaves = jax.tree_util.tree_map_with_path(zeros, params)
        return unzip(jnp.zeros([], jnp.int32), leaves)[1]

    def update(grads: Any, state: AdafactorState, params: Any = None):
        if params is None:
            raise ValueError("adafactor: update(grads, state, params) needs params.")
        # 0 at the first step: the moments start as the first squared gradient.
        decay = 1.0 - (state.count.astype(jnp.float32) + 1.0) ** -decay_rate

        def one(path: Any, grad, v_row, v_col, v, param) -> _Leaf:
            rows, columns, block = axes(path, param)
            square = jnp.square(grad) + epsilon1
            if rows:
                row = jnp.mean(square, axis=columns, keepdims=True)
                column = jnp.mean(square, axis=rows, keepdims=True)
                v_row = decay * v_row + (1.0 - decay) * row
                v_col = decay * v_col + (1.0 - decay) * column
                # v_row v_col / mean(v_row) is the rank-1 estimate; rooting the factors
                # apart keeps the products within float32's range.
                ratio = v_row / jnp.mean(v_row, axis=rows, keepdims=True)
                y = grad * ratio**-0.5 * v_col**-0.5
            else:
                v = decay * v + (1.0 - decay) * square
                y = grad * v**-0.5
            if clipping_threshold is not None:
                y = y / jnp.maximum(1.0, _rms(y, block) / clipping_threshold)
            if multiply_by_parameter_scale:
                y = y * jnp.maximum(_rms(param, block), epsilon2)
            return _Leaf(y, v_row, v_col, v)

        leaves = jax.tree_util.tree_map_with_path(
            one, grads, state.v_row, state.v_col, state.v, params
        )
        return unzip(optax.safe_increment(state.count), leaves)

    return optax.GradientTransformation(init, update)
