"""``jaxalign score``: log-probabilities of a file's completions, or a judge's scores.

A checkpoint carries its network's shape and its vocabulary, so that its path is enough.
The same command, started again after a kill, goes on where it last saved.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign import batch as batches
from jaxalign import models, remote
from jaxalign.cluster import exclusive
from jaxalign.data import chat_template as chat_templates
from jaxalign.files import json_sha256
from jaxalign.inference import generation, judged, outputs
from jaxalign.inference.evaluation import write_jsonl
from jaxalign.training import checkpoints, scoring


@exclusive.one_output_at_a_time
def score(
    *,
    checkpoint: str | None = None,
    judge: str | None = None,
    data: str,
    output: str,
    batch_size: int = 16,
    mesh: Mapping[str, int] | None = None,
    field_map: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    chat_template: str | None = None,
) -> int:
    """Scores the completions of a file, or its pairs.

    Args:
      checkpoint: a run directory or one of its checkpoints, whose policy scores.
      judge: who scores in its place, such as ``reward:runs/rm``: see `jaxalign.judges`.
      data: JSON Lines, CSV or TSV: rows with ``prompt`` and ``completion``; for a judge
        also ``prompt``, ``chosen`` and ``rejected``.
      output: a JSON Lines file: each row as it was read, with ``logp`` (the summed
        log-probability of the completion, EOS included) and ``num_tokens``; of a judge
        with ``score``, or ``chosen_score`` and ``rejected_score``, null where it has no
        verdict. Nothing is truncated. An unfinished one goes on, a finished one is
        kept.
      batch_size: encoder rows at a time, of a checkpoint.
      mesh: sizes ``{"data", "fsdp", "tensor"}`` as in training; None: one device, or
        all devices of a job of several processes, which must divide `batch_size`.
      field_map: our field names to the file's.
      on_bad_row: ``"error"`` or ``"skip"``.
      chat_template: makes texts of chat messages; None: the CHAT_TEMPLATE of the
        checkpoint's training.

    Returns:
      The number of lines in the file.

    Raises:
      ValueError: when a finished output was made with other settings, or not one of
        `checkpoint` and `judge` is given.
    """
    if (checkpoint is None) == (judge is None):
        raise ValueError(
            "Say who scores: either --checkpoint=runs/sft, for log-probabilities, or "
            "--judge=reward:runs/rm (any of jaxalign.judges)."
        )
    if judge is not None:
        return judged.score(
            judge,
            data=data,
            output=output,
            field_map=field_map,
            on_bad_row=on_bad_row,
            template=chat_templates.resolve(chat_template),
        )
    asked = {"verb": "score", "field_map": field_map, "on_bad_row": on_bad_row}
    asked["data"] = outputs.input_key(data)
    if (template := chat_templates.resolve(chat_template)) is not None:
        asked["chat_template"] = template
    count = outputs.kept(output, asked, checkpoint=checkpoint)
    if count >= 0:
        return count
    policy, sharding = generation.load(checkpoint, mesh)
    template = template or policy.meta.get("chat_template")
    rows = generation.read_rows(
        data, "supervised", output, field_map, on_bad_row, template
    )
    key = {**asked, "checkpoint": policy.fingerprint}
    unfinished = _unfinished(output, key)
    logps, lengths = score_pairs(
        policy,
        [(r["prompt"], r["completion"]) for _, r in rows],
        batch_size=batch_size,
        sharding=sharding,
        unfinished=unfinished,
        verify=scoring.VERIFIED_SHARE,
    )
    count = write_jsonl(
        output,
        (
            {**raw, "logp": float(logp), "num_tokens": int(length)}
            for (raw, _), logp, length in zip(rows, logps, lengths, strict=True)
        ),
        key=key,
    )
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    return count


def score_pairs(
    policy: checkpoints.Network,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 16,
    sharding: jax.sharding.NamedSharding | None = None,
    **settings: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """``log p(completion | prompt)`` and target lengths of text pairs, ``[n]`` each.

    Nothing is cut; every process gets all numbers. More settings are those of
    `jaxalign.training.scoring.score`. Logits that are not finite are an error.
    """
    if not pairs:
        return np.zeros(0, np.float32), np.zeros(0, np.int32)
    columns = scoring.score_texts(
        _scorer(policy.model),
        policy.params,
        policy.vocabulary,
        *zip(*pairs, strict=True),
        batch_size=batch_size,
        mesh=sharding.mesh if sharding else None,
        dtype=str(policy.model.config.dtype),
        **settings,
    )
    return columns["response_logps"], columns["response_tokens"]


@functools.lru_cache(maxsize=4)  # the same object is compiled once
def _scorer(model: Any) -> scoring.Function:
    def columns(params: Any, batch: batches.Batch) -> dict[str, jax.Array]:
        return {
            "response_logps": models.response_logps(model, params, batch),
            "response_tokens": batches.response_lengths(batch).astype("int32"),
        }

    return columns


def _unfinished(output: str, key: Mapping[str, Any]) -> Path | None:
    """Where this process saves what it has of an output, if that is here."""
    if remote.is_remote(output):
        return None
    path = Path(output)
    digest = json_sha256({**key, "jax": jax.__version__})[:16]
    return path.with_name(f"{path.name}.{digest}.unfinished-{jax.process_index()}.npz")
