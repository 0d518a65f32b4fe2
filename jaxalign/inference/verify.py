"""Whether two checkpoints hold the same network: what both compute of random inputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.training import checkpoints

_ROWS, _PROMPT, _RESPONSE = 2, 24, 12
# Of the largest number: layers that are stacked and apart, or another program of the
# compiler's, add up in another order, in float32.
_BOUND = 1e-4


class VerificationError(ValueError):
    """A conversion computes something else than what it was made from."""


def compare(
    source: str | Path,
    made: str | Path,
    network: str | None,
    dtype: str,
    seed: int = 0,
) -> str:
    """Compares what two checkpoints compute; one is in memory at a time.

    How far bfloat16 takes a network from what it was depends on the network. So what
    was made in bfloat16 is compared, within the same bound, with the source whose
    parameters are rounded here; how far that is from the source itself is told.

    Args:
      source: a checkpoint.
      made: what was made from it.
      network: its name in the source; None: the main one. What was made has no other.
      dtype: of what was made.
      seed: of the inputs.

    Returns:
      The largest difference, in words.

    Raises:
      VerificationError: when it is larger than the order of additions explains.
    """
    exact, want = _outputs(source, network, seed, ("float32", dtype))
    (got,) = _outputs(made, None, seed, ("float32",))
    if got.shape != want.shape:
        raise VerificationError(
            f"{made} computes numbers of shape {got.shape}, {source} {want.shape}."
        )
    bound = _BOUND * float(np.max(np.abs(want)))
    difference = float(np.max(np.abs(got - want)))
    text = f"largest difference {difference:.3g}, bound {bound:.3g}"
    if dtype != "float32":
        rounding = float(np.max(np.abs(got - exact)))
        text += f"; {rounding:.3g} by rounding to {dtype}"
    if not difference <= bound:  # nor NaN
        raise VerificationError(
            f"What was made of {source} does not compute what that does: {text}. It is "
            "not kept."
        )
    return text


def _outputs(
    path: str | Path, network: str | None, seed: int, dtypes: Sequence[str]
) -> list[np.ndarray]:
    """What a network computes with its parameters, and with rounded ones."""
    found = checkpoints.load(path, network)
    batch = _batch(found.model.config.vocab_size, seed)

    @jax.jit
    def compute(params: Any) -> jax.Array:
        return found.model.apply({"params": params}, batch)

    def rounded(leaf: jax.Array, dtype: str) -> jax.Array:
        return leaf.astype(dtype).astype(leaf.dtype)

    params, outputs = found.params, []
    for dtype in dtypes:
        if dtype != "float32":
            params = jax.tree.map(functools.partial(rounded, dtype=dtype), params)
        outputs.append(np.asarray(compute(params), np.float32))
    return outputs


def _batch(vocab_size: int, seed: int) -> Mapping[str, Any]:
    """Random prompts of two lengths, each with a random response."""
    rng = np.random.default_rng(seed)
    lengths = np.array([_PROMPT, _PROMPT // 2])[:, None]
    prompts = (np.arange(_PROMPT) < lengths).astype(np.int32)
    shape = (_ROWS, 1, _RESPONSE)
    targets = rng.integers(0, vocab_size, shape).astype(np.int32)
    inputs = np.concatenate([np.zeros((_ROWS, 1, 1), np.int32), targets[..., :-1]], -1)
    return {
        "encoder_input_tokens": prompts
        * rng.integers(0, vocab_size, prompts.shape).astype(np.int32),
        "encoder_segment_ids": prompts,
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones(shape, np.float32),
        "decoder_segment_ids": np.ones(shape, np.int32),
        "prompt_mask": np.ones((_ROWS, 1), np.float32),
        "response_mask": np.ones((_ROWS, 1), np.float32),
        "response_prompt": np.zeros((_ROWS, 1), np.int32),
    }
