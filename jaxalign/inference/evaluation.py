"""What a checkpoint is used for: score and evaluate. Files in, files out.

A checkpoint carries its network's shape and its vocabulary, so these functions need a
path and nothing else; none of them imports TensorFlow.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from jaxalign import batch as batches
from jaxalign import data as data_lib
from jaxalign import judges, models, remote, user_code
from jaxalign.cluster import exclusive
from jaxalign.cluster import mesh as meshes
from jaxalign.data import jsonl, records
from jaxalign.data.jsonl import json_line
from jaxalign.decoding import Sampling
from jaxalign.evaluation import compare, metrics
from jaxalign.inference import generation, outputs
from jaxalign.training import checkpoints

# How it is computed, which is no part of what was asked for.
_EXECUTION = ("batch_size", "mesh")


@exclusive.one_output_at_a_time
def score(
    *,
    checkpoint: str,
    data: str,
    output: str,
    batch_size: int = 16,
    mesh: Mapping[str, int] | None = None,
    field_map: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
) -> int:
    """Scores the completions of a JSON Lines file.

    Args:
      checkpoint: a run directory or one of its checkpoints.
      data: rows with ``prompt`` and ``completion``.
      output: a JSON Lines file: each row as it was read, with ``logp`` (the summed
        log-probability of the completion, EOS included) and ``num_tokens``. Nothing is
        truncated.
      batch_size: encoder rows at a time.
      mesh: sizes ``{"data", "fsdp", "tensor"}`` as in training; None: one device, or
        all devices of a job of several processes, which must divide `batch_size`.
      field_map: our field names to the file's.
      on_bad_row: ``"error"`` or ``"skip"``.

    Returns:
      The number of lines in the file.

    Raises:
      ValueError: when a finished output was made with other settings.
    """
    asked = {"verb": "score", "field_map": field_map, "on_bad_row": on_bad_row}
    asked["data"] = outputs.input_key(data)
    count = outputs.kept(
        output, lambda: {**asked, "checkpoint": outputs.policy_key(checkpoint)}
    )
    if count >= 0:
        return count
    policy, sharding = generation.load(checkpoint, mesh)
    examples, _ = records.load(
        data,
        "supervised",
        field_map=field_map,
        on_bad_row=on_bad_row,
        listing=generation.bad_rows_beside(output),
    )
    pairs = [(e.raw, record) for e in examples for record in e.records]
    logps, lengths = score_pairs(
        policy,
        [(r["prompt"], r["completion"]) for _, r in pairs],
        batch_size=batch_size,
        sharding=sharding,
    )
    return write_jsonl(
        output,
        (
            {**raw, "logp": float(logp), "num_tokens": int(length)}
            for (raw, _), logp, length in zip(pairs, logps, lengths, strict=True)
        ),
        key={**asked, "checkpoint": policy.meta["policy_fingerprint"]},
    )


def score_pairs(
    policy: checkpoints.Policy,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 16,
    sharding: jax.sharding.NamedSharding | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """``log p(completion | prompt)`` and target lengths of text pairs, ``[n]`` each.

    `sharding` places rows on several devices; every process gets all numbers.

    Raises:
      ValueError: naming a row, when the network's logits are not finite.
    """
    if sharding is not None:
        meshes.check_batch(sharding.mesh, batch_size, 1)
    if not pairs:
        return np.zeros(0, np.float32), np.zeros(0, np.int64)
    rows = [_row(i, p, c, policy.vocabulary) for i, (p, c) in enumerate(pairs)]
    index = data_lib.build_index(rows)
    plan = data_lib.pack(
        index,
        inputs=_rounded(int(index.prompt_lengths.max())),
        targets=_rounded(int(index.response_lengths.max())),
        packing=1,
    )
    forward = jax.jit(lambda p, b: models.response_logps(policy.model, p, b))
    logps = np.zeros(len(rows), np.float32)
    for start in tqdm(
        range(0, len(plan), batch_size), "score", disable=None, leave=False
    ):
        placements = [plan[i] for i in range(start, min(start + batch_size, len(plan)))]
        arrays = [
            data_lib.to_arrays([rows[i] for i in p.row_ids], p, plan.shape)
            for p in placements
        ]
        # Fill the last batch with copies of its first row: one compiled shape.
        padded = arrays + [arrays[0]] * (batch_size - len(arrays))
        batch = {k: np.stack([a[k] for a in padded]) for k in arrays[0]}
        if sharding is not None:
            batch = meshes.put_batch(sharding.mesh, batch)
        scored = multihost_utils.process_allgather(
            forward(policy.params, batch), tiled=True
        )
        for placement, found in zip(placements, scored, strict=False):
            if np.isnan(found[: len(placement.row_ids)]).any():
                raise ValueError(
                    f"The network's logits for row {placement.row_ids[0]} are not "
                    "finite (log-probability NaN): the checkpoint's parameters are "
                    "damaged, or overflow in this dtype."
                )
            logps[placement.row_ids] = found[: len(placement.row_ids)]
    return logps, np.asarray(index.response_lengths)


def _rounded(length: int) -> int:
    """The next power of two, so that files of similar lengths share a compilation."""
    return max(16, 1 << (length - 1).bit_length())


def _row(i: int, prompt: str, completion: str, vocabulary: Any) -> data_lib.Row:
    def ids(text: str) -> np.ndarray:
        return np.array([*vocabulary.encode(text), vocabulary.eos_id], np.int32)

    return data_lib.Row(
        key=str(i),
        prompts=[ids(prompt)],
        responses=[ids(completion)],
        response_prompt=[0],
        response_kind=[batches.ANSWER],
        response_reward=[float("nan")],
        response_label=[batches.NO_LABEL],
    )


@exclusive.one_output_at_a_time
def evaluate(
    *,
    checkpoint: str,
    data: str,
    baseline: str | None = None,
    judge: str | None = None,
    metric_fns: Sequence[str] = (),
    output: str | None = None,
    num_samples: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    mesh: Mapping[str, int] | None = None,
    field_map: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
) -> dict[str, Any]:
    """Generates for a file of prompts and judges the result.

    Args:
      checkpoint: a run directory or one of its checkpoints.
      data: rows with a ``prompt`` and, for `metric_fns`, a ``completion``.
      baseline: another checkpoint, to compare with.
      judge: of responses, or of two of them: see `jaxalign.judges`.
      metric_fns: comma-separated names in `jaxalign.evaluation.metrics`, such as
        exact_match, or ``"module:function"``, each ``(targets, predictions) ->
        dict`` as seqio's.
      output: a JSON file for the result, if any.
      num_samples: per prompt.
      temperature: 0, the default, takes the most probable tokens.
      top_k: keep so many tokens; 0 keeps all.
      top_p: keep so much probability.
      max_new_tokens: tokens of a response, EOS included.
      batch_size: prompts at a time.
      seed: of the samples.
      mesh: sizes ``{"data", "fsdp", "tensor"}`` as in training; None: one device, or
        all devices of a job of several processes, which must divide `batch_size`.
      field_map: our field names to the file's.
      on_bad_row: ``"error"`` or ``"skip"``.

    Returns:
      ``{"metrics": ..., "reward": ..., "comparison": ...}``, with what was asked for.

    Raises:
      ValueError: when nothing was asked for, or a finished output was made with other
        settings.
    """
    given = {k: v for k, v in locals().items() if k not in ("output", *_EXECUTION)}
    if not judge and not metric_fns:
        raise ValueError(
            "Nothing to evaluate with: give --judge=module:function, or "
            "--metrics=exact_match (any of jaxalign.evaluation.metrics)."
        )
    judged = judges.resolve(judge) if judge else None
    if judged and judges.is_pairwise(judged) and not baseline:
        raise ValueError(
            f"{judge} compares two responses: give --baseline=DIR, whose they are "
            "compared with."
        )
    functions = [
        user_code.resolve_callable(
            name if ":" in name else f"{metrics.__name__}:{name}"
        )
        for name in metric_fns
    ]
    asked = {**given, "verb": "eval", "data": outputs.input_key(data)}
    asked["judge"] = judged.fingerprint if judged else None
    asked["metric_fns"] = [
        user_code.function_key(name, function) if ":" in name else name
        for name, function in zip(metric_fns, functions, strict=True)
    ]

    def key(policy: str, against: str | None) -> dict[str, Any]:
        return {**asked, "checkpoint": policy, "baseline": against}

    def key_now() -> dict[str, Any]:
        against = outputs.policy_key(baseline) if baseline else None
        return key(outputs.policy_key(checkpoint), against)

    if outputs.kept(output, key_now) >= 0:
        return jsonl.read_json(output) if jax.process_index() == 0 else {}
    schema = "supervised" if functions else "prompts"
    examples, _ = records.load(
        data,
        schema,
        field_map=field_map,
        on_bad_row=on_bad_row,
        listing=generation.bad_rows_beside(output),
    )
    rows = [record for e in examples for record in e.records]
    prompts = [record["prompt"] for record in rows]

    used: dict[str, str] = {}  # fingerprints of the policies

    def texts(path: str) -> list[list[str]]:
        policy, sharding = generation.load(path, mesh)
        used[path] = policy.meta["policy_fingerprint"]
        generations = generation.sample(
            policy,
            prompts,
            num_samples=num_samples,
            sampling=Sampling(temperature, top_k, top_p),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            sharding=sharding,
        )
        return [found.texts for found in generations]

    responses = texts(checkpoint)
    result: dict[str, Any] = {"checkpoint": checkpoint, "num_prompts": len(prompts)}
    if functions:
        targets = [record["completion"] for record in rows]
        first = [samples[0] for samples in responses]
        result["metrics"] = metrics.run_metrics(functions, targets, predictions=first)
    if judged and not baseline:
        scores = judges.verdicts(zip(prompts, responses, strict=True), judged)
        found = compare.mean_reward(scores)
        result["reward"] = {
            "mean": found.mean,
            "ci95": [found.low, found.high],
            "no_verdict": sum(int(np.isnan(s).sum()) for s in scores),
        }
    if judged and baseline:
        compared = compare.compare_responses(
            prompts, responses, texts(baseline), judged
        )
        result["baseline"] = baseline
        result["comparison"] = compared.to_json()
    if output:
        text = jsonl.dumps(result, indent=2) + "\n"
        _write(output, [text], key(used[checkpoint], used.get(baseline)))
    return result


def write_jsonl(
    path: str | Path,
    lines: Iterable[Mapping[str, Any]],
    key: Mapping[str, Any] | None = None,
    **noted: Any,
) -> int:
    """Streams JSON lines into ``path.partial`` and renames it when all are written.

    Of several processes the first writes; `lines` are the same in all of them.

    Args:
      path: the file, here or in a bucket.
      lines: JSON objects.
      key: what a local file depends on, kept beside it (`jaxalign.inference.outputs`).
      **noted: what else is kept there.

    Returns:
      The number of lines.
    """
    return _write(path, map(json_line, lines), key, **noted)


def _write(
    path: str | Path, texts: Iterable[str], key: Mapping[str, Any] | None, **noted: Any
) -> int:
    if jax.process_index() > 0:
        return sum(1 for _ in texts)
    count = 0
    with remote.writing(path) as local:
        local.parent.mkdir(parents=True, exist_ok=True)
        with outputs.open_partial(local, os.O_TRUNC) as file:
            for text in texts:
                file.write(text.encode("utf-8"))
                count += 1
        if key is None:
            os.replace(outputs.partial_path(local), local)
        else:
            outputs.finish(local, key, **noted)
    return count
