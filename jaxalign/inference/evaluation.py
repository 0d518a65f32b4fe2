"""``jaxalign eval``: generates for a file of prompts and judges the result.

Of reward models: how right their verdicts on a file of pairs are, in numbers and on a
page (`jaxalign.inference.reward_evaluation`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign import judges, remote, user_code
from jaxalign.cluster import exclusive
from jaxalign.data import jsonl
from jaxalign.data.jsonl import json_line
from jaxalign.decoding import Sampling
from jaxalign.evaluation import compare, metrics
from jaxalign.files import write_atomically
from jaxalign.inference import generation, outputs, reward_evaluation, reward_pools
from jaxalign.report import reward_models as page
from jaxalign.training import checkpoints


@exclusive.one_output_at_a_time
def evaluate(
    *,
    checkpoint: str | None = None,
    data: str,
    baseline: str | None = None,
    judge: str | None = None,
    metric_fns: Sequence[str] = (),
    reward_models: Sequence[str] = (),
    pools: str | None = None,
    gold: str | None = None,
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
    """Generates for a file of prompts and judges the result; or evaluates judges.

    Args:
      checkpoint: a run directory or one of its checkpoints; that of a reward model,
        with nothing to judge it by, is one of `reward_models`.
      data: rows with a ``prompt`` and, for `metric_fns`, a ``completion``; for
        `reward_models` pairs of ``chosen`` and ``rejected``, by whose ``split``,
        ``category``, ``subset``, ``source`` and ``band`` results are parted.
      baseline: another checkpoint, to compare with.
      judge: of responses, or of two of them: see `jaxalign.judges`.
      metric_fns: comma-separated names in `jaxalign.evaluation.metrics`, such as
        exact_match, or ``"module:function"``, each ``(targets, predictions) ->
        dict`` as seqio's.
      reward_models: run directories, or judges of any kind, whose verdicts on pairs are
        evaluated: accuracy, calibration, biases, agreement.
      pools: samples for best-of-n curves of those: what `generate` wrote, or rows with
        ``prompt`` and ``responses``.
      gold: a judge that is right about `pools`, for over-optimisation.
      output: a JSON file for the result, if any; beside that of reward models lies a
        page, FILE.html.
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
      ``{"metrics": ..., "reward": ..., "comparison": ...}``, with what was asked for;
      of reward models what `jaxalign.inference.reward_evaluation.evaluate` says.

    Raises:
      ValueError: when nothing was asked for, or a finished output was made with other
        settings.
    """
    # How it is computed is no part of what was asked for.
    asked = dict(locals())
    del asked["output"], asked["batch_size"], asked["mesh"]
    if not reward_models and checkpoint and not judge and not metric_fns:
        if reward_evaluation.is_reward_model(checkpoint):
            reward_models, checkpoint = (checkpoint,), None
    if reward_models:
        if checkpoint or baseline or judge or metric_fns:
            raise ValueError(
                "--reward_models are judges, evaluated on pairs: --checkpoint, "
                "--baseline, --judge and --metrics are of policies. Leave out either."
            )
        return _of_reward_models(
            reward_models, data, pools, gold, output, field_map, on_bad_row
        )
    if not checkpoint:
        raise ValueError(
            "Say what to evaluate: --checkpoint=runs/sft, or --reward_models=runs/rm."
        )
    if pools or gold:
        raise ValueError("--pools and --gold are for --reward_models=runs/rm.")
    for name in ("reward_models", "pools", "gold"):  # no part of what others asked for
        del asked[name]
    if not judge and not metric_fns:
        raise ValueError(
            "Nothing to evaluate with: give --judge=my_judge.py:score, or "
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
    asked |= {"verb": "eval", "data": outputs.input_key(data)}
    asked["judge"] = judged.fingerprint if judged else None
    asked["metric_fns"] = [
        user_code.function_key(name, function) if ":" in name else name
        for name, function in zip(metric_fns, functions, strict=True)
    ]
    if outputs.kept(output, asked, checkpoint=checkpoint, baseline=baseline) >= 0:
        return jsonl.read_json(output) if jax.process_index() == 0 else {}
    schema = "supervised" if functions else "prompts"
    template = checkpoints.chat_template(checkpoint)
    rows = generation.read_rows(data, schema, output, field_map, on_bad_row, template)
    prompts = [record["prompt"] for _, record in rows]

    used: dict[str, str] = {}  # fingerprints of the policies

    def texts(path: str) -> list[list[str]]:
        policy, sharding = generation.load(path, mesh)
        used[path] = policy.fingerprint
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
        targets = [record["completion"] for _, record in rows]
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
        asked |= {"checkpoint": used[checkpoint], "baseline": used.get(baseline)}
        _write(output, [jsonl.dumps(result, indent=2) + "\n"], asked)
    return result


def _of_reward_models(
    names: Sequence[str],
    data: str,
    pools: str | None,
    gold: str | None,
    output: str | None,
    field_map: Mapping[str, str] | None,
    on_bad_row: str,
) -> dict[str, Any]:
    """The result, in a file with its page beside it where `output` says one."""
    if gold and not pools:
        raise ValueError("--gold judges samples: give them, --pools=samples.jsonl.")
    of = {name: judges.resolve(reward_evaluation.judge_name(name)) for name in names}
    right = judges.resolve(gold) if gold else None
    asked = {
        "verb": "eval",
        "data": outputs.input_key(data),
        "reward_models": [[name, judge.fingerprint] for name, judge in of.items()],
        "pools": outputs.input_key(pools) if pools else None,
        "gold": right.fingerprint if right else None,
        "field_map": field_map,
        "on_bad_row": on_bad_row,
    }
    if outputs.kept(output, asked) >= 0:
        return jsonl.read_json(output) if jax.process_index() == 0 else {}
    rows = reward_evaluation.read_rows(data, names, output, field_map, on_bad_row)
    drawn = reward_pools.read(pools) if pools else ()
    result = jsonl.nulled(reward_evaluation.evaluate(rows, of, drawn, right))
    result = {"data": data, **result}
    if output:
        if jax.process_index() == 0:
            with remote.writing(output.removesuffix(".json") + ".html") as local:
                local.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(local, page.page(result))
        _write(output, [jsonl.dumps(result, indent=2) + "\n"], asked)
    return result


def as_text(result: Mapping[str, Any]) -> str:
    """What the command line prints."""
    if "models" in result:
        return reward_evaluation.as_text(result)
    return jsonl.dumps(result, indent=2)


def write_jsonl(
    path: str | Path,
    lines: Iterable[Mapping[str, Any]],
    key: Mapping[str, Any] | None = None,
) -> int:
    """Streams JSON lines into ``path.partial`` and renames it when all are written.

    Of several processes the first writes; `lines` are the same in all of them. What a
    local file depends on (`key`) is kept beside it (`jaxalign.inference.outputs`).
    Returns the number of lines.
    """
    return _write(path, map(json_line, lines), key)


def _write(
    path: str | Path, texts: Iterable[str], key: Mapping[str, Any] | None
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
            outputs.finish(local, key)
    return count
