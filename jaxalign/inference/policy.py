"""A language model of a checkpoint in Python: ``jaxalign.load("flan-t5-small")``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxalign.cluster import mesh as meshes
from jaxalign.decoding import Sampling
from jaxalign.inference import convert, generation
from jaxalign.inference import score as scores
from jaxalign.training import checkpoints


class Policy:
    """A policy that samples and scores texts.

    Args:
      path: a jaxalign run or one of its checkpoints, a Hugging Face folder, or a T5X
        checkpoint, here or in a bucket.
      mesh: sizes ``{"data", "fsdp", "tensor"}`` of the devices that it is spread over;
        one device by default.

    Attributes:
      network: model, parameters, vocabulary and ``meta``, for use with
        `jaxalign.models` and `jaxalign.training`.

    Example::

        policy = jaxalign.load("flan-t5-small")
        policy.generate(["translate English to German: Good morning."], num_samples=4)
        policy.score(["2 + 2 ="], ["4"])
        policy.save("out", format="hf")
    """

    def __init__(self, path: str | Path, mesh: Mapping[str, int] | None = None):
        self._name = Path(path).name
        self._mesh = meshes.named_mesh(mesh) if mesh else None
        self._rows = meshes.batch_sharding(self._mesh) if self._mesh else None
        self.network = checkpoints.newest(path, mesh=self._mesh)
        if self.network.vocabulary is None:
            raise ValueError(
                f"{path} has no tokenizer that is at hand: convert it with one, or put "
                "the SentencePiece file where its config.gin says."
            )

    def __repr__(self) -> str:
        return f"Policy({str(self.network.path)!r})"

    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_samples: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
        batch_size: int = 16,
    ) -> list[list[str]]:
        """Samples responses.

        Args:
          prompts: texts.
          num_samples: responses to each.
          temperature: 0 takes the most probable token.
          top_k: keep so many tokens; 0 keeps all.
          top_p: keep so much probability.
          max_new_tokens: of a response, EOS included.
          stop: texts that end a response.
          seed: of the samples; the same seed gives the same texts.
          batch_size: prompts at a time; changes no text.

        Returns:
          ``num_samples`` texts of each prompt.
        """
        found = generation.sample(
            self.network,
            prompts,
            num_samples=num_samples,
            sampling=Sampling(temperature, top_k, top_p),
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            batch_size=batch_size,
            sharding=self._rows,
        )
        return [list(generated.texts) for generated in found]

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], *, batch_size: int = 16
    ) -> list[float]:
        """``log p(response | prompt)`` of each pair, EOS included, in nats."""
        pairs = list(zip(prompts, responses, strict=True))
        logps, _ = scores.score_pairs(
            self.network, pairs, batch_size=batch_size, sharding=self._rows
        )
        return logps.tolist()

    def save(
        self, path: str | Path, format: str = "hf", dtype: str = "float32"
    ) -> None:
        """Writes it for others to read.

        Args:
          path: a folder that is not there yet.
          format: ``"hf"``, a folder for ``from_pretrained``, ``"t5x"``, or
            ``"jaxalign"``, a run directory.
          dtype: ``"float32"`` or ``"bfloat16"``.

        Raises:
          FileExistsError: when something is there.
          ValueError: for another format.
        """
        network = self.network
        convert.write(
            path,
            format,
            network.params,
            network.model,
            network.vocabulary,
            network.meta,
            name=network.name,
            dtype=dtype,
            made_from=self._name,
        )
