"""A checkpoint of this library as a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxalign.decoding import Generator, Sampling
from jaxalign.decoding.stops import Stops
from jaxalign.training import checkpoints


class CheckpointTeacher:
    """Samples from the policy of a run directory, loaded when it is first asked."""

    def __init__(self, path: str, batch_size: int = 16):
        self.path, self.batch_size = path, batch_size
        self.fingerprint = f"policy:{checkpoints.fingerprint(path)}"
        self._policy: Any = None

    def generate(
        self,
        prompts: Sequence[str],
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[list[str | None]]:
        """``n`` samples of each prompt, cut before the first stop."""
        self._policy = self._policy or checkpoints.load(self.path)
        vocabulary = self._policy.vocabulary
        tokens = [[*vocabulary.encode(p), vocabulary.eos_id] for p in prompts]
        generator = Generator(
            self._policy.model,
            vocabulary,
            max_prompt_length=max(map(len, tokens), default=1),
            max_new_tokens=max_tokens,
            num_samples=n,
            sampling=Sampling(temperature, top_p=top_p),
            batch_size=self.batch_size,
            seed=seed,
            stop=stop,
        )
        stops = Stops(stop, vocabulary)
        return [
            [stops.before(text) for text in generation.texts]
            for generation in generator(self._policy.params, tokens)
        ]
