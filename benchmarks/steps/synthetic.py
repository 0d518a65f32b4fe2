"""Batches without padding, of random tokens: the densest work a configuration has."""

from __future__ import annotations

import numpy as np

from jaxalign import batch as batches
from jaxalign import data
from jaxalign.data.convert import empty_batch
from jaxalign.data.plan import Placement
from jaxalign.objectives import Objective
from jaxalign.planning import programs
from jaxalign.training.run import Run

_EOS = 1


def batch(run: Run, objective: Objective, seed: int = 0) -> dict[str, np.ndarray]:
    """A global batch in which every position holds a token.

    Args:
      run: gives the batch size, the lengths, the packing and the responses to each
        prompt, which are as many as the decoder rows.
      objective: what they are for.
      seed: of tokens, rewards, labels and reference log-probabilities.

    Returns:
      Arrays of `jaxalign.batch.COLUMNS`, the objective's columns included.
    """
    rng = np.random.default_rng(seed)
    shape = programs.row_shape(run, objective)
    lengths = run.dataset.feature_lengths
    cached = run.reference == "cached"
    columns = batches.extra(objective.columns, "pass") if cached else ()
    per_prompt, count = shape.decoder_rows, shape.prompts

    def ids(length: int) -> np.ndarray:
        tokens = rng.integers(2, run.model.config.vocab_size, length, dtype=np.int32)
        tokens[-1] = _EOS
        return tokens

    out = empty_batch(shape, run.dataset.batch_size, columns)
    for i in range(run.dataset.batch_size):
        rows = [
            data.Row(
                key=f"{i}-{j}",
                prompts=[ids(lengths["inputs"])],
                responses=[ids(lengths["targets"]) for _ in range(per_prompt)],
                response_prompt=[0] * per_prompt,
                response_kind=[batches.ANSWER] * per_prompt,
                response_reward=rng.normal(size=per_prompt).tolist(),
                response_label=rng.integers(0, 2, per_prompt).tolist(),
                pairs=[(0, 1, 0.0)] if objective.schema == "preference" else [],
            )
            for j in range(count)
        ]
        placement = Placement(
            i * count + np.arange(count),
            np.tile(np.arange(per_prompt), count),
            lengths["inputs"],
            lengths["targets"],
        )
        data.to_arrays(
            rows,
            placement,
            shape,
            {c: rng.normal(-50.0, 5.0, count * per_prompt) for c in columns},
            out={name: array[i] for name, array in out.items()},
        )
    return out


def real_tokens(batch: dict[str, np.ndarray]) -> int:
    """Prompt and response tokens of a batch, padding not counted.

    >>> real_tokens({"encoder_segment_ids": np.array([[1, 1, 0]]),
    ...              "decoder_segment_ids": np.array([[[1, 0, 0]]])})
    3
    """
    return int(
        np.count_nonzero(batch["encoder_segment_ids"])
        + np.count_nonzero(batch["decoder_segment_ids"])
    )
