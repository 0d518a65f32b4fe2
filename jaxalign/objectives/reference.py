"""The reference policy's log-probabilities, as columns of a batch."""

from __future__ import annotations

from typing import Any

import jax

from jaxalign import models
from jaxalign.batch import Batch


@jax.named_scope("reference")
def reference_columns(
    model: models.EncoderDecoder, params: Any, batch: Batch, *, mismatched: bool = False
) -> dict[str, jax.Array]:
    """Scores every response of a batch under a frozen policy, without dropout.

    The reference pass that fills the disk cache and a step that carries the reference
    with it both call this function, so that they give the same bits.

    Args:
      model: the network.
      params: the reference policy's parameters.
      batch: a response batch.
      mismatched: also score each response as an answer to its mismatched prompt.

    Returns:
      ``response_ref_logps`` and, if asked, ``response_ref_kl_logps``, ``[B, R]``.
    """
    params = jax.lax.stop_gradient(params)
    encoded = models.encode(model, params, batch)
    columns = {
        "response_ref_logps": models.response_logps(
            model, params, batch, encoded=encoded
        )
    }
    if mismatched:
        columns["response_ref_kl_logps"] = models.response_logps(
            model,
            params,
            batch,
            prompt=batch["response_kl_prompt"],
            encoded=encoded,
        )
    return columns
