"""From logits to a token: pure functions of ``[..., V]`` float32 logits.

Two distributions matter and never share a name. The *full* one is the model's own,
untempered: policy gradients, KL terms and scores are defined on it. The *sampler's*
is what tokens are drawn from after temperature and truncation. Recording one in
place of the other makes KL estimates negative (huggingface/trl#235), so every draw
returns both log-probabilities.

Transforms apply in the order of Hugging Face's ``generate``: the rules that look back
at the tokens so far (``jaxalign.decoding.history``), temperature, top-k, top-p, min-p,
typical, each on what the one before left.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

PAD_ID = 0
START_ID = 0  # a T5 decoder starts from the padding token
EOS_ID = 1

# Bit pattern of float32 1.0; for non-negative floats the order of the bit patterns
# is the order of the numbers.
_ONE_BITS = 0x3F800000
_INFINITY_BITS = 0x7F800000
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
      min_p: keep tokens at least ``min_p`` times as probable as the most probable
        one, in ``[0, 1]``; 0 keeps all.
      typical_p: keep the tokens whose information is closest to the entropy, with
        mass at least ``typical_p``, in ``(0, 1]``; 1 keeps all.
      repetition_penalty: above 1 makes tokens of the response so far less probable,
        as Hugging Face defines it; 1 is off.
      length_penalty: ``(start, factor)``: after ``start`` tokens EOS's logit rises by
        its size times ``factor ** (tokens - start) - 1`` (Hugging Face's
        ``exponential_decay_length_penalty``); None is off.
      bad_words: sequences of token ids that are never completed.
      stop_sequences: sequences of token ids that end a response, besides EOS; they
        stay part of it.
      min_new_tokens: no EOS before so many tokens.

    >>> Sampling(temperature=0.7, top_p=0.9).top_p
    0.9
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: tuple[int, float] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0

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
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1] (1: off), got {value!r}.")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must lie in [0, 1] (0: off), got {self.min_p!r}.")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                "repetition_penalty must be positive (1: off), got "
                f"{self.repetition_penalty!r}."
            )
        if self.min_new_tokens < 0:
            raise ValueError(
                f"min_new_tokens must be >= 0, got {self.min_new_tokens!r}."
            )
        if self.length_penalty is not None:
            start, factor = self.length_penalty
            if start < 0 or factor <= 0:
                raise ValueError(
                    "length_penalty must be (start >= 0, factor > 0), got "
                    f"{self.length_penalty!r}."
                )
            object.__setattr__(self, "length_penalty", (int(start), float(factor)))
        for name in ("bad_words", "stop_sequences"):
            # Lists, as gin and JSON give them, must not make the rules unhashable.
            sequences = tuple(tuple(map(int, s)) for s in getattr(self, name))
            if () in sequences:
                raise ValueError(f"{name} holds an empty sequence of token ids.")
            if name == "bad_words" and (EOS_ID,) in sequences:
                raise ValueError(
                    f"bad_words forbids EOS ({EOS_ID}): no response could end. Use "
                    "min_new_tokens to make responses longer."
                )
            object.__setattr__(self, name, sequences)

    @property
    def looks_back(self) -> bool:
        """Whether a rule changes logits before temperature and truncation."""
        return bool(
            self.repetition_penalty != 1.0
            or self.length_penalty
            or self.bad_words
            or self.min_new_tokens
        )


class Draw(NamedTuple):
    """One token per row; all arrays ``[...]``.

    Attributes:
      tokens: int32 ids.
      logps: log-probability under the model's full, untempered distribution.
      sampler_logps: log-probability under the distribution drawn from; 0 for greedy
        and for forced tokens.
      entropies: of the full distribution, in nats; None unless asked for.
    """

    tokens: jax.Array
    logps: jax.Array
    sampler_logps: jax.Array
    entropies: jax.Array | None = None


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
    return _bisected_floor(logits, p)


def _bisected_floor(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """As `_nucleus_floor`, where ``p`` may be one number a row."""
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


def apply_min_p(logits: jax.Array, p: float) -> jax.Array:
    """Keeps tokens at least ``p`` times as probable as the most probable one.

    Nguyen et al. 2024 (arXiv 2407.01082).

    Args:
      logits: ``[..., V]``.
      p: in ``[0, 1]``; 0 keeps all.
    """
    if p == 0.0:
        return logits
    best = jnp.max(logits, axis=-1, keepdims=True)
    return _keep_from(logits, best + jnp.log(jnp.float32(p)))


def apply_typical(logits: jax.Array, p: float) -> jax.Array:
    """Keeps the tokens closest to the entropy with mass at least ``p``.

    Locally typical sampling (Meister et al. 2022, arXiv 2202.00666): tokens in order
    of ``|-log prob - entropy|``, equally close ones together. The border is found by
    bisection over the bits of that distance, as for the nucleus.

    Args:
      logits: ``[..., V]``; ``-inf`` entries have no mass.
      p: the mass to keep, in ``(0, 1]``; 1 keeps all.
    """
    if p >= 1.0:
        return logits
    logps = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(logps)
    information = jnp.where(probs > 0.0, -logps, jnp.inf)
    entropy = jnp.sum(
        jnp.where(probs > 0.0, probs * -logps, 0.0), axis=-1, keepdims=True
    )
    distance = jnp.abs(information - entropy)

    def halve(_, bounds):
        low, high = bounds  # too little mass up to low, enough up to high
        middle = low + (high - low) // 2
        border = jax.lax.bitcast_convert_type(middle, jnp.float32)[..., None]
        mass = jnp.sum(jnp.where(distance <= border, probs, 0.0), axis=-1)
        enough = mass >= p
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    low = jnp.full(logits.shape[:-1], -1, jnp.int32)
    high = jnp.full(logits.shape[:-1], _INFINITY_BITS, jnp.int32)
    _, high = jax.lax.fori_loop(0, 31, halve, (low, high))
    border = jax.lax.bitcast_convert_type(high, jnp.float32)[..., None]
    return jnp.where(distance <= border, logits, -jnp.inf)


class RowSettings(NamedTuple):
    """Temperature and nucleus of each row, in place of one for all; arrays ``[...]``.

    They are data, not part of what is compiled: a server takes any of them.

    Attributes:
      temperature: float32; 0 takes the most probable token.
      top_p: float32 in ``(0, 1]``.
    """

    temperature: jax.Array
    top_p: jax.Array


def _row_logits(logits: jax.Array, rows: RowSettings) -> jax.Array:
    """Tempered logits of each row's nucleus."""
    best = jnp.argmax(logits, axis=-1)
    greedy = (rows.temperature == 0.0)[..., None]
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    shifted = shifted / jnp.where(greedy, 1.0, rows.temperature[..., None])
    shifted = jax.lax.cond(
        jnp.any(rows.top_p < 1.0),
        lambda x: jnp.where(
            rows.top_p[..., None] < 1.0,
            _keep_from(x, _bisected_floor(x, rows.top_p)),
            x,
        ),
        lambda x: x,
        shifted,
    )
    is_best = jnp.arange(logits.shape[-1]) == best[..., None]
    return jnp.where(greedy, jnp.where(is_best, 0.0, -jnp.inf), shifted)


def sampler_logits(
    logits: jax.Array, sampling: Sampling, rows: RowSettings | None = None
) -> jax.Array:
    """The unnormalised log-probabilities that tokens are drawn from.

    Args:
      logits: ``[..., V]`` float32.
      sampling: with ``temperature > 0``.
      rows: temperature and top-p of each row; then those of `sampling` do not count.

    Returns:
      ``[..., V]``: tempered, then truncated; up to a constant per row.
    """
    if rows is not None:
        if sampling.top_k:
            logits = apply_top_k(logits, sampling.top_k)
        logits = _row_logits(logits, rows)
        return apply_typical(apply_min_p(logits, sampling.min_p), sampling.typical_p)
    if sampling.temperature != 1.0:
        # The largest logit goes to 0 first: a tiny temperature must not overflow.
        logits = logits - jnp.max(logits, axis=-1, keepdims=True)
        logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1.0:
        # Top-p of what top-k left needs the k values only, not the vocabulary.
        values = _top_k_values(logits, sampling.top_k)
        logits = _keep_from(logits, _nucleus_floor(values, sampling.top_p))
    return apply_typical(apply_min_p(logits, sampling.min_p), sampling.typical_p)


def _categorical(uniform: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverts the distribution function at ``uniform`` ``[...]`` in ``[0, 1)``.

    Returns the tokens and ``logsumexp`` of the logits, which needs the same sums.

    One random number a row rather than the ``V`` of the Gumbel trick, which costs more
    than a decoding step of a small model on CPU. The sum goes over blocks first, then
    inside the chosen block, so no cumulative sum runs over the whole vocabulary.
    """
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    padding = -logits.shape[-1] % _BLOCK
    if padding:
        weights = jnp.pad(weights, [(0, 0)] * (logits.ndim - 1) + [(0, padding)])
    blocks = weights.reshape(*logits.shape[:-1], -1, _BLOCK)
    masses = jnp.sum(blocks, axis=-1)
    ends = jnp.cumsum(masses, axis=-1)
    target = uniform * ends[..., -1]

    def first_above(cumulative, mass, target):
        # Only what has mass counts: sums in another order than left to right may
        # rise by a rounding error over an entry of probability 0.
        above = (cumulative > target[..., None]) & (mass > 0.0)
        last = mass.shape[-1] - 1 - jnp.argmax(jnp.flip(mass > 0.0, -1), axis=-1)
        return jnp.where(jnp.any(above, axis=-1), jnp.argmax(above, axis=-1), last)

    block = first_above(ends, masses, target)
    start = jnp.take_along_axis(
        jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends], axis=-1),
        block[..., None],
        axis=-1,
    )[..., 0]
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    offset = first_above(jnp.cumsum(inside, axis=-1), inside, target - start)
    # Logits that are NaN leave no mass anywhere; stay inside the vocabulary then (the
    # log-probability returned is NaN and tells).
    token = jnp.minimum(block * _BLOCK + offset, logits.shape[-1] - 1)
    return token.astype(jnp.int32), largest[..., 0] + jnp.log(ends[..., -1])


def sample(
    logits: jax.Array,
    keys: jax.Array,
    sampling: Sampling,
    *,
    ruled: jax.Array | None = None,
    forced: jax.Array | None = None,
    entropy: bool = False,
    rows: RowSettings | None = None,
) -> Draw:
    """Draws one token per row.

    Args:
      logits: ``[..., V]`` float32, the model's own.
      keys: ``[...]`` typed PRNG keys, one a row: a row's token depends on nothing else
        in the batch. Unused when greedy.
      sampling: temperature and truncation.
      ruled: ``[..., V]``, the logits after ``history.apply_rules`` or any other
        change; what is drawn from after temperature and truncation. Default:
        ``logits``.
      forced: int32 ``[...]``, the token to take instead of a draw; negative: none.
      entropy: whether to return the full distribution's.
      rows: temperature and top-p of each row, in place of `sampling`'s.

    Returns:
      A ``Draw`` with arrays ``[...]``.

    >>> key = jax.random.key(0)
    >>> sample(jnp.log(jnp.array([0.2, 0.5, 0.3])), key, Sampling(top_k=1)).tokens
    Array(1, dtype=int32)
    """
    chex.assert_type(logits, jnp.float32)
    chex.assert_shape(keys, logits.shape[:-1])

    def chosen(tokens, logits):
        return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]

    unchanged = ruled is None
    ruled = logits if unchanged else ruled
    own_total = None
    if sampling.temperature == 0.0 and rows is None:
        tokens = jnp.argmax(ruled, axis=-1).astype(jnp.int32)
    else:
        draw_uniform = jax.random.uniform
        for _ in range(keys.ndim):
            draw_uniform = jax.vmap(draw_uniform)
        tempered = sampler_logits(ruled, sampling, rows)
        tokens, own_total = _categorical(draw_uniform(keys), tempered)
        unchanged &= tempered is logits
    if forced is not None:
        tokens = jnp.where(forced >= 0, forced, tokens)
    # Where nothing was changed, spare a pass over the vocabulary.
    total = own_total if unchanged and own_total is not None else None
    if total is None:
        total = jax.nn.logsumexp(logits, axis=-1)
    logps = chosen(tokens, logits) - total
    if own_total is None:
        own = jnp.zeros_like(logps)
    else:
        own = logps if unchanged else chosen(tokens, tempered) - own_total
    if forced is not None:
        own = jnp.where(forced >= 0, 0.0, own)
    entropies = None
    if entropy:
        every = logits - total[..., None]
        entropies = -jnp.sum(
            jnp.where(every > -jnp.inf, jnp.exp(every) * every, 0.0), axis=-1
        )
    return Draw(tokens, logps, own, entropies)
