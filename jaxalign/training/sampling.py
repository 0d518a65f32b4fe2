"""Text sampled during training, for people to read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign import batch as batches
from jaxalign.data.cuts import cut_prompt
from jaxalign.data.jsonl import json_line
from jaxalign.decoding import Generator, Sampling
from jaxalign.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws a few responses to held-out prompts, the same prompts every time.

    Attributes:
      num_prompts: how many prompts of the held-out split (else of the training split).
      max_new_tokens: tokens of a response, EOS included.
      temperature: as `top_k` and `top_p`, of `jaxalign.decoding.Sampling`.
    """

    num_prompts: int = 8
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def write(self, path: Path, ready: Any, params: Any, seed: int) -> dict[str, float]:
        """Writes JSON lines ``{"prompt", "response", "target", "logp", "num_tokens"}``.

        Args:
          ready: the run's `Setup`.
          seed: of the samples; the same at every step, so that what changes between
            two files is the policy.

        Returns:
          ``samples/length``, the mean number of tokens.
        """
        feed = ready.inputs.evaluation or ready.inputs.train
        cache, plan = feed.caches[0], feed.plans[0]
        vocabulary = ready.inputs.vocabulary
        rows = [cache[i] for i in range(min(self.num_prompts, len(cache)))]
        generator = Generator(
            ready.objective.model,
            vocabulary,
            max_prompt_length=plan.inputs,
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(self.temperature, self.top_k, self.top_p),
            batch_size=max(len(rows), 1),
            seed=seed,
            progress=False,
        )
        lines = []
        prompts = [cut_prompt(r.prompts[0], plan.inputs, plan.cut.inputs) for r in rows]
        generations = generator(params, prompts)
        for row, generation in zip(rows, generations, strict=True):
            answer = row.responses[list(row.response_kind).index(batches.ANSWER)]
            lines.append(
                {
                    "prompt": vocabulary.decode(row.prompts[0]),
                    "response": generation.texts[0],
                    "target": vocabulary.decode(answer),
                    "logp": float(generation.logp[0]),
                    "num_tokens": len(generation.tokens[0]),
                }
            )
        if jax.process_index() == 0:
            write_atomically(path, "".join(map(json_line, lines)))
        return {"samples/length": float(np.mean([x["num_tokens"] for x in lines]))}
