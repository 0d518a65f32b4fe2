"""Text in, text out: batches prompts of any length into few compiled shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from jaxalign.decoding.generate import EOS_ID, PAD_ID, Samples, generate
from jaxalign.decoding.sampling import Sampling

# The smallest padded prompt length, and how many batches are sorted together: enough to
# find neighbours of equal length, few enough that results stream.
_SMALLEST_BUCKET = 16
_BATCHES_PER_WINDOW = 32


@dataclasses.dataclass(frozen=True)
class Generation:
    """The samples of one prompt.

    Attributes:
      prompt_id: as given; with the sample index and the seed it fixes the samples.
      truncated: whether the prompt was longer than the limit.
      texts: ``N`` decoded responses.
      tokens: ``N`` int32 arrays, EOS included where one came.
      logps: ``N`` float32 arrays, the model's full distribution, one number a token.
      sampler_logps: ``N`` float32 arrays, the distribution drawn from.
    """

    prompt_id: int
    truncated: bool
    texts: list[str]
    tokens: list[np.ndarray]
    logps: list[np.ndarray]
    sampler_logps: list[np.ndarray]

    @property
    def logp(self) -> np.ndarray:
        """``[N]`` log-probabilities of the whole responses, EOS included."""
        return np.array([logps.sum(dtype=np.float64) for logps in self.logps])


def prompt_bucket(length: int, limit: int) -> int:
    """The padded length of a prompt: a power of two, at most ``limit``.

    >>> [prompt_bucket(n, 100) for n in (3, 17, 64, 65)]
    [16, 32, 64, 100]
    """
    return min(max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


def _to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class Generator:
    """Samples responses to lists of tokenised prompts.

    Prompts are sorted by length inside windows, padded to power-of-two lengths and to
    whole batches; results come in the order of the prompts, whatever the batching. The
    function compiled for a shape is reused over calls and over parameters.

    Args:
      model: a ``jaxalign.models.T5``.
      vocabulary: decodes ids to text (``jaxalign.vocabularies``).
      max_prompt_length: tokens; longer prompts are cut and keep their EOS.
      max_new_tokens: tokens of a response, EOS included.
      num_samples: per prompt.
      sampling: temperature and truncation; greedy with temperature 0.
      batch_size: prompts per batch (each with ``num_samples`` rows).
      seed: of the samples.
      sharding: where to put the prompt tokens ``[B, Le]``, e.g. a ``NamedSharding``
        over the data axes, which must divide ``batch_size``; None leaves it to JAX.
      progress: show a bar; None: on a terminal only.

    Attributes:
      num_truncated: prompts cut so far.
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
        seed: int = 0,
        sharding: jax.sharding.Sharding | None = None,
        progress: bool | None = None,
    ):
        sizes = {
            "max_prompt_length": max_prompt_length,
            "max_new_tokens": max_new_tokens,
            "num_samples": num_samples,
            "batch_size": batch_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        self._model = model
        self._vocabulary = vocabulary
        self._max_prompt_length = max_prompt_length
        self._max_new_tokens = max_new_tokens
        self._num_samples = num_samples
        self._sampling = Sampling() if sampling is None else sampling
        self._batch_size = batch_size
        self._key = jax.random.key(seed)
        self._sharding = sharding
        self._progress = progress
        self.num_truncated = 0

    def __call__(
        self,
        params: Any,
        prompts: Sequence[np.ndarray | Sequence[int]],
        *,
        prompt_ids: Sequence[int] | None = None,
    ) -> Iterator[Generation]:
        """Yields a ``Generation`` per prompt, in order.

        Args:
          params: the model's parameters.
          prompts: token ids, EOS included.
          prompt_ids: one integer in ``[0, 2**32)`` each; default: the position in
            ``prompts``. Give your own to sample a subset as in the whole list.

        Raises:
          ValueError: naming the prompt that is empty or holds an impossible id.
        """
        ids = range(len(prompts)) if prompt_ids is None else list(prompt_ids)
        if len(ids) != len(prompts):
            raise ValueError(
                f"Expected an id for each of {len(prompts)} prompts, got {len(ids)}."
            )
        for i, prompt_id in enumerate(ids):
            if not 0 <= prompt_id < 2**32:
                raise ValueError(
                    f"prompt_ids[{i}] must lie in [0, 2**32), got {prompt_id}."
                )
        cut = [self._cut(i, prompt) for i, prompt in enumerate(prompts)]
        # Not inside the generator function below: arguments are checked when called.
        return self._run(params, cut, ids)

    def _cut(self, i: int, prompt: np.ndarray | Sequence[int]) -> tuple:
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
            ends = tokens[-1] == EOS_ID
            tokens = tokens[: self._max_prompt_length].copy()
            if ends:
                tokens[-1] = EOS_ID
        return tokens, truncated

    def _run(self, params: Any, cut: list[tuple], ids: Sequence[int]):
        # Few prompts do not pay for a whole batch; sharded batches keep their size, so
        # that it stays divisible.
        size = self._batch_size
        if self._sharding is None:
            size = min(size, 1 << max(len(cut) - 1, 0).bit_length())
        window = size * _BATCHES_PER_WINDOW
        # tqdm's None: only on a terminal.
        disable = None if self._progress is None else not self._progress
        with tqdm.tqdm(
            total=len(cut), desc="generate", unit="prompt", disable=disable
        ) as bar:
            new_tokens = 0
            for start in range(0, len(cut), window):
                rows = range(start, min(start + window, len(cut)))
                # Longest first: memory runs out at once or not at all.
                order = sorted(rows, key=lambda i: -len(cut[i][0]))
                done: dict[int, Generation] = {}
                for at in range(0, len(order), size):
                    batch = order[at : at + size]
                    for i, generation in self._batch(params, cut, ids, batch, size):
                        done[i] = generation
                        new_tokens += sum(len(t) for t in generation.tokens)
                    bar.update(len(batch))
                    rate = new_tokens / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{rate:.0f} tokens/s")
                self.num_truncated += sum(cut[i][1] for i in rows)
                yield from (done[i] for i in rows)

    def _batch(self, params, cut, ids, batch: list[int], size: int):
        length = prompt_bucket(len(cut[batch[0]][0]), self._max_prompt_length)
        tokens = np.full((size, length), PAD_ID, np.int32)
        prompt_ids = np.zeros(size, np.uint32)
        for row, i in enumerate(batch):
            tokens[row, : len(cut[i][0])] = cut[i][0]
            prompt_ids[row] = ids[i]
        placed = tokens
        if self._sharding is not None:
            placed = jax.make_array_from_callback(
                tokens.shape, self._sharding, lambda index: tokens[index]
            )
        samples = generate(
            self._model,
            params,
            placed,
            key=self._key,
            prompt_ids=prompt_ids,
            num_samples=self._num_samples,
            max_new_tokens=self._max_new_tokens,
            sampling=self._sampling,
        )
        host = Samples(*map(_to_host, samples))
        for row, i in enumerate(batch):
            yield i, self._generation(ids[i], cut[i][1], host, row)

    def _generation(self, prompt_id, truncated, host: Samples, row: int) -> Generation:
        def trim(array):
            pairs = zip(array[row], host.lengths[row], strict=True)
            return [values[:length].copy() for values, length in pairs]

        tokens = trim(host.tokens)
        return Generation(
            prompt_id=int(prompt_id),
            truncated=truncated,
            texts=[self._vocabulary.decode(t.tolist()) for t in tokens],
            tokens=tokens,
            logps=trim(host.logps),
            sampler_logps=trim(host.sampler_logps),
        )
