"""Sequential Monte Carlo steering (Lew et al. 2023, arXiv 2306.03081).

Each step runs the model once on ``N`` particles, draws ``K`` children of every
unfinished one, weighs a child by ``G p / q``, and resamples ``N`` of them, by default
without replacement; see docs/steering.md. The paper multiplies children by ``N' / (K
N)`` and survivors by ``N / N'``, with ``N'`` the number of children; the product ``1 /
K`` is what stands here.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.decoding import network
from jaxalign.decoding import resampling as schemes
from jaxalign.decoding.checks import check_sizes
from jaxalign.decoding.generate import prompt_keys
from jaxalign.decoding.programs import Context, Program, State
from jaxalign.decoding.rules import EOS_ID, PAD_ID


class Particles(NamedTuple):
    """Weighted responses to ``B`` prompts, ``N`` each."""

    tokens: jax.Array  # int32 ``[B, N, T]``, up to EOS, then 0
    lengths: jax.Array  # int32 ``[B, N]`` tokens, EOS included
    log_weights: jax.Array  # float32 ``[B, N]``; ``-inf`` for particles that died
    # float32 ``[B, N]``, of the tokens under the (tempered) model and the first prompt
    logps: jax.Array
    ended: jax.Array  # bool ``[B, N]``, whether the particle finished in time, alive
    # float32 ``[B]``, the log of the mean weight, biased low; ``exp`` of it is unbiased
    log_evidence: jax.Array
    # float32 ``[B, T]``, effective sample size among a step's children, before
    # resampling; 0 for steps not taken
    ess: jax.Array
    ancestors: jax.Array  # int32 ``[B, T, N]``, parents; -1 for steps not taken

    @property
    def weights(self) -> jax.Array:
        """``[B, N]`` weights that sum to 1, or are all 0 where every particle died."""
        return schemes.normalised(self.log_weights)


def smc(
    model: Any,
    params: Any,
    encoder_input_tokens: jax.Array | np.ndarray,
    program: Program,
    *,
    key: jax.Array,
    num_particles: int,
    max_new_tokens: int,
    expansion: int = 1,
    resampling: str = "fearnhead_clifford",
    ess_threshold: float = 0.5,
    prompt_ids: jax.Array | np.ndarray | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    merge: bool = False,
    eos_id: int = EOS_ID,
) -> Particles:
    """Samples from the model conditioned on a program, and on EOS within ``T`` tokens.

    A prompt's particles are a function of the parameters, its tokens, ``key`` and its
    id. Compiled once per model, shape, setting and *structure* of the program: other
    numbers in a program's arrays compile nothing. A weight that is NaN or +inf counts
    as dead.

    Arguments that are not named here are those of `jaxalign.decoding.generate`.

    Args:
      encoder_input_tokens: int32 ``[B, Le]``, right-padded with 0, EOS included; or
        ``[B, M, Le]`` for a program that reads ``M`` prompts.
      program: what to condition on.
      num_particles: ``N``.
      expansion: children ``K`` of a particle. Resampling without replacement chooses
        among children, so it needs ``K >= 2``.
      resampling: ``"fearnhead_clifford"`` (without replacement, every step),
        ``"systematic"``, ``"stratified"`` or ``"multinomial"``. The latter, with
        ``expansion=1``, resample when the effective sample size is below
        ``ess_threshold * N``: standard SMC.
      ess_threshold: see ``resampling``.
      prompt_ids: ``[B]`` integers that tell prompts apart; default: their positions.
      temperature: divides the logits; the tempered model is what is conditioned.
      vocab_size: ids from here on, padding of the embedding, are impossible.
      merge: add up equal children (parent, token and program state) before resampling;
        the estimate stays unbiased and varies less.
      eos_id: the token that ends a response, the vocabulary's.
    """
    encoder_input_tokens = jnp.asarray(encoder_input_tokens, jnp.int32)
    if encoder_input_tokens.ndim == 2:
        encoder_input_tokens = encoder_input_tokens[:, None]
    chex.assert_rank(encoder_input_tokens, 3)
    batch, contexts, _ = encoder_input_tokens.shape
    if contexts != program.num_contexts:
        raise ValueError(
            f"{type(program).__name__} reads {program.num_contexts} prompts, got "
            f"{contexts}: encoder_input_tokens must be [B, M, Le] with that M."
        )
    check_sizes(
        num_particles=num_particles, max_new_tokens=max_new_tokens, expansion=expansion
    )
    if resampling not in schemes.SCHEMES:
        raise ValueError(
            f"resampling must be one of {sorted(schemes.SCHEMES)}, got {resampling!r}."
        )
    if resampling == "fearnhead_clifford" and expansion == 1 and num_particles > 1:
        raise ValueError(
            "Resampling without replacement needs expansion >= 2: it keeps N of the "
            "N * expansion children. With expansion=1 choose resampling='stratified'."
        )
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}.")
    if prompt_ids is None:
        prompt_ids = np.arange(batch)
    return _smc(
        model,
        params,
        encoder_input_tokens,
        program,
        key,
        jnp.asarray(prompt_ids, jnp.uint32),
        jnp.float32(temperature),
        jnp.float32(ess_threshold),
        (
            num_particles,
            max_new_tokens,
            expansion,
            resampling,
            vocab_size,
            merge,
            eos_id,
        ),
    )


class _Children(NamedTuple):
    """Children of particles, ``[..., K]``."""

    tokens: jax.Array
    log_weights: jax.Array
    logps: jax.Array
    done: jax.Array
    state: State


class _Carry(NamedTuple):
    """State before the token at ``position``; leaves ``[B, N, ...]``."""

    position: jax.Array
    inputs: jax.Array
    done: jax.Array
    particles: Particles
    state: State
    cache: Any


def _expand(
    program: Program,
    expansion: int,
    merge: bool,
    context: Context,
    state: State,
    log_weight: jax.Array,
    done: jax.Array,
    key: jax.Array,
) -> _Children:
    """The ``K`` children of one particle; a finished one has one child, itself."""
    draw_key, state_key = jax.random.split(key)
    logits = program.proposal(state, context)
    chex.assert_equal_shape([logits, context.logps[0]])
    possible = jnp.max(logits) != -jnp.inf  # NaN is possible, and found out below
    logits = jnp.where(possible, logits, 0.0)
    log_q = jax.nn.log_softmax(logits)
    tokens = jax.random.categorical(draw_key, logits, shape=(expansion,))
    tokens = tokens.astype(jnp.int32)
    states, log_g, ends = jax.vmap(program.step, (None, None, 0, 0))(
        state, context, tokens, jax.random.split(state_key, expansion)
    )
    logps = context.logps[0][tokens]
    log_g = jnp.where(possible, log_g + logps - log_q[tokens], -jnp.inf)
    log_g = jnp.where(log_g < jnp.inf, log_g, -jnp.inf)  # NaN is not below either
    weights = log_weight + log_g - jnp.log(expansion)
    ended = ends | (tokens == context.eos_id)
    if merge and expansion > 1:
        weights = _merge(tokens, (states, ended), weights)
    first = jnp.arange(expansion) == 0

    def if_done(own, child):
        own = jnp.asarray(own)
        return jnp.where(done, own, child.astype(own.dtype))

    return _Children(
        tokens=jnp.where(done, PAD_ID, tokens),
        log_weights=jnp.where(done, jnp.where(first, log_weight, -jnp.inf), weights),
        logps=jnp.where(done, 0.0, logps),
        done=done | ended,
        state=jax.tree.map(if_done, state, states),
    )


def _merge(tokens: jax.Array, states: State, weights: jax.Array) -> jax.Array:
    """Moves the weight of equal children to the first of them."""
    same = tokens[:, None] == tokens[None]
    for leaf in jax.tree.leaves(states):
        equal = leaf[:, None] == leaf[None]
        same &= jnp.all(equal, axis=tuple(range(2, equal.ndim)))
    first = jnp.argmax(same, axis=1) == jnp.arange(tokens.size)
    total = jax.nn.logsumexp(jnp.where(same, weights[None], -jnp.inf), axis=1)
    return jnp.where(first, total, -jnp.inf)


def _resample(
    scheme: str, threshold: jax.Array, key: jax.Array, log_weights: jax.Array
) -> schemes.Resampled:
    """``N`` of the children ``[N, K]``, as indices into the flat ``[N * K]``."""
    n, expansion = log_weights.shape
    flat = log_weights.reshape(-1)
    drawn = schemes.SCHEMES[scheme](key, flat, n)
    if expansion > 1 or scheme == "fearnhead_clifford":
        return drawn
    needed = schemes.effective_sample_size(flat) < threshold * n
    needed &= jnp.max(flat) > -jnp.inf
    return schemes.Resampled(
        jnp.where(needed, drawn.indices, jnp.arange(n)),
        jnp.where(needed, drawn.log_weights, flat),
    )


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def _smc(
    model: Any,
    params: Any,
    encoder_input_tokens: jax.Array,
    program: Program,
    key: jax.Array,
    prompt_ids: jax.Array,
    temperature: jax.Array,
    ess_threshold: jax.Array,
    settings: tuple[Any, ...],
) -> Particles:
    b, m, length = encoder_input_tokens.shape
    n, t, expansion, resampling, vocab_size, merge, eos_id = settings
    flat = encoder_input_tokens.reshape(b * m, length)
    encoder_mask, cross_kv = network.encode(model, params, flat)
    keys = prompt_keys(key, prompt_ids)
    expand = functools.partial(_expand, program, expansion, merge)
    axes = Context(0, 0, None, None, None, None)
    over_particles = jax.vmap(expand, (axes, 0, 0, 0, 0))
    axes = axes._replace(prompt_id=0)
    over_prompts = jax.vmap(over_particles, (axes, 0, 0, 0, 0))
    resample = jax.vmap(functools.partial(_resample, resampling, ess_threshold))

    def unfinished(carry: _Carry) -> jax.Array:
        return (carry.position < t) & ~jnp.all(carry.done)

    def step(carry: _Carry) -> _Carry:
        inputs = jnp.repeat(carry.inputs, m, axis=0)  # the same token in each context
        args = inputs, carry.position, carry.cache, cross_kv, encoder_mask
        logits, cache = network.apply(model, params, "decode_step", *args)
        logits = logits / temperature
        if vocab_size is not None:
            real = jnp.arange(logits.shape[-1]) < vocab_size
            logits = jnp.where(real, logits, -jnp.inf)
        logps = jax.nn.log_softmax(logits).reshape(b, m, n, -1).swapaxes(1, 2)
        old = carry.particles
        remaining = t - carry.position
        context = Context(
            logps, old.tokens, carry.position, remaining, prompt_ids, eos_id
        )

        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, carry.position)
        # Children and survivors never share randomness.
        child_keys, offset_keys = jax.vmap(jax.random.split, out_axes=1)(step_keys)
        child_keys = jax.vmap(lambda k: jax.random.split(k, n))(child_keys)
        args = context, carry.state, old.log_weights, carry.done, child_keys
        children = over_prompts(*args)
        survivors = resample(offset_keys, children.log_weights)
        # A prompt whose particles are all finished waits for its neighbours unchanged.
        settled = jnp.all(carry.done, axis=1, keepdims=True)
        survivors = schemes.Resampled(
            jnp.where(settled, jnp.arange(n) * expansion, survivors.indices),
            jnp.where(settled, old.log_weights, survivors.log_weights),
        )
        parents = survivors.indices // expansion
        flat = jax.tree.map(
            lambda x: x.reshape(b, n * expansion, *x.shape[3:]), children
        )
        child = network.take_rows(flat, survivors.indices)  # [B, N, ...]
        tokens, lengths, logps, was_done = network.take_rows(
            (old.tokens, old.lengths, old.logps, carry.done), parents
        )
        dead = survivors.log_weights == -jnp.inf
        ess = schemes.effective_sample_size(children.log_weights.reshape(b, -1))
        ess = jnp.where(settled[:, 0], 0.0, ess)
        born = jnp.where(settled, -1, parents)
        particles = old._replace(
            tokens=tokens.at[:, :, carry.position].set(child.tokens),
            lengths=lengths + ~was_done,
            log_weights=survivors.log_weights,
            logps=logps + child.logps,
            ended=child.done & ~dead,
            ess=old.ess.at[:, carry.position].set(ess),
            ancestors=old.ancestors.at[:, carry.position].set(born),
        )
        return _Carry(
            position=carry.position + 1,
            inputs=child.tokens,
            done=particles.ended | dead,
            particles=particles,
            state=child.state,
            cache=network.take_rows(cache, jnp.repeat(parents, m, axis=0)),
        )

    rows = (b, n)
    start = Particles(
        tokens=jnp.full((*rows, t), PAD_ID, jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        log_weights=jnp.zeros(rows, jnp.float32),
        logps=jnp.zeros(rows, jnp.float32),
        ended=jnp.zeros(rows, bool),
        log_evidence=jnp.zeros(b, jnp.float32),
        ess=jnp.zeros((b, t), jnp.float32),
        ancestors=jnp.full((b, t, n), -1, jnp.int32),
    )
    carry = _Carry(
        position=jnp.int32(0),
        inputs=jnp.full(rows, PAD_ID, jnp.int32),
        done=jnp.zeros(rows, bool),
        particles=start,
        state=network.repeat(program.init(), rows),
        cache=model.init_self_cache(b * m, n, t),
    )
    found = jax.lax.while_loop(unfinished, step, carry).particles
    log_weights = jnp.where(found.ended, found.log_weights, -jnp.inf)
    return found._replace(
        log_weights=log_weights,
        log_evidence=jax.nn.logsumexp(log_weights, axis=1) - jnp.log(n),
    )
