"""`jaxalign.decoding.Engine` behind the server's ``Backend``."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from jaxalign.decoding.engine import Engine
from jaxalign.decoding.generator import prompt_bucket
from jaxalign.serving.batching import Samples, Settings

_TOKENS_PER_STEP = 8  # between two looks at who came and who left
_SLOTS = 8  # samples of a prompt decoded at a time, where several are asked for


class EngineBackend:
    """One engine per class of prompt lengths, made when first needed.

    Temperature, top-p, lengths and numbers of samples are data to an engine, so that
    nothing is compiled for them; a first prompt of a new length class compiles.

    Args:
      policy: a loaded checkpoint: ``model``, ``params``, ``vocabulary``.
      max_prompt_tokens: of a prompt, EOS included.
      max_new_tokens: of a response.
      max_samples: of a prompt.
      batch_size: prompts decoded at a time, in each engine.
    """

    def __init__(
        self,
        policy: Any,
        *,
        max_prompt_tokens: int,
        max_new_tokens: int,
        max_samples: int = 64,
        batch_size: int = 16,
    ):
        self._policy = policy
        self._max_prompt_tokens = max_prompt_tokens
        self._max_new_tokens = max_new_tokens
        self._max_samples = max_samples
        self._batch_size = batch_size
        self.reset()

    def reset(self) -> None:
        self._engines: dict[tuple[int, int], Engine] = {}
        self._tickets = itertools.count()
        self._inner: dict[int, tuple[tuple[int, int], int]] = {}
        self._outer: dict[tuple[tuple[int, int], int], int] = {}

    def _engine(self, kind: tuple[int, int]) -> Engine:
        if kind not in self._engines:
            length, samples = kind
            self._engines[kind] = Engine(
                self._policy.model,
                self._policy.params,
                prompt_length=length,
                max_new_tokens=self._max_new_tokens,
                num_samples=samples,
                groups=self._batch_size,
                slots=min(samples, _SLOTS),
                admit=1,
                per_prompt=True,
            )
        return self._engines[kind]

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
        inner = self._engine(kind).submit(
            np.asarray(prompt, np.int32),
            prompt_id=0,
            seed=seed,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        ticket = next(self._tickets)
        self._inner[ticket] = (kind, inner)
        self._outer[kind, inner] = ticket
        return ticket

    def step(self) -> dict[int, Samples]:
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
        if ticket in self._inner:
            kind, inner = self._inner.pop(ticket)
            del self._outer[kind, inner]
            self._engines[kind].cancel(inner)
