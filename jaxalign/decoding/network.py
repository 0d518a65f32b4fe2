"""What every loop and search shares: calls of the network, and rows of its state.

Of the model they use ``encode``, ``cross_key_values``, ``init_self_cache`` and
``decode_step`` only; contrastive search its ``decode_step_states`` and ``logits`` too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.decoding.rules import PAD_ID
from jaxalign.models import soft_prompt


def apply(model: Any, params: Any, method: str, *args: Any, **settings: Any) -> Any:
    """Calls one of the model's decoding methods."""
    return model.apply({"params": params}, *args, method=method, **settings)


def encode(model: Any, params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
    """The mask ``[B, Le]`` and the cross-attention keys and values of prompts."""
    mask = (tokens != PAD_ID).astype(jnp.int32)
    settings = {"prompts": 1} if soft_prompt.held(params) else {}
    encoded = apply(model, params, "encode", tokens, mask, **settings)
    return mask, apply(model, params, "cross_key_values", encoded)


def take_rows(tree: Any, index: jax.Array) -> Any:
    """Rows ``index [B, n]`` of axis 1: leaves ``[B, N, ...]`` to ``[B, n, ...]``."""
    return jax.tree.map(lambda leaf: jax.vmap(lambda x, i: x[i])(leaf, index), tree)


def repeat(tree: Any, rows: tuple[int, ...]) -> Any:
    """The state of one row for rows of a shape; None stays None."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*rows, *jnp.shape(x))), tree)
