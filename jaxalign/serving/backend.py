"""`jaxalign.decoding.Engine` behind the server's ``Backend``."""

from __future__ import annotations

import collections
import functools
import itertools
import math
from typing import Any

from jaxalign.decoding.engine import Engine
from jaxalign.decoding.generator import prompt_bucket
from jaxalign.decoding.rules import Sampling
from jaxalign.serving.batching import Samples, Settings

_TOKENS_PER_STEP = 8  # between two looks at who came and who left
_SLOTS = 8  # samples of a prompt decoded at a time, where several are asked for


_Kind = tuple[int, int]  # the longest prompt, the most samples


class EngineBackend:
    """One engine per class of prompt lengths, compiled when first needed.

    An engine holds device memory, for its caches of keys and values. Where there is no
    room for one more, that which has been idle longest goes; what was compiled for it
    stays. Where none is idle, prompts wait in the order in which they came.

    Args:
      policy: a loaded checkpoint: ``model`` and ``params``.
      max_prompt_tokens: of a prompt, EOS included.
      max_new_tokens: of a response.
      max_samples: of a prompt.
      batch_size: prompts decoded at a time, in each engine.
      max_engines: at a time.
      max_engine_bytes: of all of them, if there are several; no bound if None.
    """

    def __init__(
        self,
        policy: Any,
        *,
        max_prompt_tokens: int,
        max_new_tokens: int,
        max_samples: int = 64,
        batch_size: int = 16,
        max_engines: int = 4,
        max_engine_bytes: int | None = None,
    ):
        if max_engines < 1:
            raise ValueError(f"max_engines must be at least 1, got {max_engines}.")
        self._new_engine = functools.partial(
            Engine,
            policy.model,
            policy.params,
            max_new_tokens=max_new_tokens,
            groups=batch_size,
            admit=1,
            sampling=Sampling(eos_id=policy.vocabulary.eos_id),
            per_prompt=True,
        )
        self._max_prompt_tokens = max_prompt_tokens
        self._max_samples = max_samples
        self._max_engines = max_engines
        self._max_bytes = max_engine_bytes
        self._bytes: dict[_Kind, int] = {}  # of each kind seen so far
        self.reset()

    @property
    def engines(self) -> int:
        """How many there are."""
        return len(self._engines)

    @property
    def engine_bytes(self) -> int:
        """Of device memory that engines hold."""
        return sum(self._bytes[kind] for kind in list(self._engines))

    def reset(self) -> None:
        # The one that was used last is the last.
        self._engines: dict[_Kind, Engine] = {}
        # Prompts that have no engine yet: ticket, kind, call.
        self._queue: collections.deque[tuple[int, _Kind, Any]] = collections.deque()
        self._tickets = itertools.count()
        self._inner: dict[int, tuple[_Kind, int]] = {}
        self._outer: dict[tuple[_Kind, int], int] = {}

    def _engine(self, kind: _Kind) -> Engine | None:
        """The engine of a kind; None while there is no room for it."""
        engine = self._engines.pop(kind, None)
        if engine is None:
            if not self._make_room(kind):
                return None
            length, samples = kind
            engine = self._new_engine(
                prompt_length=length, num_samples=samples, slots=min(samples, _SLOTS)
            )
            self._bytes[kind] = engine.nbytes
        self._make_room(kind)  # how much one holds is known when it is there
        self._engines[kind] = engine
        return engine

    def _make_room(self, kind: _Kind) -> bool:
        """Drops idle engines, the longest idle first, until one of a kind fits."""
        most = math.inf if self._max_bytes is None else self._max_bytes
        more = self._bytes.get(kind, 0)
        while self._engines and (
            len(self._engines) >= self._max_engines or self.engine_bytes + more > most
        ):
            idle = next((k for k, e in self._engines.items() if not e.pending), None)
            if idle is None:
                return False
            del self._engines[idle]
        return True

    def submit(
        self,
        prompt: list[int],
        seed: int,
        settings: Settings,
        *,
        max_new_tokens: int,
        num_samples: int,
    ) -> int:
        length = prompt_bucket(len(prompt), self._max_prompt_tokens)
        # Slots for several samples would idle where one is asked for.
        kind = (length, 1 if num_samples == 1 else self._max_samples)
        ticket = next(self._tickets)
        request = functools.partial(
            Engine.submit,
            tokens=prompt,
            prompt_id=0,
            seed=seed,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            **settings._asdict(),
        )
        self._queue.append((ticket, kind, request))
        self._seat()
        return ticket

    def _seat(self) -> None:
        """Hands prompts to their engines, none before one that came earlier."""
        while self._queue:
            ticket, kind, request = self._queue[0]
            engine = self._engine(kind)
            if engine is None:
                return
            self._queue.popleft()
            inner = request(engine)
            self._inner[ticket] = (kind, inner)
            self._outer[kind, inner] = ticket

    def step(self) -> dict[int, Samples]:
        self._seat()
        found = {}
        for kind, engine in self._engines.items():
            if not engine.pending:
                continue
            for finished in engine.step(max_steps=_TOKENS_PER_STEP):
                ticket = self._outer.pop((kind, finished.ticket))
                del self._inner[ticket]
                found[ticket] = [tokens.tolist() for tokens in finished.tokens]
        return found

    def progress(self) -> dict[int, Samples]:
        return {
            self._outer[kind, inner]: [tokens.tolist() for tokens in samples]
            for kind, engine in self._engines.items()
            if engine.pending
            for inner, samples in engine.progress().items()
        }

    def end(self, ticket: int, sample: int) -> None:
        if ticket in self._inner:
            kind, inner = self._inner[ticket]
            self._engines[kind].end(inner, sample)

    def cancel(self, ticket: int) -> None:
        self._queue = collections.deque(w for w in self._queue if w[0] != ticket)
        if ticket in self._inner:
            kind, inner = self._inner.pop(ticket)
            del self._outer[kind, inner]
            self._engines[kind].cancel(inner)
