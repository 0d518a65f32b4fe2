"""`jaxalign.decoding.Engine` behind the server's ``Backend``."""

from __future__ import annotations

import collections
import functools
import itertools
from typing import Any, NamedTuple

from jaxalign.decoding.engine import Engine
from jaxalign.decoding.generator import prompt_bucket
from jaxalign.serving.batching import Samples, Settings

_TOKENS_PER_STEP = 8  # between two looks at who came and who left
_SLOTS = 8  # samples of a prompt decoded at a time, where several are asked for


_Kind = tuple[int, int]  # the longest prompt, the most samples


class _Waiting(NamedTuple):
    """A prompt that has no engine yet."""

    ticket: int
    kind: _Kind
    request: dict[str, Any]  # of `Engine.submit`


class EngineBackend:
    """One engine per class of prompt lengths, made when first needed.

    Temperature, top-p, lengths and numbers of samples are data to an engine, so that
    nothing is compiled for them; a first prompt of a new length class compiles.

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
      max_engine_bytes: of device memory that engines hold together; no bound if None.
        One engine is kept whatever it holds.
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
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._tickets = itertools.count()
        self._inner: dict[int, tuple[_Kind, int]] = {}
        self._outer: dict[tuple[_Kind, int], int] = {}

    def _engine(self, kind: _Kind) -> Engine | None:
        """The engine of a kind; None while there is no room for it."""
        engine = self._engines.pop(kind, None)
        while engine is None and self._engines and self._full(kind):
            if not self._evict():
                return None
        if engine is None:
            length, samples = kind
            engine = self._new_engine(
                prompt_length=length, num_samples=samples, slots=min(samples, _SLOTS)
            )
            self._bytes[kind] = engine.nbytes
        self._engines[kind] = engine
        # How much one holds is known when it is there.
        while len(self._engines) > 1 and self._too_many_bytes(0):
            if not self._evict(but=kind):
                break
        return engine

    def _full(self, kind: _Kind) -> bool:
        one_more = len(self._engines) + 1 > self._max_engines
        return one_more or self._too_many_bytes(self._bytes.get(kind, 0))

    def _too_many_bytes(self, more: int) -> bool:
        limit = self._max_bytes
        return limit is not None and self.engine_bytes + more > limit

    def _evict(self, but: _Kind | None = None) -> bool:
        """Drops the engine that has been idle longest; False if none is idle."""
        for kind, engine in self._engines.items():
            if kind != but and not engine.pending:
                del self._engines[kind]
                return True
        return False

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
        request = {
            "tokens": prompt,
            "prompt_id": 0,
            "seed": seed,
            "num_samples": num_samples,
            "max_new_tokens": max_new_tokens,
            **settings._asdict(),
        }
        self._queue.append(_Waiting(ticket, kind, request))
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
            inner = engine.submit(**request)
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
        self._queue = collections.deque(w for w in self._queue if w.ticket != ticket)
        if ticket in self._inner:
            kind, inner = self._inner.pop(ticket)
            del self._outer[kind, inner]
            self._engines[kind].cancel(inner)
