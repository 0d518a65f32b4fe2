"""Continuous decoding: prompts come in at any time, finished ones go out.

An `Engine` keeps ``groups`` prompts decoding on the devices. A prompt that has all its
samples makes room for a waiting one while the others go on, so that ragged lengths
waste few steps. Driving it, from a server or a loop over a file::

    engine = Engine(model, params, prompt_length=128, max_new_tokens=64)
    ticket = engine.submit(tokens, prompt_id=7)     # any time; never blocks
    while engine.pending:
        for finished in engine.step(max_steps=16):  # blocks for at most 16 tokens
            ...                                     # finished.ticket, .tokens, .logps
    engine.cancel(ticket)                           # its place is free at once

It is not thread-safe: call it from one thread. Over several processes, every process
makes the same calls in the same order; what they decide on are replicated numbers, so
they stay in step. Everything compiled depends on the sizes given here, the rules and
the model, never on what is submitted.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.decoding import loop
from jaxalign.decoding.generate import check_constraint, pad_prefixes, prompt_keys
from jaxalign.decoding.loop import Constraint, Groups, Requests, State
from jaxalign.decoding.sampling import PAD_ID, RowSettings, Sampling


@dataclasses.dataclass(frozen=True)
class Finished:
    """All samples of one submitted prompt, without padding.

    Attributes:
      ticket: what ``submit`` returned.
      prompt_id: as submitted.
      tokens: an int32 array per sample, EOS included where one came.
      logps: a float32 array per sample, the model's full distribution.
      sampler_logps: the distribution drawn from.
      entropies: of the full distribution, or None.
    """

    ticket: int
    prompt_id: int
    tokens: list[np.ndarray]
    logps: list[np.ndarray]
    sampler_logps: list[np.ndarray]
    entropies: list[np.ndarray] | None


@dataclasses.dataclass(frozen=True)
class _Request:
    ticket: int
    tokens: np.ndarray
    prompt_id: int
    num_samples: int
    max_new_tokens: int
    seed: int
    prefixes: Sequence[Sequence[int]]
    temperature: float
    top_p: float


@dataclasses.dataclass(frozen=True)
class _Setup:
    """What the compiled functions are specialised to."""

    model: Any
    groups: int
    slots: int
    admit: int
    num_samples: int
    max_new_tokens: int
    prompt_length: int
    rules: Sampling
    prefixes: bool
    entropy: bool
    per_prompt: bool
    sharding: jax.sharding.Sharding | None

    def place(self, state: State) -> State:
        """Groups over the sharding's axes, so that every call returns what it got."""
        if self.sharding is None:
            return state
        groups, cache = jax.lax.with_sharding_constraint(
            (state.groups, state.cache), self.sharding
        )
        return State(state.cursor, cache, groups)

    def encode(
        self, params: Any, requests: Requests, constraint: Constraint | None
    ) -> Groups:
        return loop.new_groups(
            self.model,
            params,
            requests,
            slots=self.slots,
            num_samples=self.num_samples,
            length=self.max_new_tokens,
            rules=self.rules,
            constraint=constraint,
            entropy=self.entropy,
        )


@functools.partial(jax.jit, static_argnames="setup")
def _empty(setup: _Setup, params: Any, requests: Any, constraint: Any) -> State:
    """A state of groups that hold no prompt."""
    one = jax.eval_shape(setup.encode, params, requests, constraint)

    def blank(leaf):
        shape = (setup.groups, *leaf.shape[1:])
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), shape)
        return jnp.zeros(shape, leaf.dtype)

    groups = jax.tree.map(blank, one)
    groups = groups._replace(ended=jnp.ones_like(groups.ended))
    return setup.place(loop.begin(setup.model, groups))


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="state")
def _admit(
    setup: _Setup,
    params: Any,
    state: State,
    requests: Requests,
    where: jax.Array,
    constraint: Constraint | None,
) -> State:
    new = setup.encode(params, requests, constraint)
    return setup.place(loop.seat(state, new, where))


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="state")
def _run(
    setup: _Setup,
    params: Any,
    state: State,
    constraint: Constraint | None,
    dropped: jax.Array,
    ended: jax.Array,
    max_steps: jax.Array,
    stop_when_free: jax.Array,
) -> tuple[State, jax.Array]:
    groups = loop.drop(state.groups, dropped)
    state = state._replace(groups=loop.end(groups, ended, constraint))
    state = loop.run(
        setup.model,
        params,
        state,
        setup.rules,
        constraint,
        max_steps=max_steps,
        stop_when_free=stop_when_free,
    )
    return setup.place(state), loop.free_groups(state.groups)


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array on every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class Engine:
    """Decodes submitted prompts; see the module's docstring.

    Args:
      model: a ``jaxalign.models.T5``, or anything with its decoding methods.
      params: its parameters, on any sharding.
      prompt_length: the longest prompt, in tokens; all are padded to it. Its cost is
        attention over the padding: use one engine per length class where they differ
        much.
      max_new_tokens: the longest response, EOS and forced prefix included.
      num_samples: the most samples of one prompt.
      groups: prompts decoded at a time; divisible by the sharding's devices.
      slots: samples of a prompt decoded at a time; default: all ``num_samples``.
      admit: prompts encoded together; new ones are seated when so many groups are
        free. ``groups`` means waiting for the longest; default: an eighth of them.
      sampling: the rules.
      constraint: which tokens may come next, for all rows.
      prefixes: whether prompts may come with forced prefixes.
      entropy: whether to record entropies.
      per_prompt: whether each prompt comes with a temperature and a top-p of its own,
        in place of those of ``sampling``; nothing is compiled for them.
      sharding: of the groups axis, e.g. a ``NamedSharding`` over the data axes.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        *,
        prompt_length: int,
        max_new_tokens: int,
        num_samples: int = 1,
        groups: int = 16,
        slots: int | None = None,
        admit: int | None = None,
        sampling: Sampling | None = None,
        constraint: Constraint | None = None,
        prefixes: bool = False,
        entropy: bool = False,
        per_prompt: bool = False,
        sharding: jax.sharding.Sharding | None = None,
    ):
        sizes = {
            "prompt_length": prompt_length,
            "max_new_tokens": max_new_tokens,
            "num_samples": num_samples,
            "groups": groups,
            "slots": num_samples if slots is None else slots,
            "admit": max(1, groups // 8) if admit is None else admit,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if sharding is not None:
            try:
                sharding.shard_shape((groups,))
            except ValueError as error:
                raise ValueError(
                    f"groups={groups} prompts at a time (batch_size) do not divide "
                    f"over {sharding}; choose a multiple of its devices."
                ) from error
        sizes["slots"] = min(sizes["slots"], num_samples)
        sizes["admit"] = min(sizes["admit"], groups)
        self._setup = _Setup(
            model=model,
            rules=Sampling() if sampling is None else sampling,
            prefixes=prefixes,
            entropy=entropy,
            per_prompt=per_prompt,
            sharding=sharding,
            **sizes,
        )
        self._params = params
        self._constraint = constraint
        self._checked: set[int] = set()  # lengths in which the constraint can be met
        self._waiting: collections.deque[_Request] = collections.deque()
        self._seated: dict[int, _Request] = {}  # by group
        self._cancelled: set[int] = set()  # groups
        self._ended: set[tuple[int, int]] = set()  # groups and their samples
        self._tickets = 0
        self._state: State = _empty(
            self._setup, params, self._requests([])[0], constraint
        )

    @property
    def pending(self) -> int:
        """Prompts submitted and neither finished nor cancelled."""
        return len(self._waiting) + len(self._seated) - len(self._cancelled)

    @property
    def nbytes(self) -> int:
        """Of device memory that the engine holds beside the parameters."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))

    def submit(
        self,
        tokens: Sequence[int] | np.ndarray,
        *,
        prompt_id: int,
        num_samples: int | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        prefixes: Sequence[Sequence[int]] = (),
        temperature: float | None = None,
        top_p: float | None = None,
    ) -> int:
        """Queues a prompt and returns its ticket.

        Args:
          tokens: ids, EOS included.
          prompt_id: in ``[0, 2**32)``; with ``seed`` and the sample's index it decides
            the samples, whatever else is decoded beside them.
          num_samples: of this prompt; default: the engine's.
          max_new_tokens: of this prompt; default: the engine's.
          seed: in ``[0, 2**32)``.
          prefixes: the tokens that each sample begins with.
          temperature: of this prompt, 0 for greedy; default: the rules'.
          top_p: of this prompt; default: the rules'.

        Raises:
          ValueError: naming what does not fit.
        """
        setup = self._setup
        tokens = np.asarray(tokens, np.int32)
        if tokens.ndim != 1 or not 1 <= tokens.size <= setup.prompt_length:
            raise ValueError(
                f"A prompt must have 1 to {setup.prompt_length} tokens (prompt_length),"
                f" got shape {tokens.shape}."
            )
        if (tokens <= PAD_ID).any():
            raise ValueError("A prompt must not hold ids below 1 (0 is padding).")
        wanted = {
            "num_samples": (num_samples, setup.num_samples),
            "max_new_tokens": (max_new_tokens, setup.max_new_tokens),
        }
        chosen = {}
        for name, (value, limit) in wanted.items():
            chosen[name] = limit if value is None else int(value)
            if not 1 <= chosen[name] <= limit:
                raise ValueError(f"{name} must lie in [1, {limit}], got {value}.")
        for name, value in {"prompt_id": prompt_id, "seed": seed}.items():
            if not 0 <= value < 2**32:
                raise ValueError(f"{name} must lie in [0, 2**32), got {value}.")
        if len(prefixes):
            if not setup.prefixes:
                raise ValueError("Prefixes need an Engine made with prefixes=True.")
            pad_prefixes([prefixes], setup.num_samples, chosen["max_new_tokens"])
        if self._constraint is not None:
            limit = chosen["max_new_tokens"]
            if len(prefixes) or limit not in self._checked:
                check_constraint(self._constraint, limit, [prefixes])
            self._checked.add(limit)
        rules = setup.rules
        if not setup.per_prompt and (temperature, top_p) != (None, None):
            raise ValueError(
                "A temperature or top_p of one prompt needs an Engine made with "
                "per_prompt=True."
            )
        own = Sampling(  # checks both
            rules.temperature if temperature is None else temperature,
            top_p=rules.top_p if top_p is None else top_p,
        )
        self._tickets += 1
        self._waiting.append(
            _Request(
                ticket=self._tickets,
                tokens=tokens,
                prompt_id=int(prompt_id),
                seed=int(seed),
                prefixes=prefixes,
                temperature=own.temperature,
                top_p=own.top_p,
                **chosen,
            )
        )
        return self._tickets

    def cancel(self, ticket: int) -> bool:
        """Forgets a prompt; False if it has finished already."""
        for request in self._waiting:
            if request.ticket == ticket:
                self._waiting.remove(request)
                return True
        for group, request in self._seated.items():
            if request.ticket == ticket and group not in self._cancelled:
                self._cancelled.add(group)
                return True
        return False

    def end(self, ticket: int, sample: int) -> bool:
        """Ends one sample of a prompt where it stands; False if there is none.

        Its slot is free at once. The prompt finishes when all its samples have ended;
        this one keeps the tokens that it has.
        """
        for group, request in self._seated.items():
            if request.ticket == ticket and group not in self._cancelled:
                if not 0 <= sample < request.num_samples:
                    return False
                self._ended.add((group, sample))
                return True
        return False

    def step(self, max_steps: int | None = None) -> list[Finished]:
        """Decodes until some prompts have finished.

        Args:
          max_steps: return after so many tokens at the latest, finished or not.

        Returns:
          The prompts that finished, in no particular order; empty when none did, or
          nothing is pending.
        """
        setup = self._setup
        self._seat_waiting()
        if not self._seated:
            return []
        dropped = np.zeros(setup.groups, bool)
        dropped[list(self._cancelled)] = True
        ended = np.zeros((setup.groups, setup.num_samples), bool)
        for group, sample in self._ended:
            ended[group, sample] = True
        # Stop when a batch of waiting prompts can be seated; with nobody waiting, as
        # soon as one is done.
        empty = setup.groups - len(self._seated)
        wanted = max(1, min(setup.admit, len(self._waiting)))
        self._state, free = _run(
            setup,
            self._params,
            self._state,
            self._constraint,
            dropped,
            ended,
            np.int32(2**30 if max_steps is None else max_steps),
            np.int32(max(wanted, empty + 1)),
        )
        free = to_host(free)
        done = [g for g in self._seated if free[g]]
        finished = []
        if any(g not in self._cancelled for g in done):
            samples = jax.tree.map(to_host, self._state.groups.samples)
            finished = [
                self._finish(self._seated[g], g, samples)
                for g in done
                if g not in self._cancelled
            ]
        for group in done:
            del self._seated[group]
        self._cancelled.clear()  # all of them are free now
        self._ended.clear()
        return finished

    def progress(self) -> dict[int, list[np.ndarray]]:
        """What the prompts being decoded have so far: tokens per sample, by ticket."""
        samples = self._state.groups.samples
        tokens, lengths = to_host(samples.tokens), to_host(samples.lengths)
        return {
            request.ticket: [
                tokens[group, n, : lengths[group, n]].copy()
                for n in range(request.num_samples)
            ]
            for group, request in self._seated.items()
            if group not in self._cancelled
        }

    def _seat_waiting(self) -> None:
        setup = self._setup
        while self._waiting:
            free = [g for g in range(setup.groups) if g not in self._seated]
            batch = min(setup.admit, len(self._waiting))
            if len(free) < batch:
                return
            taken = [self._waiting.popleft() for _ in range(batch)]
            requests, where = self._requests(taken)
            where[:batch] = free[:batch]
            self._state = _admit(
                setup, self._params, self._state, requests, where, self._constraint
            )
            self._seated.update(zip(free, taken, strict=False))

    def _requests(self, batch: list[_Request]) -> tuple[Requests, np.ndarray]:
        """Arrays of a batch, and places outside of the state for what is missing."""
        setup = self._setup
        size = setup.admit
        tokens = np.full((size, setup.prompt_length), PAD_ID, np.int32)
        numbers = np.zeros((4, size), np.uint32)
        for row, request in enumerate(batch):
            tokens[row, : request.tokens.size] = request.tokens
            numbers[:, row] = (
                request.seed,
                request.prompt_id,
                request.num_samples,
                request.max_new_tokens,
            )
        planned = lengths = None
        if setup.prefixes:
            rows = [request.prefixes for request in batch]
            planned, lengths = pad_prefixes(
                [*rows, *[()] * (size - len(rows))],
                setup.num_samples,
                setup.max_new_tokens,
            )
        settings = None
        if setup.per_prompt:
            asked = np.ones((2, size), np.float32)
            for row, request in enumerate(batch):
                asked[:, row] = request.temperature, request.top_p
            settings = RowSettings(*asked)
        requests = Requests(
            tokens=tokens,
            keys=_request_keys(numbers[0], numbers[1]),
            num_samples=numbers[2].astype(np.int32),
            max_new_tokens=numbers[3].astype(np.int32),
            prefixes=planned,
            prefix_lengths=lengths,
            settings=settings,
        )
        return requests, np.full(size, setup.groups, np.int32)

    def _finish(self, request: _Request, group: int, samples: Any) -> Finished:
        lengths = samples.lengths[group, : request.num_samples]

        def trim(array):
            return [row[:n].copy() for row, n in zip(array[group], lengths)]  # noqa: B905

        return Finished(
            ticket=request.ticket,
            prompt_id=request.prompt_id,
            tokens=trim(samples.tokens),
            logps=trim(samples.logps),
            sampler_logps=trim(samples.sampler_logps),
            entropies=None if samples.entropies is None else trim(samples.entropies),
        )


@jax.jit
def _request_keys(seeds: jax.Array, prompt_ids: jax.Array) -> jax.Array:
    def one(seed, prompt_id):
        return prompt_keys(jax.random.key(seed), prompt_id[None])[0]

    return jax.vmap(one)(seeds, prompt_ids)
