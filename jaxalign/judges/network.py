"""Judges that are networks of a checkpoint; of these the likelihood of responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import batch as batches
from jaxalign import models
from jaxalign.evaluation.judging import Metadata
from jaxalign.judges.template import Template
from jaxalign.training import checkpoints, scoring

_BATCH_SIZE = 16

_Forward = Callable[[Any, Any, batches.Batch], jax.Array]


class NetworkJudge:
    """Scores by a forward pass of a network, loaded when it is first asked.

    Args:
      path: a run directory or one of its checkpoints.
      kind: what is read off, for the fingerprint.
      forward: ``(model, params, response batch) -> [B, R]``.
      template: what the encoder reads instead of the prompt, without EOS unless it
        says ``eos: 1`` at its head; then the decoder is given nothing to read.
      network: of the checkpoint; None: its main one.
      max_length: tokens of the template's text, EOS counted whether it is kept or not;
        longer texts are cut at their end. 0: none is.

    Raises:
      FileNotFoundError: for a checkpoint that is not there.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        forward: _Forward,
        template: Template | None = None,
        network: str | None = "policy",
        max_length: int = 0,
    ):
        self._path, self._function, self._template = path, forward, template
        self._network, self._max_length = network, max_length
        self._loaded: Any = None
        self._forward: Any = None  # the function of what is loaded, compiled once
        self.fingerprint = f"{kind}:{checkpoints.fingerprint(path, network)}"
        if template is not None:
            self.fingerprint += f"#{template.fingerprint}"

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        metadata: Metadata | None = None,
    ) -> np.ndarray:
        """Float32 ``[n]``; nothing is truncated, but for a template's `max_length`.

        Raises:
          ValueError: when a number is not finite: the parameters are damaged.
        """
        self.load()
        about = metadata or [None] * len(prompts)
        pairs = [
            self._texts(prompt, response, more)
            for prompt, response, more in zip(prompts, responses, about, strict=True)
        ]
        if not pairs:
            return np.zeros(0, np.float32)
        return scoring.score_texts(
            self._forward,
            self._loaded.params,
            self._loaded.vocabulary,
            *zip(*pairs, strict=True),
            batch_size=_BATCH_SIZE,
            title=self._path,
        )

    def load(self) -> checkpoints.Network:
        """What it scores with, read when it is first asked for."""
        if self._loaded is None:
            self._loaded = checkpoints.newest(self._path, self._network)
            self._forward = self._bound(self._loaded)
        return self._loaded

    def _bound(self, loaded: checkpoints.Network) -> scoring.Function:
        """The function of what is loaded."""
        return lambda params, batch: self._function(loaded.model, params, batch)

    def _texts(self, prompt: str, response: str, more: Any) -> tuple[Any, Any]:
        """What encoder and decoder read, as `scoring.score_texts` takes it."""
        if self._template is None:
            return prompt, response
        vocabulary = self._loaded.vocabulary
        eos = [vocabulary.eos_id]
        text = self._template.fill(more, prompt=prompt, response=response)
        ids = vocabulary.encode(text)
        if self._max_length:
            ids = ids[: self._max_length - 1]
        return ids + (eos if self._template.number("eos", 0) else []), eos


def likelihood(text: str) -> NetworkJudge:
    """``likelihood:PATH``, summed over tokens, EOS included; ``#mean`` divides by them.

    Raises:
      ValueError: for another word after ``#``.
    """
    path, _, read = text.partition("#")
    if read not in ("", "sum", "mean"):
        raise ValueError(
            f"likelihood:{text} asks for {read!r}; expected likelihood:{path} or "
            f"likelihood:{path}#mean, per token."
        )

    def forward(model: Any, params: Any, batch: batches.Batch) -> jax.Array:
        logps = models.response_logps(model, params, batch)
        if read == "mean":
            logps /= jnp.maximum(batches.response_lengths(batch), 1.0)
        return logps

    kind = "mean likelihood" if read == "mean" else "likelihood"
    return NetworkJudge(path, kind, forward)
