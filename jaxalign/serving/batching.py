"""Requests of many clients in few batches: one queue, one worker thread.

What generates is behind ``Backend``, which knows nothing of HTTP; what waits is sorted
into batches here. JAX is called from the worker thread alone.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxalign.decoding.generator import Generator
from jaxalign.decoding.sampling import Sampling

_log = logging.getLogger(__name__)

EOS_ID = 1


class Settings(NamedTuple):
    """What requests must share to be in one batch.

    Attributes:
      temperature: 0 takes the most probable tokens.
      top_p: keep so much probability.
    """

    temperature: float
    top_p: float


class Backend(Protocol):
    """What a server needs of an engine."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: Settings,
        *,
        max_new_tokens: int,
        num_samples: int,
    ) -> list[list[list[int]]]:
        """``num_samples`` responses to each prompt.

        Prompts and responses are token ids, EOS included where one came. A prompt's
        first ``k`` samples, and their first ``t`` tokens, depend on the prompt, its
        seed and the settings alone.
        """


class GeneratorBackend:
    """``jaxalign.decoding.Generator`` as a backend.

    Lengths and counts are rounded up to powers of two and cut afterwards, so that few
    shapes are ever compiled.

    Args:
      policy: a loaded checkpoint: ``model``, ``params``, ``vocabulary``.
      max_prompt_tokens: of a prompt, EOS included.
      batch_size: prompts at a time.
    """

    def __init__(self, policy: Any, *, max_prompt_tokens: int, batch_size: int = 16):
        self._policy = policy
        self._max_prompt_tokens = max_prompt_tokens
        self._batch_size = batch_size

    def generate(self, prompts, seeds, settings, *, max_new_tokens, num_samples):
        generator = Generator(
            self._policy.model,
            self._policy.vocabulary,
            max_prompt_length=self._max_prompt_tokens,
            max_new_tokens=_power_of_two(max_new_tokens),
            num_samples=_power_of_two(num_samples),
            sampling=Sampling(settings.temperature, top_p=settings.top_p),
            batch_size=self._batch_size,
            progress=False,
        )
        prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
        found = generator(self._policy.params, prompts, prompt_ids=seeds)
        return [
            [tokens[:max_new_tokens].tolist() for tokens in g.tokens[:num_samples]]
            for g in found
        ]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


class QueueFull(Exception):
    """More requests wait than the server holds."""


class EngineFailed(Exception):
    """The backend raised; the cause is in the log."""


@dataclasses.dataclass(eq=False)
class Work:
    """One request: prompts that are answered together.

    Attributes:
      prompts: token ids, EOS included.
      seeds: one for each prompt.
      settings: see ``Settings``.
      max_new_tokens: of a response.
      num_samples: per prompt.
    """

    prompts: list[list[int]]
    seeds: list[int]
    settings: Settings
    max_new_tokens: int
    num_samples: int
    future: asyncio.Future = dataclasses.field(init=False)
    loop: asyncio.AbstractEventLoop = dataclasses.field(init=False)
    cancelled: bool = dataclasses.field(init=False, default=False)


class Batcher:
    """Collects waiting requests of equal settings into batches.

    Args:
      backend: what generates.
      batch_size: prompts of a batch; a larger request is a batch of its own.
      max_waiting: requests in the queue; more are refused.

    Attributes:
      running: requests in the batch that the worker is at.
    """

    def __init__(self, backend: Backend, *, batch_size: int, max_waiting: int):
        self._backend = backend
        self._batch_size = batch_size
        self._max_waiting = max_waiting
        self._waiting: collections.deque[Work] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self.running = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    async def submit(self, work: Work) -> list[list[list[int]]]:
        """Waits for the responses; cancelling the wait takes the request back.

        Raises:
          QueueFull: when too many wait already.
          EngineFailed: when there will be no responses.
        """
        work.loop = asyncio.get_running_loop()
        work.future = work.loop.create_future()
        with self._changed:
            if self._closed or len(self._waiting) >= self._max_waiting:
                raise QueueFull
            self._waiting.append(work)
            self._changed.notify()
        try:
            return await work.future
        finally:
            # Answered or given up: in both cases nobody waits for it any more.
            with self._changed:
                work.cancelled = True
                if work in self._waiting:
                    self._waiting.remove(work)

    def close(self) -> None:
        """Ends the worker after the batch it is at; those that wait get an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _next_batch(self) -> list[Work]:
        """The oldest request and others like it; empty when closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return []
            first = self._waiting.popleft()
            batch, size = [first], len(first.prompts)
            for work in list(self._waiting):
                same = work.settings == first.settings
                if same and size + len(work.prompts) <= self._batch_size:
                    self._waiting.remove(work)
                    batch.append(work)
                    size += len(work.prompts)
            self.running = len(batch)
            return batch

    def _work(self) -> None:
        while batch := self._next_batch():
            try:
                answers = self._answers(batch)
            # Whatever goes wrong concerns this batch; the worker has to live on.
            except Exception:
                _log.exception("A batch of %d requests failed.", len(batch))
                answers = [EngineFailed("The server failed; see its log.")] * len(batch)
            self.running = 0
            for work, answer in zip(batch, answers, strict=True):
                _deliver(work, answer)
        with self._changed:
            left, self._waiting = list(self._waiting), collections.deque()
        for work in left:
            _deliver(work, EngineFailed("The server is shutting down."))

    def _answers(self, batch: list[Work]) -> list[list[list[list[int]]]]:
        found = self._backend.generate(
            [prompt for work in batch for prompt in work.prompts],
            [seed for work in batch for seed in work.seeds],
            batch[0].settings,
            max_new_tokens=max(work.max_new_tokens for work in batch),
            num_samples=max(work.num_samples for work in batch),
        )
        answers, at = [], 0
        for work in batch:
            own = found[at : at + len(work.prompts)]
            answers.append(
                [
                    [tokens[: work.max_new_tokens] for tokens in s[: work.num_samples]]
                    for s in own
                ]
            )
            at += len(work.prompts)
        return answers


def _deliver(work: Work, answer: Any) -> None:
    def settle():
        if work.future.done():
            return
        if isinstance(answer, Exception):
            work.future.set_exception(answer)
        else:
            work.future.set_result(answer)

    if work.cancelled:
        return
    try:
        work.loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the server's loop has ended
        _log.warning("A response came after the server had stopped.")
