"""From logits to a token: pure functions of ``[..., V]`` float32 logits.

Two distributions matter and never share a name. The *full* one is the model's own,
untempered: policy gradients, KL terms and scores are defined on it. The *sampler's*
is what tokens are drawn from after temperature and truncation. Recording one in
place of the other makes KL estimates negative (huggingface/trl#235), so every draw
returns both log-probabilities.

Transforms apply in the order of Hugging Face's ``generate``: temperature, then
top-k, then top-p on what top-k left.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

# Bit pattern of float32 1.0; for non-negative floats the order of the bit patterns
# is the order of the numbers.
_ONE_BITS = 0x3F800000
# Vocabulary entries summed before the cumulative sum; T5 pads its vocabulary to a
# multiple of 128.
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token (greedy).
      top_k: keep the ``k`` most probable tokens; 0 keeps all.
      top_p: keep the smallest set of most probable tokens whose mass is at least
        ``p``, in ``(0, 1]``; 1 keeps all.

    >>> Sampling(temperature=0.7, top_p=0.9)
    Sampling(temperature=0.7, top_k=0, top_p=0.9)
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        # Smaller ones divide float32 logits into infinities.
        if self.temperature != 0.0 and not 1e-6 <= self.temperature < float("inf"):
            raise ValueError(
                "temperature must be 0 (greedy) or finite and >= 1e-6, got "
                f"{self.temperature!r}."
            )
        if self.top_k != int(self.top_k) or self.top_k < 0:
            raise ValueError(
                f"top_k must be an integer >= 0 (0: off), got {self.top_k!r}."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1] (1: off), got {self.top_p!r}.")


class Draw(NamedTuple):
    """One token per row; all arrays ``[...]``.

    Attributes:
      tokens: int32 ids.
      logps: log-probability under the model's full, untempered distribution.
      sampler_logps: log-probability under the distribution drawn from; 0 for greedy.
    """

    tokens: jax.Array
    logps: jax.Array
    sampler_logps: jax.Array


def _top_k_values(logits: jax.Array, k: int) -> jax.Array:
    """The ``k`` largest logits, ``[..., k]``; all of them for ``k = 0``."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return jax.lax.top_k(logits, k)[0]


def _nucleus_floor(logits: jax.Array, p: float) -> jax.Array:
    """The smallest logit of the nucleus, ``[..., 1]``.

    The nucleus is {token: prob >= t} for the largest t that leaves enough mass.
    Bisecting over the bits of t finds it exactly in 31 sums; sorting the vocabulary
    is ten times slower on CPU.
    """
    if p >= 1.0:
        # min() and not the last of the sorted values: XLA turns a slice of top_k
        # back into a full sort, a hundred times slower on CPU.
        return jnp.min(logits, axis=-1, keepdims=True)
    probs = jax.nn.softmax(logits, axis=-1)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)[..., None]
        mass = jnp.sum(jnp.where(probs >= threshold, probs, 0.0), axis=-1)
        enough = (mass >= p) & (mass > 0.0)
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(logits.shape[:-1], jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, low + _ONE_BITS + 1))
    threshold = jax.lax.bitcast_convert_type(low, jnp.float32)[..., None]
    inside = jnp.where(probs >= threshold, logits, jnp.inf)
    return jnp.min(inside, axis=-1, keepdims=True)


def _keep_from(logits: jax.Array, floor: jax.Array) -> jax.Array:
    return jnp.where(logits >= floor, logits, -jnp.inf)


def apply_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Sets all but the ``k`` largest logits to ``-inf``.

    Tokens tied with the k-th are kept, so that no token is preferred for its id.

    Args:
      logits: ``[..., V]``.
      k: how many to keep; 0 keeps all.

    Returns:
      ``[..., V]`` logits.
    """
    return _keep_from(logits, _nucleus_floor(_top_k_values(logits, k), 1.0))


def apply_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keeps the smallest set of most probable tokens with mass at least ``p``.

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751). At least one token is
    kept, and tokens as probable as the last one kept are kept too.

    Args:
      logits: ``[..., V]``; ``-inf`` entries have no mass.
      p: the mass to keep, in ``(0, 1]``; 1 keeps all.

    Returns:
      ``[..., V]`` logits, ``-inf`` outside the nucleus.
    """
    return _keep_from(logits, _nucleus_floor(logits, p))


def sampler_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The unnormalised log-probabilities that tokens are drawn from.

    Args:
      logits: ``[..., V]`` float32.
      sampling: with ``temperature > 0``.

    Returns:
      ``[..., V]``: tempered, then top-k, then top-p; up to a constant per row.
    """
    if sampling.temperature != 1.0:
        # The largest logit goes to 0 first: a tiny temperature must not overflow.
        logits = logits - jnp.max(logits, axis=-1, keepdims=True)
        logits = logits / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p >= 1.0:
        return logits
    # Top-p of what top-k left needs the k values only, not the vocabulary.
    values = _top_k_values(logits, sampling.top_k)
    return _keep_from(logits, _nucleus_floor(values, sampling.top_p))


def sample_keys(key: jax.Array, prompt_ids: jax.Array, num_samples: int) -> jax.Array:
    """One key per sample, a function of (key, prompt id, sample index) only.

    Args:
      key: a typed PRNG key.
      prompt_ids: ``[B]`` unsigned or non-negative integers below 2**32.
      num_samples: ``N``.

    Returns:
      ``[B, N]`` keys. ``fold_in`` the position to draw the token there.
    """
    chex.assert_rank(prompt_ids, 1)
    per_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_ids)
    per_sample = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(per_sample, (0, None))(per_prompt, jnp.arange(num_samples))


def _categorical(uniform: jax.Array, logits: jax.Array) -> jax.Array:
    """Inverts the distribution function at ``uniform`` ``[...]`` in ``[0, 1)``.

    One random number a row rather than the ``V`` of the Gumbel trick, which costs more
    than a decoding step of a small model on CPU. The sum goes over blocks first, then
    inside the chosen block, so no cumulative sum runs over the whole vocabulary.
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    padding = -logits.shape[-1] % _BLOCK
    if padding:
        weights = jnp.pad(weights, [(0, 0)] * (logits.ndim - 1) + [(0, padding)])
    blocks = weights.reshape(*logits.shape[:-1], -1, _BLOCK)
    ends = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    target = uniform * ends[..., -1]

    def first_above(cumulative, mass, target):
        # Only what has mass counts: sums in another order than left to right may
        # rise by a rounding error over an entry of probability 0.
        above = (cumulative > target[..., None]) & (mass > 0.0)
        last = mass.shape[-1] - 1 - jnp.argmax(jnp.flip(mass > 0.0, -1), axis=-1)
        return jnp.where(jnp.any(above, axis=-1), jnp.argmax(above, axis=-1), last)

    block = first_above(ends, jnp.sum(blocks, axis=-1), target)
    start = jnp.take_along_axis(
        jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends], axis=-1),
        block[..., None],
        axis=-1,
    )[..., 0]
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    offset = first_above(jnp.cumsum(inside, axis=-1), inside, target - start)
    # Logits that are NaN leave no mass anywhere; stay inside the vocabulary then (the
    # log-probability returned is NaN and tells).
    return jnp.minimum(block * _BLOCK + offset, logits.shape[-1] - 1).astype(jnp.int32)


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> Draw:
    """Draws one token per row.

    Args:
      logits: ``[..., V]`` float32, the model's own.
      keys: ``[...]`` typed PRNG keys, one a row: a row's token depends on nothing else
        in the batch. Unused when greedy.
      sampling: the rules.

    Returns:
      A ``Draw`` with arrays ``[...]``.

    >>> key = jax.random.key(0)
    >>> sample(jnp.log(jnp.array([0.2, 0.5, 0.3])), key, Sampling(top_k=1)).tokens
    Array(1, dtype=int32)
    """
    chex.assert_type(logits, jnp.float32)
    chex.assert_shape(keys, logits.shape[:-1])

    def logp_of(tokens, logits):
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    if sampling.temperature == 0.0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logps = logp_of(tokens, logits)
        return Draw(tokens, logps, jnp.zeros_like(logps))
    draw_uniform = jax.random.uniform
    for _ in range(keys.ndim):
        draw_uniform = jax.vmap(draw_uniform)
    tempered = sampler_logits(logits, sampling)
    tokens = _categorical(draw_uniform(keys), tempered)
    logps = logp_of(tokens, logits)
    if sampling == Sampling():  # nothing changed: spare a pass over the vocabulary
        return Draw(tokens, logps, logps)
    return Draw(tokens, logps, logp_of(tokens, tempered))
