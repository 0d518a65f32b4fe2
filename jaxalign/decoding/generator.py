"""Text in, text out: batches prompts of any length into few compiled shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from jaxalign.decoding.checks import check_constraint, check_sizes, check_uint32
from jaxalign.decoding.engine import Engine, Finished
from jaxalign.decoding.rules import PAD_ID, Constraint, Sampling
from jaxalign.decoding.stops import LOOK, Cut, Stops

# The smallest padded prompt length, and how many batches are sorted together: enough to
# find neighbours of equal length, few enough that results stream.
_SMALLEST_BUCKET = 16
_BATCHES_PER_WINDOW = 16


@dataclasses.dataclass(frozen=True)
class Generation:
    """The ``N`` samples of one prompt."""

    prompt_id: int  # as given; with the sample index and the seed it fixes the samples
    truncated: bool  # whether the prompt was longer than the limit
    # Decoded responses, up to and including the stop that ended them; None where other
    # rules left no way to meet the constraint.
    texts: list[str | None]
    # int32, EOS included where one came; of a response that a stop ended, those up to
    # the one that completed it. Below, float32 numbers of each.
    tokens: list[np.ndarray]
    logps: list[np.ndarray]  # under the model's full distribution
    sampler_logps: list[np.ndarray]  # under the distribution drawn from
    entropies: list[np.ndarray] | None = None  # of the full distribution

    @property
    def logp(self) -> np.ndarray:
        """``[N]`` log-probabilities of the whole responses, EOS included."""
        return np.array([logps.sum(dtype=np.float64) for logps in self.logps])


class _Prompt(NamedTuple):
    prompt_id: int
    tokens: np.ndarray
    truncated: bool
    prefixes: Sequence[Sequence[int]]


def prompt_bucket(length: int, limit: int) -> int:
    """The padded length of a prompt: a power of two, at most ``limit``.

    >>> [prompt_bucket(n, 100) for n in (3, 17, 64, 65)]
    [16, 32, 64, 100]
    """
    return min(max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


class Generator:
    """Samples responses to lists of tokenised prompts.

    Prompts are sorted by length inside windows and padded to power-of-two lengths, each
    of which has an `Engine`. Results come in the order of the prompts, whatever the
    batching. What is compiled for a length is reused over calls and over parameters.

    Arguments that are not named here are those of `Engine`.

    Args:
      vocabulary: decodes ids to text (``jaxalign.vocabularies``).
      max_prompt_length: tokens; longer prompts are cut and keep their EOS.
      num_samples: per prompt.
      batch_size: prompts decoded at a time.
      stop: texts that end a response and stay in it, whatever tokens spell them; of
        several the one that is completed first.
      seed: of the samples.
      sharding: where to put the prompts, e.g. a ``NamedSharding`` over the data axes,
        which must divide ``batch_size``; None leaves it to JAX.
      progress: show a bar; None: on a terminal only.
    """

    def __init__(
        self,
        model: Any,
        vocabulary: Any,
        *,
        max_prompt_length: int,
        max_new_tokens: int,
        num_samples: int = 1,
        sampling: Sampling | None = None,
        batch_size: int = 16,
        slots: int | None = None,
        stop: Sequence[str] = (),
        constraint: Constraint | None = None,
        entropy: bool = False,
        seed: int = 0,
        sharding: jax.sharding.Sharding | None = None,
        progress: bool | None = None,
    ):
        check_sizes(
            max_prompt_length=max_prompt_length,
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            batch_size=batch_size,
        )
        sampling = dataclasses.replace(sampling or Sampling(), eos_id=vocabulary.eos_id)
        self._engine = functools.partial(
            Engine,
            model,
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            slots=slots,
            sampling=sampling,
            constraint=constraint,
            entropy=entropy,
            sharding=sharding,
        )
        # tqdm's None: only on a terminal.
        disable = None if progress is None else not progress
        self._bar = functools.partial(
            tqdm.tqdm, desc="generate", unit="prompt", disable=disable
        )
        self._vocabulary = vocabulary
        self._max_prompt_length = max_prompt_length
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size
        self._stops = Stops(stop, vocabulary)
        self._constraint = constraint
        # On the host, where responses are judged.
        judges = hasattr(constraint, "accepts")
        self._judged = jax.device_get(constraint) if judges else None
        self._seed = seed
        self._sharding = sharding
        self.num_truncated = 0  # prompts cut so far

    def __call__(
        self,
        params: Any,
        prompts: Sequence[np.ndarray | Sequence[int]],
        *,
        prompt_ids: Sequence[int] | None = None,
        prefixes: Sequence[Sequence[Sequence[int]]] | None = None,
        start: int = 0,
    ) -> Iterator[Generation]:
        """Yields a ``Generation`` per prompt, in order.

        Args:
          params: the model's parameters.
          prompts: token ids, EOS included.
          prompt_ids: one integer in ``[0, 2**32)`` each; default: the position in
            ``prompts``. Give your own to sample a subset as in the whole list.
          prefixes: for each prompt and sample the tokens its response begins with.
          start: yield from this position on, with the numbers, to the bit, of a call
            that yields all.
        """
        ids = range(len(prompts)) if prompt_ids is None else list(prompt_ids)
        prefixes = [()] * len(prompts) if prefixes is None else prefixes
        for what, given in (("an id", ids), ("prefixes", prefixes)):
            if len(given) != len(prompts):
                raise ValueError(
                    f"Expected {what} for each of {len(prompts)} prompts, got "
                    f"{len(given)}."
                )
        for i, prompt_id in enumerate(ids):
            check_uint32(f"prompt_ids[{i}]", prompt_id)
        check_constraint(self._constraint, self._max_new_tokens, prefixes)
        cut = [
            _Prompt(ids[i], *self._cut(i, prompt), prefixes[i])
            for i, prompt in enumerate(prompts)
        ]
        # Not inside the generator function below: arguments are checked when called.
        return self._run(params, cut, start)

    def _cut(
        self, i: int, prompt: np.ndarray | Sequence[int]
    ) -> tuple[np.ndarray, bool]:
        """The tokens that are decoded of a prompt, and whether some were left out."""
        tokens = np.asarray(prompt, np.int32)
        if tokens.ndim != 1 or tokens.size == 0:
            raise ValueError(
                f"prompts[{i}] must be a non-empty vector of token ids, got shape "
                f"{tokens.shape}; an empty text still has its EOS (1)."
            )
        limit = self._vocabulary.vocab_size
        bad = tokens[(tokens <= PAD_ID) | (tokens >= limit)]
        if bad.size:
            raise ValueError(
                f"prompts[{i}] holds the id {bad[0]}; expected ids in [1, {limit}) "
                "(0 is padding). Was it made with another vocabulary?"
            )
        truncated = tokens.size > self._max_prompt_length
        if truncated:
            last = tokens[-1]
            tokens = tokens[: self._max_prompt_length].copy()
            if last == self._vocabulary.eos_id:
                tokens[-1] = last
        return tokens, truncated

    def _run(
        self, params: Any, prompts: Sequence[_Prompt], first: int
    ) -> Iterator[Generation]:
        # Few prompts do not pay for a whole batch; sharded batches keep their size, so
        # that it stays divisible.
        size = self._batch_size
        if self._sharding is None:
            size = min(size, 1 << max(len(prompts) - 1, 0).bit_length())
        prefixes = any(len(prompt.prefixes) for prompt in prompts)
        new_engine = functools.partial(
            self._engine, params, groups=size, prefixes=prefixes
        )
        window = self._batch_size * _BATCHES_PER_WINDOW
        new_tokens = 0
        with self._bar(total=len(prompts), initial=first) as bar:
            # What a window gives, to the bit, depends on its prompts only.
            for start in range(first // window * window, len(prompts), window):
                done: dict[int, Generation] = {}
                following = max(start, first)
                rows = enumerate(prompts[start : start + window], start)
                for i, finished in self._window(new_engine, dict(rows)):
                    if i < first:
                        continue
                    done[i] = self._generation(prompts[i], finished)
                    new_tokens += sum(map(len, done[i].tokens))
                    bar.update(1)
                    rate = new_tokens / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                    while following in done:
                        self.num_truncated += prompts[following].truncated
                        yield done.pop(following)
                        following += 1

    def _window(
        self, new_engine: Callable[..., Engine], prompts: dict[int, _Prompt]
    ) -> Iterator[tuple[int, Finished]]:
        """Everything of a window, length by length, as it finishes."""
        by_length: dict[int, list[int]] = {}
        for i, prompt in prompts.items():
            length = prompt_bucket(len(prompt.tokens), self._max_prompt_length)
            by_length.setdefault(length, []).append(i)
        # Longest first: memory runs out at once or not at all.
        for length in sorted(by_length, reverse=True):
            engine = new_engine(prompt_length=length)
            tickets = {}
            for i in by_length[length]:
                prompt_id, tokens, _, prefixes = prompts[i]
                ticket = engine.submit(
                    tokens, prompt_id=prompt_id, seed=self._seed, prefixes=prefixes
                )
                tickets[ticket] = i
            while engine.pending:
                for finished in engine.step(LOOK if self._stops else None):
                    yield tickets[finished.ticket], finished
                if self._stops:
                    for ticket, samples in engine.progress().items():
                        cuts = self._cuts(prompts[tickets[ticket]], samples)
                        for n, cut in enumerate(cuts):
                            if cut:
                                engine.end(ticket, n)

    def _cuts(
        self, prompt: _Prompt, samples: list[np.ndarray], final: bool = False
    ) -> list[Cut | None]:
        """Where stops end the samples of a prompt."""
        forced = [*map(len, prompt.prefixes), *[0] * len(samples)]
        return [
            self._stops.cut(tokens.tolist(), final, forced[n])
            for n, tokens in enumerate(samples)
        ]

    def _generation(self, prompt: _Prompt, finished: Finished) -> Generation:
        cuts = self._cuts(prompt, finished.tokens, final=True)

        def kept(arrays: list[np.ndarray]) -> list[np.ndarray]:
            """All of a response, or what leads up to its stop."""
            rows = zip(arrays, cuts, strict=True)
            return [a[: cut.tokens] if cut else a for a, cut in rows]

        tokens = kept(finished.tokens)
        texts = [
            cut.text if cut else self._vocabulary.decode(ids.tolist())
            for cut, ids in zip(cuts, tokens, strict=True)
        ]
        if self._judged is not None:
            fit = map(self._judged.accepts, tokens)
            texts = [text if ok else None for text, ok in zip(texts, fit, strict=True)]
        return Generation(
            prompt_id=finished.prompt_id,
            truncated=prompt.truncated,
            texts=texts,
            tokens=tokens,
            logps=kept(finished.logps),
            sampler_logps=kept(finished.sampler_logps),
            entropies=finished.entropies and kept(finished.entropies),
        )
