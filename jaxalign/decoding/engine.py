"""Continuous decoding: prompts come in at any time, finished ones go out.

An `Engine` keeps ``groups`` prompts decoding on the devices. A prompt that has all its
samples makes room for a waiting one while the others go on, so that ragged lengths
waste few steps. docs/decoding.md has an example.

It is not thread-safe: call it from one thread. Over several processes, every process
makes the same calls in the same order; what they decide on are replicated numbers, so
they stay in step. Everything compiled depends on the sizes given here, the rules and
the model, never on what is submitted.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.decoding import checks, seats
from jaxalign.decoding.groups import Plan, Requests
from jaxalign.decoding.rules import PAD_ID, Constraint, Sampling
from jaxalign.decoding.sampling import RowSettings


@dataclasses.dataclass(frozen=True)
class Finished:
    """All samples of one submitted prompt, without padding."""

    ticket: int  # what ``submit`` returned
    prompt_id: int  # as submitted
    tokens: list[np.ndarray]  # an int32 array per sample, EOS included where one came
    logps: list[np.ndarray]  # a float32 array per sample, the model's full distribution
    sampler_logps: list[np.ndarray]  # the distribution drawn from
    entropies: list[np.ndarray] | None  # of the full distribution, or None


class _Request(NamedTuple):
    """What was submitted, checked; see `Engine.submit`."""

    ticket: int
    tokens: np.ndarray
    prompt_id: int
    num_samples: int
    max_new_tokens: int
    seed: int
    prefixes: Sequence[Sequence[int]]
    temperature: float
    top_p: float


def _to_host(array: jax.Array) -> np.ndarray:
    """The whole array on every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class Engine:
    """Decodes submitted prompts; see the module's docstring.

    Args:
      model: a ``jaxalign.models.EncoderDecoder``.
      params: its parameters, on any sharding.
      prompt_length: the longest prompt, in tokens; all are padded to it, which costs
        attention: use one engine per length class where they differ much.
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
        slots = num_samples if slots is None else slots
        admit = max(1, groups // 8) if admit is None else admit
        checks.check_sizes(
            prompt_length=prompt_length,
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            groups=groups,
            slots=slots,
            admit=admit,
        )
        if sharding is not None:
            try:
                sharding.shard_shape((groups,))
            except ValueError as error:
                raise ValueError(
                    f"groups={groups} prompts at a time (batch_size) do not divide "
                    f"over {sharding}; choose a multiple of its devices."
                ) from error
        self._plan = Plan(
            model=model,
            rules=Sampling() if sampling is None else sampling,
            slots=min(slots, num_samples),
            num_samples=num_samples,
            length=max_new_tokens,
            entropy=entropy,
            groups=groups,
            sharding=sharding,
        )
        self._prompt_length = prompt_length
        self._admit = min(admit, groups)
        self._prefixes = prefixes
        self._per_prompt = per_prompt
        self._params = params
        self._constraint = constraint
        self._checked: set[int] = set()  # lengths in which the constraint can be met
        self._waiting: collections.deque[_Request] = collections.deque()
        self._seated: dict[int, _Request] = {}  # by group
        self._cancelled: set[int] = set()  # groups
        self._ended: set[tuple[int, int]] = set()  # groups and their samples
        self._tickets = 0
        self._state = seats.empty(self._plan, params, self._arrays([]), constraint)

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
        plan, rules = self._plan, self._plan.rules
        tokens = np.asarray(tokens, np.int32)
        if tokens.ndim != 1 or not 1 <= tokens.size <= self._prompt_length:
            raise ValueError(
                f"A prompt must have 1 to {self._prompt_length} tokens (prompt_length),"
                f" got shape {tokens.shape}."
            )
        if (tokens <= PAD_ID).any():
            raise ValueError("A prompt must not hold ids below 1 (0 is padding).")
        num_samples = plan.num_samples if num_samples is None else num_samples
        max_new_tokens = plan.length if max_new_tokens is None else max_new_tokens
        checks.check_within("num_samples", num_samples, 1, plan.num_samples)
        checks.check_within("max_new_tokens", max_new_tokens, 1, plan.length)
        checks.check_uint32("prompt_id", prompt_id)
        checks.check_uint32("seed", seed)
        if len(prefixes):
            if not self._prefixes:
                raise ValueError("Prefixes need an Engine made with prefixes=True.")
            checks.pad_prefixes(
                [prefixes], plan.num_samples, max_new_tokens, plan.rules.eos_id
            )
        if len(prefixes) or max_new_tokens not in self._checked:
            checks.check_constraint(self._constraint, max_new_tokens, [prefixes])
            self._checked.add(max_new_tokens)
        if not self._per_prompt and (temperature, top_p) != (None, None):
            raise ValueError(
                "A temperature or top_p of one prompt needs an Engine made with "
                "per_prompt=True."
            )
        own = Sampling(  # checks both
            rules.temperature if temperature is None else temperature,
            top_p=rules.top_p if top_p is None else top_p,
        )
        self._tickets += 1
        sizes = num_samples, max_new_tokens
        self._waiting.append(
            _Request(
                *(self._tickets, tokens, int(prompt_id), *sizes, int(seed), prefixes),
                *(own.temperature, own.top_p),
            )
        )
        return self._tickets

    def _decoded(self) -> dict[int, tuple[int, _Request]]:
        """The groups and requests of prompts being decoded, by ticket."""
        return {
            request.ticket: (group, request)
            for group, request in self._seated.items()
            if group not in self._cancelled
        }

    def cancel(self, ticket: int) -> bool:
        """Forgets a prompt; False if it has finished already."""
        waiting = [r for r in self._waiting if r.ticket != ticket]
        if len(waiting) < len(self._waiting):
            self._waiting = collections.deque(waiting)
            return True
        group, _ = self._decoded().get(ticket, (None, None))
        if group is not None:
            self._cancelled.add(group)
        return group is not None

    def end(self, ticket: int, sample: int) -> bool:
        """Ends one sample of a prompt where it stands; False if there is none.

        Its slot is free at once. The prompt finishes when all its samples have ended;
        this one keeps the tokens that it has.
        """
        group, request = self._decoded().get(ticket, (None, None))
        if request is None or not 0 <= sample < request.num_samples:
            return False
        self._ended.add((group, sample))
        return True

    def step(self, max_steps: int | None = None) -> list[Finished]:
        """Decodes until some prompts have finished, or for ``max_steps`` tokens.

        Returns:
          The prompts that finished, in no particular order; empty when none did, or
          nothing is pending.
        """
        self._seat_waiting()
        if not self._seated:
            return []
        groups = self._plan.groups
        dropped = np.zeros(groups, bool)
        dropped[list(self._cancelled)] = True
        ended = np.zeros((groups, self._plan.num_samples), bool)
        for group, sample in self._ended:
            ended[group, sample] = True
        # Stop when a batch of waiting prompts can be seated; with nobody waiting, as
        # soon as one is done.
        empty = groups - len(self._seated)
        wanted = max(1, min(self._admit, len(self._waiting)))
        self._state, free = seats.run(
            self._plan,
            self._params,
            self._state,
            self._constraint,
            dropped,
            ended,
            np.int32(2**30 if max_steps is None else max_steps),
            np.int32(max(wanted, empty + 1)),
        )
        free = _to_host(free)
        done = [(g, r) for g, r in self._decoded().values() if free[g]]
        self._seated = {g: r for g, r in self._seated.items() if not free[g]}
        self._cancelled.clear()  # all of them are free now
        self._ended.clear()
        if not done:
            return []
        samples = jax.tree.map(_to_host, self._state.groups.samples)
        return [self._finish(r, g, samples) for g, r in done]

    def progress(self) -> dict[int, list[np.ndarray]]:
        """What the prompts being decoded have so far: tokens per sample, by ticket."""
        samples = self._state.groups.samples
        tokens, lengths = _to_host(samples.tokens), _to_host(samples.lengths)
        return {
            ticket: _trimmed(tokens[group], lengths[group], request.num_samples)
            for ticket, (group, request) in self._decoded().items()
        }

    def _seat_waiting(self) -> None:
        while self._waiting:
            free = [g for g in range(self._plan.groups) if g not in self._seated]
            count = min(self._admit, len(self._waiting))
            if len(free) < count:
                return
            taken = [self._waiting.popleft() for _ in range(count)]
            # Outside of the state for the rows that hold no request.
            index = np.full(self._admit, self._plan.groups, np.int32)
            index[:count] = free[:count]
            args = self._state, self._arrays(taken), index, self._constraint
            self._state = seats.admit(self._plan, self._params, *args)
            self._seated.update(zip(free, taken, strict=False))

    def _arrays(self, batch: list[_Request]) -> Requests:
        plan, size = self._plan, self._admit
        tokens = np.full((size, self._prompt_length), PAD_ID, np.int32)
        for row, request in enumerate(batch):
            tokens[row, : request.tokens.size] = request.tokens

        def column(name: str, dtype: Any, missing: float = 0) -> np.ndarray:
            values = [getattr(request, name) for request in batch]
            return np.array(values + [missing] * (size - len(batch)), dtype)

        planned = lengths = settings = None
        if self._prefixes:
            rows = [request.prefixes for request in batch]
            rows += [()] * (size - len(rows))
            planned, lengths = checks.pad_prefixes(
                rows, plan.num_samples, plan.length, plan.rules.eos_id
            )
        if self._per_prompt:
            settings = RowSettings(
                column("temperature", np.float32, 1), column("top_p", np.float32, 1)
            )
        return Requests(
            tokens=tokens,
            keys=seats.request_keys(
                column("seed", np.uint32), column("prompt_id", np.uint32)
            ),
            num_samples=column("num_samples", np.int32),
            max_new_tokens=column("max_new_tokens", np.int32),
            prefixes=planned,
            prefix_lengths=lengths,
            settings=settings,
        )

    def _finish(self, request: _Request, group: int, samples: Any) -> Finished:
        rows = jax.tree.map(lambda x: x[group], samples)._asdict()
        lengths = rows.pop("lengths")
        found = {
            name: None if x is None else _trimmed(x, lengths, request.num_samples)
            for name, x in rows.items()
        }
        return Finished(request.ticket, request.prompt_id, **found)


def _trimmed(rows: np.ndarray, lengths: np.ndarray, count: int) -> list[np.ndarray]:
    return [rows[n, : lengths[n]].copy() for n in range(count)]
