"""Probabilistic programs over a model: what SMC steering conditions on.

A program is a Feynman-Kac model (Lew et al. 2023, arXiv 2306.03081, section 2; see
docs/steering.md). Programs are pytrees of arrays with three methods on *one* particle;
the driver batches them, so they are plain JAX:

* ``init()`` returns the state at the start, any pytree;
* ``proposal(state, context)`` returns unnormalised log-probabilities ``[V]`` to draw
  the next token from; ``-inf`` everywhere kills the particle;
* ``step(state, context, token, key)`` returns the next state, ``log G``, and whether
  the particle is finished. EOS finishes it in any case. ``key`` is for programs that
  draw more than tokens.

The driver weighs each draw by ``G p / q`` itself, where ``p`` is ``context.logps[0]``.

A program of one's own is a ``flax.struct.dataclass`` that derives from ``Program``:

>>> import flax
>>> @flax.struct.dataclass
... class NoLongerThan(Program):
...     limit: int
...     def step(self, state, context, token, key):
...         too_long = context.position >= self.limit
...         return state, jnp.where(too_long, -jnp.inf, 0.0), False
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.decoding.rules import EOS_ID, PAD_ID

BLANK = -1  # stands for "one or more tokens" in a template
SPACED_BLANK = -2  # the first of which begins with a space

State = Any


class Context(NamedTuple):
    """What a program may look at before the token at ``position``."""

    # float32 ``[M, V]``, log-probabilities of the next token given each of the ``M``
    # prompts; row 0 is the model that particles are drawn from
    logps: jax.Array
    tokens: jax.Array  # int32 ``[T]``, the tokens so far, then 0
    position: jax.Array  # int32 scalar, how many there are
    remaining: jax.Array  # int32 scalar, how many may follow, EOS included
    prompt_id: jax.Array  # uint32 scalar, as given to ``smc``
    eos_id: jax.Array | int = EOS_ID  # what ends a text


@flax.struct.dataclass
class Program:
    """The model itself, conditioned on ending in time; ``G = 1``."""

    num_contexts = 1  # prompts that it reads, ``M``

    def init(self) -> State:
        return ()

    def proposal(self, state: State, context: Context) -> jax.Array:
        return only_eos_at_last(context.logps[0], context)

    def step(
        self, state: State, context: Context, token: jax.Array, key: jax.Array
    ) -> tuple[State, jax.Array, jax.Array]:
        return state, jnp.float32(0.0), False


def only_eos_at_last(logits: jax.Array, context: Context) -> jax.Array:
    """Leaves EOS alone where no other token could still be followed by it."""
    allowed = (context.remaining > 1) | (jnp.arange(logits.shape[-1]) == context.eos_id)
    return jnp.where(allowed, logits, -jnp.inf)


@flax.struct.dataclass
class Infilling(Program):
    """Fixed text with blanks of one or more tokens in it.

    A blank's length is ``1 + Geometric(1/2)``, drawn token by token; no blank holds an
    EOS. Fixed tokens are forced, and cost their probability. Where tokens run short the
    blank ends at once, and costs the 1/2 of that choice.
    """

    template: jax.Array  # int32 ``[L]``, made by :func:`infilling`
    spaced: jax.Array | None = None  # bool ``[V]``, tokens that begin with a space

    def init(self) -> State:
        return jnp.int32(0), jnp.bool_(True)  # where it is; whether a part begins

    def proposal(self, state: State, context: Context) -> jax.Array:
        at, begins = state
        wanted = self.template[at]
        ids = jnp.arange(context.logps.shape[-1])
        allowed = jnp.where(wanted < 0, ids != context.eos_id, ids == wanted)
        if self.spaced is not None:
            allowed &= self.spaced | ~begins | (wanted != SPACED_BLANK)
        enough = context.remaining >= self.template.size - at
        return jnp.where(allowed & enough, context.logps[0], -jnp.inf)

    def step(self, state, context, token, key):
        state, _ = state
        blank = self.template[state] < 0
        more = jax.random.bernoulli(key)
        # Staying needs a token for everything from here on, this blank included.
        short = context.remaining - 1 < self.template.size - state
        stay = blank & more & ~short
        log_g = jnp.where(blank & short, jnp.log(0.5), 0.0)
        return (jnp.where(stay, state, state + 1), ~stay), log_g, False


def infilling(
    parts: Sequence[Sequence[int] | None],
    spaced_blanks: Sequence[int] = (),
    spaced: jax.Array | None = None,
    eos_id: int = EOS_ID,
) -> Infilling:
    """An :class:`Infilling` from token ids and ``None`` for each blank.

    ``spaced_blanks``, counted from 0, begin with one of the tokens that are ``spaced``.

    >>> infilling([[5, 6], None, [7]]).template
    Array([ 5,  6, -1,  7,  1], dtype=int32)
    """
    flat: list[int] = []
    blanks = itertools.count()
    for i, part in enumerate(parts):
        if part is not None:
            flat += part
            continue
        begins = next(blanks) in spaced_blanks
        if i and parts[i - 1] is None and not begins:
            raise ValueError(f"parts[{i - 1}] and parts[{i}] are both blank; use one.")
        flat.append(SPACED_BLANK if begins else BLANK)
    if PAD_ID in flat or eos_id in flat:
        raise ValueError("Fixed text may hold neither padding (0) nor EOS.")
    return Infilling(jnp.array([*flat, eos_id], jnp.int32), spaced)


@flax.struct.dataclass
class PromptIntersection(Program):
    """The product of the model's distributions given several prompts.

    ``P(s) ~ prod_j p(s | prompt_j)``: text that continues all of them. The proposal is
    the normalised product: a step multiplies the weight by ``sum_v prod_j p_j(v)``.
    """

    num_contexts: int = flax.struct.field(pytree_node=False)  # prompts ``M``

    def proposal(self, state: State, context: Context) -> jax.Array:
        return only_eos_at_last(jnp.sum(context.logps, axis=0), context)

    def step(self, state, context, token, key):
        return state, jnp.sum(context.logps[1:, token]), False


@flax.struct.dataclass
class Potential(Program):
    """A reward: the target is ``p(s) exp(function(s))``."""

    # ``(tokens [T], length, done, prompt_id) -> scalar``, plain JAX, EOS counted in the
    # length; or a :func:`text_function`
    function: Callable[..., jax.Array] = flax.struct.field(pytree_node=False)

    def step(self, state, context, token, key):
        tokens = context.tokens.at[context.position].set(token)
        done = token == context.eos_id
        length = context.position + 1
        value = self.function(tokens, length, done, context.prompt_id)
        return state, jnp.where(done, value, 0.0), False


def text_function(
    function: Callable[[list[str], list[int]], Sequence[float]],
    vocabulary: Any,
) -> Callable[..., jax.Array]:
    """A :class:`Potential` function out of Python code that scores texts.

    ``function`` takes a list of finished texts, never empty, and the prompt ids that
    they answer; it returns a log-potential for each.
    """

    def on_host(*arrays):
        tokens, length, done, prompt_ids = map(np.asarray, arrays)
        values = np.zeros(done.shape, np.float32)
        if not done.any():
            return values
        texts = [
            vocabulary.decode(row[:n].tolist())
            for row, n in zip(tokens[done], length[done], strict=True)
        ]
        scores = np.asarray(function(texts, prompt_ids[done].tolist()), np.float32)
        if scores.shape != (len(texts),):
            raise ValueError(
                f"The potential must return one number for each of {len(texts)} texts, "
                f"got shape {scores.shape}."
            )
        values[done] = scores
        return values

    def potential(tokens, length, done, prompt_id):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(
            on_host, shape, tokens, length, done, prompt_id, vmap_method="broadcast_all"
        )

    return potential


@flax.struct.dataclass
class Product(Program):
    """Several programs at once: their potentials multiply.

    The proposal multiplies what each makes of the model, ``q ~ p prod_i (q_i / p)``.
    """

    programs: tuple[Program, ...]  # at most one may read more than one prompt

    @property
    def num_contexts(self) -> int:
        return max(program.num_contexts for program in self.programs)

    def init(self) -> State:
        return tuple(program.init() for program in self.programs)

    def proposal(self, state: State, context: Context) -> jax.Array:
        base = context.logps[0]
        held = base > -jnp.inf
        total = base
        for program, own in zip(self.programs, state, strict=True):
            # `held` on both sides: -inf minus -inf is no number.
            change = program.proposal(own, context) - jnp.where(held, base, 0.0)
            total = total + jnp.where(held, change, 0.0)
        return total

    def step(self, state, context, token, key):
        keys = jax.random.split(key, len(self.programs))
        log_g, done, states = jnp.float32(0.0), False, []
        for program, own, k in zip(self.programs, state, keys, strict=True):
            new, value, ends = program.step(own, context, token, k)
            states.append(new)
            log_g, done = log_g + value, done | ends
        return tuple(states), log_g, done
