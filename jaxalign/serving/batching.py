"""Requests of many clients in one decoding loop: one queue, one worker thread.

Requests join the loop as soon as there is room, whatever their settings, and leave it
when they have ended, when their client has left, or with the loop. What generates is
behind ``Backend``, which knows nothing of HTTP; JAX is called from the worker thread
alone.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any, NamedTuple, Protocol

from jaxalign.decoding.rules import EOS_ID
from jaxalign.decoding.stops import Cut, Stops

_log = logging.getLogger(__name__)

Samples = list[list[int]]  # token ids, EOS included where one came


class Settings(NamedTuple):
    """How tokens are drawn."""

    temperature: float  # 0 takes the most probable tokens
    top_p: float  # keep so much probability


class Backend(Protocol):
    """What a server needs of an engine; called from one thread."""

    def submit(
        self,
        prompt: list[int],
        seed: int,
        settings: Settings,
        *,
        max_new_tokens: int,
        num_samples: int,
    ) -> int:
        """Begins a prompt, whose samples depend on these alone; returns its ticket."""

    def step(self) -> dict[int, Samples]:
        """Decodes a few tokens of everything; the samples of what has ended."""

    def progress(self) -> dict[int, Samples]:
        """What has not ended has so far; tickets that have nothing may lack."""

    def cancel(self, ticket: int) -> None:
        """Forgets a prompt."""

    # Optional: ``end(ticket, sample)``, after which a sample that holds a stop decodes
    # no further while the prompt's others go on. Without it its tokens are dropped.

    def reset(self) -> None:
        """Forgets everything, after a failure."""


class EngineFailed(Exception):
    """The backend raised; the cause is in the log."""


@dataclasses.dataclass(eq=False)
class Work:
    """One request: prompts that are answered together."""

    prompts: list[list[int]]  # token ids, EOS included
    seeds: list[int]  # one for each prompt
    settings: Settings
    max_new_tokens: int  # of a response
    num_samples: int  # per prompt
    stream: bool = False  # whether to tell the tokens as they come
    include_usage: bool = False  # and how many they were
    # texts that end a response; its tokens are those up to the stop's last
    stops: Stops | None = None
    eos_id: int = EOS_ID  # the token that ends a sample, the vocabulary's
    tickets: list[int] = dataclasses.field(init=False, default_factory=list)
    answers: dict[int, Samples] = dataclasses.field(init=False, default_factory=dict)
    # From the worker: samples so far, at last (True, samples) or an exception.
    updates: asyncio.Queue = dataclasses.field(init=False)
    loop: asyncio.AbstractEventLoop = dataclasses.field(init=False)
    cancelled: bool = dataclasses.field(init=False, default=False)

    def ended(self, tokens: list[int]) -> bool:
        """Whether a sample that has these tokens gets no more."""
        return self.eos_id in tokens or len(tokens) >= self.max_new_tokens


class Batcher:
    """Feeds requests to a backend in the order in which they came.

    A request larger than `batch_size` prompts runs when there is any room, and fills
    the backend's own queue.
    """

    def __init__(self, backend: Backend, *, batch_size: int, max_waiting: int):
        self._backend = backend
        self._batch_size = batch_size
        self._max_waiting = max_waiting
        self._waiting: collections.deque[Work] = collections.deque()
        self._running: list[Work] = []  # changed by the worker alone
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def load(self) -> dict[str, int]:
        """How many requests are being decoded, and how many are in the queue."""
        return {"running": len(self._running), "waiting": len(self._waiting)}

    def enqueue(self, work: Work) -> bool:
        """Puts a request into the queue, from the event loop; False if it is full."""
        work.loop = asyncio.get_running_loop()
        work.updates = asyncio.Queue()
        with self._changed:
            if self._closed or len(self._waiting) >= self._max_waiting:
                return False
            self._waiting.append(work)
            self._changed.notify()
        return True

    async def updates(self, work: Work) -> AsyncIterator[tuple[bool, list[Samples]]]:
        """``(whether that is all, samples of each prompt)``, as they come.

        Without ``work.stream`` only the last one comes. Leaving early takes the request
        back. EngineFailed says that there will be no more.
        """
        try:
            while True:
                update = await work.updates.get()
                if isinstance(update, Exception):
                    raise update
                yield update
                if update[0]:
                    return
        finally:
            with self._changed:
                work.cancelled = True
                if work in self._waiting:
                    self._waiting.remove(work)
                self._changed.notify()

    def close(self) -> None:
        """Ends the worker after a few tokens; whoever waits gets an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _admitted(self) -> list[Work] | None:
        """Requests that there is room for; None when closed."""
        with self._changed:
            while not (self._waiting or self._running or self._closed):
                self._changed.wait()
            if self._closed:
                return None
            room = self._batch_size - sum(
                len(work.prompts) - len(work.answers) for work in self._running
            )
            new = []
            while self._waiting and room > 0:
                new.append(self._waiting.popleft())
                room -= len(new[-1].prompts)
            self._running = [*self._running, *new]
            return new

    def _work(self) -> None:
        while (new := self._admitted()) is not None:
            try:
                for work in new:
                    self._begin(work)
                for work in self._running:
                    if work.cancelled:
                        for ticket in work.tickets:
                            self._backend.cancel(ticket)
                self._running = [w for w in self._running if not w.cancelled]
                if self._running:
                    self._step()
            # Whatever goes wrong concerns what runs now; the worker has to live on.
            except Exception:
                _log.exception("Decoding %d requests failed.", len(self._running))
                self._end(EngineFailed("The server failed; see its log."))
                self._backend.reset()
        with self._changed:
            self._running = [*self._running, *self._waiting]
            self._waiting.clear()
        self._end(EngineFailed("The server is shutting down."))

    def _begin(self, work: Work) -> None:
        sizes = {n: getattr(work, n) for n in ("max_new_tokens", "num_samples")}
        for prompt, seed in zip(work.prompts, work.seeds, strict=True):
            ticket = self._backend.submit(prompt, seed, work.settings, **sizes)
            work.tickets.append(ticket)

    def _step(self) -> None:
        finished = self._backend.step()
        looking = any(work.stream or work.stops for work in self._running)
        so_far = self._backend.progress() if looking else {}
        going_on = []
        for work in self._running:
            new = {t: finished[t] for t in work.tickets if t in finished}
            work.answers |= new
            if work.stops:
                self._stop(work, new, so_far)
            done = len(work.answers) == len(work.tickets)
            if done or work.stream:
                found = {**so_far, **work.answers}
                nothing = [[] for _ in range(work.num_samples)]
                _publish(work, (done, [found.get(t, nothing) for t in work.tickets]))
            if not done:
                going_on.append(work)
        self._running = going_on

    def _stop(
        self, work: Work, new: dict[int, Samples], so_far: dict[int, Samples]
    ) -> None:
        """Cuts samples that hold a stop; nothing more is decoded for them."""
        for ticket, samples in new.items():
            cuts = [work.stops.cut(tokens, final=True) for tokens in samples]
            work.answers[ticket] = _kept(samples, cuts)
        for ticket in work.tickets:
            if ticket in work.answers or ticket not in so_far:
                continue
            samples = so_far[ticket]
            ended = [work.ended(tokens) for tokens in samples]
            cuts = list(map(work.stops.cut, samples, ended))
            so_far[ticket] = _kept(samples, cuts)
            stopped = [n for n, cut in enumerate(cuts) if cut and not ended[n]]
            if stopped and all(c or e for c, e in zip(cuts, ended, strict=True)):
                self._backend.cancel(ticket)
                work.answers[ticket] = so_far[ticket]
            elif stopped and (end := getattr(self._backend, "end", None)):
                for n in stopped:
                    end(ticket, n)

    def _end(self, error: Exception) -> None:
        for work in self._running:
            _publish(work, error)
        self._running = []


def _kept(samples: Samples, cuts: list[Cut | None]) -> Samples:
    """The tokens up to each sample's stop, or all of them."""
    return [t[: c.tokens] if c else t for t, c in zip(samples, cuts, strict=True)]


def _publish(work: Work, what: Any) -> None:
    if work.cancelled:
        return
    try:
        work.loop.call_soon_threadsafe(work.updates.put_nowait, what)
    except RuntimeError:  # the server's loop has ended
        _log.warning("A response came after the server had stopped.")
