"""Reward models that teach the next one: best and worst of N samples (West-of-N).

Pace et al. 2024 (arXiv 2401.12086): a reward model is trained on human preferences; of
N samples of the policy to a prompt it picks the best and the worst; a new reward model
is trained on both kinds of pairs. A study: the same command after a kill goes on where
it stopped, and of a pool at most one batch is drawn again.

    run_dir/{human,test,prompts}.jsonl, base/, base.gaps.jsonl
            round1/{samples,selected,likely,pairs,data}.jsonl, model/, model.gaps.jsonl
            rounds.jsonl, study.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxalign import judges
from jaxalign.data import jsonl
from jaxalign.inference import generation
from jaxalign.pipelines import held_out, pools
from jaxalign.pipelines.study import Study
from jaxalign.report import west_of_n as page
from jaxalign.training import checkpoints

_POOLS, _PAIRS = 16, 256  # judged between two saves


def run(
    *,
    data: str,
    policy: str,
    run_dir: str,
    checkpoint: str | None = None,
    base: str | None = None,
    prompts: str | None = None,
    test: str | None = None,
    rounds: int = 1,
    num_samples: int = 64,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    mesh: Mapping[str, int] | None = None,
    confidence_quantile: float = 0.0,
    likelihood_quantile: float = 0.0,
    source: str | None = None,
    gin_files: Sequence[str] = ("runs/reward_model.gin",),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str | Path] = (),
    field_map: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    seed: int = 0,
    redo: Sequence[str] = (),
) -> str:
    """Trains reward models on human pairs and on the best and worst of N samples.

    Args:
      data: JSON Lines, CSV or TSV of ``prompt``, ``chosen`` and ``rejected``.
      policy: checkpoint to sample from.
      run_dir: where all is written.
      checkpoint: what every reward model starts from.
      base: a judge that labels the first round, such as ``reward:runs/rm?scale=raw``;
        one that compares two responses holds tournaments. By default a model trained
        on `data` first.
      prompts: JSON Lines file with ``prompt``, without labels; by default those of
        `data`.
      test: held-out pairs; by default those of a tenth of the prompts of `data`. No
        prompt of theirs is learnt from or sampled for.
      rounds: how many; each labels with the model of the round before.
      num_samples: of a pool, N; the paper takes 64.
      temperature: of the samples.
      top_p: keep so much probability.
      max_new_tokens: tokens of a sample.
      batch_size: prompts at a time; changes no sample.
      mesh: sizes ``{"data", "fsdp", "tensor"}`` to sample on.
      confidence_quantile: of the probability that the best is better than the worst; a
        pair below it is left out.
      likelihood_quantile: of the log-probability of a pair's less likely response.
      source: a field of `prompts`; filters leave the shares of its values as they were.
      gin_files: of the reward model's run, as in ``--gin_file``.
      bindings: ``"NAME = VALUE"`` for it.
      search_paths: folders to look for gin files in.
      field_map: our field names to the file's.
      on_bad_row: ``"error"`` or ``"skip"``.
      seed: of training, order and samples; round ``n`` uses ``seed + n``.
      redo: stages to make again, such as ``round1/selected.jsonl``.

    Returns:
      A line a model: its accuracy on the held-out pairs, and what became of the pools.

    Raises:
      ValueError: before anything is trained, for settings that cannot be; for a
        response without a verdict; for a round without a pair.
    """
    quantiles = {"confidence": confidence_quantile, "likelihood": likelihood_quantile}
    for name, value in quantiles.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"--{name}_quantile must lie in [0, 1), got {value}.")
    if num_samples < 2 or rounds < 1:
        raise ValueError(
            "--num_samples must be at least 2 and --rounds 1, got "
            f"{num_samples} and {rounds}."
        )
    held_out.check_run(gin_files, bindings, search_paths, checkpoint)
    given: Any = {"bindings": bindings, "search_paths": search_paths}
    macros: dict[str, Any] = {"RANDOM_SEED": seed}
    if checkpoint is not None:
        macros["INITIAL_CHECKPOINT_PATH"] = held_out.place(checkpoint)
    judge = judges.resolve(base) if base else None
    usual = judges.resolve(f"likelihood:{policy}")
    files = {"data": held_out.file(data), "test": held_out.file(test)}
    read = {"field_map": field_map, "on_bad_row": on_bad_row}
    table: list[dict[str, Any]] = []
    with Study(run_dir, redo=redo) as study:
        human, unseen = (
            study.file(
                f"{name}.jsonl", held_out.write_pairs, held_out=h, **files, **read
            )
            for name, h in (("human", False), ("test", True))
        )
        asked = study.file(
            "prompts.jsonl",
            held_out.write_prompts,
            prompts=held_out.file(prompts),
            human=human,
            test=unseen,
            source=source,
            template=checkpoints.chat_template(policy),
        )
        given["execution"] = {"CACHE_DIR": str(study.folder / "cache")}
        if judge is None:
            trained = study.train("base", gin_files, DATA=human, **given, **macros)
            judge = held_out.raw(trained)
        table.append({"round": 0, "model": base or str(study.folder / "base")})
        table[0] |= held_out.measured(study, "base", unseen, judge)
        for number in range(1, rounds + 1):
            home = f"round{number}"
            samples = study.file(
                f"{home}/samples.jsonl",
                generation.generate,
                all_processes=True,
                execution={"batch_size": batch_size, "mesh": mesh},
                checkpoint=held_out.place(policy),
                prompts=asked,
                num_samples=num_samples,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                seed=seed + number,
            )
            selected = study.lines(
                f"{home}/selected.jsonl",
                pools.selected,
                pools.pools(samples),
                batch=_POOLS,
                judge=judge,
            )
            likely = study.lines(
                f"{home}/likely.jsonl",
                pools.likely,
                pools.candidates(selected),
                batch=_PAIRS,
                judge=usual,
            )
            kept = study.file(
                f"{home}/pairs.jsonl", pools.write_kept, found=likely, **quantiles
            )
            mixed = study.file(
                f"{home}/data.jsonl",
                pools.write_mixture,
                human=human,
                chosen=selected,
                kept=kept,
                seed=seed + number,
            )
            trained = study.train(f"{home}/model", gin_files, DATA=mixed, **given,
                                  **macros)  # fmt: skip
            judge = held_out.raw(trained)
            row = {"round": number, "model": str(trained)}
            row |= held_out.measured(study, f"{home}/model", unseen, judge)
            table.append({**row, "became": pools.counts(selected, kept)})
            shown = [jsonl.read_rows(path) for path in (kept, selected, human)]
        if jax.process_index() == 0:
            jsonl.write_rows(study.folder / "rounds.jsonl", table)
        study.page("West-of-N", page.body(table, *shown))
    return "\n".join(map(page.line, table))
