"""Every objective on the embedded data at equal compute: reward, KL, who beats whom.

One supervised policy per seed; from it every objective starts, takes the same number of
steps on the same number of responses per step, and samples answers to the same unseen
prompts. The village (`jaxalign.world`) judges them exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxalign import files, judges, world
from jaxalign import objectives as objective_classes
from jaxalign.data import jsonl
from jaxalign.data.bad_rows import nearest
from jaxalign.decoding import Sampling
from jaxalign.evaluation import compare
from jaxalign.inference import generation, score
from jaxalign.pipelines import quickstart
from jaxalign.pipelines.study import Study
from jaxalign.report import comparison as page
from jaxalign.training import checkpoints

RESPONSES_PER_STEP = 48
_COLUMNS = {"reward": "reward", "kl": "log_ratio", "tokens": "num_tokens"}
_ROWS = {"trajectory": 8000, "preference": 4000, "rationale": 4000}

# By gin file: the objective's class, and what differs from the gin file's defaults. One
# learning rate for all, and strengths that are round numbers: none was searched for.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "preferred_ft": ("PreferredFT", {}),
    "filtered_sft": ("FilteredSFT", {}),
    "reward_weighted_sft": ("RewardWeightedSFT", {}),
    "dpo": ("DPO", {"BETA": 0.5}),
    "robust_dpo": ("RobustDPO", {"BETA": 0.5}),
    "ipo": ("IPO", {"BETA": 2.0}),
    "hinge": ("Hinge", {"BETA": 0.5}),
    "exo": ("EXO", {"BETA": 0.5, "LABEL_SMOOTHING": 0.1}),
    "nca": ("NCA", {"BETA": 0.5}),
    "sppo": ("SPPO", {"BETA": 0.25}),
    "apo_zero": ("APOZero", {"BETA": 0.5}),
    "apo_down": ("APODown", {"BETA": 0.5}),
    "dpo_nll": ("DPONLL", {"BETA": 0.5, "NLL_WEIGHT": 0.2}),
    "pair_sum": ("PairSum", {"objectives.DPO.beta": 0.5}),
    "cpo": ("CPO", {"BETA": 0.5}),
    "simpo": ("SimPO", {"BETA": 2.5, "GAMMA": 0.5}),
    "orpo": ("ORPO", {"BETA": 1.0}),
    "slic_hf": ("SLiCHF", {"DELTA": 2.0}),
    "kto": ("KTO", {"BETA": 0.5}),
    "reward_kto": ("RewardKTO", {"BETA": 0.5}),
    "apo_zero_unpaired": ("APOZeroUnpaired", {"BETA": 0.5}),
    "bco": ("BCO", {"BETA": 0.5}),
    "dro_v": ("DROV", {"TAU": 0.5, "VALUE_LEARNING_RATE": 1e-2}),
    "dro_p": ("DROP", {"TAU": 0.5}),
    "rdpo": ("RDPO", {"BETA": 0.5}),
    "rorpo": ("RORPO", {"BETA": 1.0}),
}


def settings_of(name: str, steps: int) -> tuple[str, dict[str, Any]]:
    """The schema of an objective's data and its settings, by its gin file's name."""
    if name not in SETTINGS:
        hint = nearest(name, SETTINGS) or f"; known: {', '.join(SETTINGS)}"
        raise ValueError(f"No objective {name!r} to compare{hint}.")
    class_name, own = SETTINGS[name]
    kind = objective_classes.OBJECTIVES[class_name]
    per_row = kind.min_prompts * (1 if kind.schema == "trajectory" else 2)
    settings = {
        # No evaluation on the way and no samples: the comparison does its own.
        **{"EVAL_STEPS": 1, "run.Run.sampler": None},
        "TRAIN_STEPS": steps,
        "PACKING": kind.min_prompts,
        "BATCH_SIZE": RESPONSES_PER_STEP // per_row,
    }
    if kind.schema == "rationale":
        # A rationale's prompt holds the question and both answers.
        settings["TASK_FEATURE_LENGTHS"] = {"inputs": 320, "targets": 112}
    return kind.schema, settings | own


def run(
    *,
    run_dir: str = "runs/compare",
    objectives: Sequence[str] = (),
    seeds: int = 3,
    steps: int = 100,
    num_prompts: int = 300,
    split: Literal["test", "validation"] = "test",
    redo: Sequence[str] = (),
) -> str:
    """Every objective on embedded data at equal compute.

    Args:
      run_dir: where all is written: ``seed<n>/<objective>/``, ``responses/``,
        ``comparison.json``, ``comparison.html`` and ``study.html``.
      objectives: comma-separated gin files of runs/, e.g. dpo,kto; by default all.
      seeds: how many.
      steps: training steps of each objective.
      num_prompts: unseen prompts to answer, one sample each at temperature 1.
      split: of the prompts; validation to choose settings by.
      redo: stages to make again, such as ``seed0/dpo``.

    Raises:
      ValueError: before anything is trained, when `run_dir` holds stages of other
        settings, or for an unknown objective.
    """
    names = list(objectives or SETTINGS)
    wanted = {name: settings_of(name, steps) for name in names}
    with Study(run_dir, redo=redo) as study:
        # First what all policies share, so that another value is refused at once.
        study.file("settings.json", _note, steps=steps)
        home = f"responses/{split}/seed"
        asked = [
            quickstart.village_prompts(study, f"{home}{n}", split, num_prompts, n)
            for n in range(seeds)
        ]
        found: dict[str, list[Path]] = {name: [] for name in ("sft", *names)}
        for seed, prompts in enumerate(asked):
            sft = supervised(study, seed)
            found["sft"].append(answers(study, sft, sft, prompts, seed))
            for name, (schema, settings) in wanted.items():
                start = {**settings, "INITIAL_CHECKPOINT_PATH": sft}
                path, rows = f"seed{seed}/{name}", _ROWS[schema]
                policy = quickstart.train(study, path, schema, rows, seed, start)
                found[name].append(answers(study, policy, sft, prompts, seed))
        results = collect(found)
        text = jsonl.dumps(results, indent=2) + "\n"
        files.write_atomically(study.folder / "comparison.json", text)
        path = study.folder / "comparison.html"
        page.write(path, results, steps=steps, split=split)
        table = as_text(results["objectives"])
        study.page("Objectives compared", f"<pre>{table}</pre>")
    return f"{table}\n\nPage: {run_dir}/comparison.html"


def _note(output: Path, **settings: Any) -> None:
    jsonl.write_rows(output, [settings])


def supervised(study: Study, seed: int) -> Path:
    """The policy from which every objective of a seed starts."""
    size, settings, path = quickstart.SFT_ROWS, quickstart.SFT, f"seed{seed}/sft"
    return quickstart.train(study, path, "supervised", size, seed, settings)


def answers(
    study: Study, policy: Path, reference: Path, prompts: Path, seed: int
) -> Path:
    """A policy's sampled answers, beside the prompts, with rewards and log-ratios."""
    name = f"{prompts.parent.relative_to(study.folder)}/{policy.name}.jsonl"
    inputs = {"policy": policy, "reference": reference, "prompts": prompts}
    size = {"batch_size": 100}
    return study.file(name, _answer, execution=size, seed=seed, **inputs)


def _answer(
    output: Path, policy: Path, reference: Path, prompts: Path, **settings: int
) -> None:
    texts = [row["prompt"] for row in jsonl.read_rows(prompts)]
    network, base = map(checkpoints.load, (policy, reference))
    samples = generation.sample(
        network, texts, sampling=Sampling(), max_new_tokens=64, **settings
    )
    given = list(samples)
    pairs = [(text, g.texts[0]) for text, g in zip(texts, given, strict=True)]
    size = settings["batch_size"]
    own, _ = score.score_pairs(network, pairs, batch_size=size)
    other, _ = score.score_pairs(base, pairs, batch_size=size)
    rows = [
        {
            "prompt": prompt,
            "response": text,
            "reward": world.true_reward(prompt, text),
            "log_ratio": float(a - b),
            "num_tokens": len(g.tokens[0]),
        }
        for (prompt, text), g, a, b in zip(pairs, given, own, other, strict=True)
    ]
    jsonl.write_rows(output, rows)


def means(paths: Sequence[Path]) -> dict[str, list[float]]:
    """``{"reward", "kl", "tokens": [one per file]}`` of files of answers."""
    answered = [jsonl.read_rows(path) for path in paths]
    return {
        column: [float(np.mean([row[field] for row in rows])) for rows in answered]
        for column, field in _COLUMNS.items()
    }


def collect(found: dict[str, list[Path]]) -> dict[str, Any]:
    """Means by objective and seed, and the matrix of win rates over all seeds."""
    rows = {
        n: [r for p in paths for r in jsonl.read_rows(p)] for n, paths in found.items()
    }
    texts = {name: [row["response"] for row in own] for name, own in rows.items()}
    # Prompts of different seeds are different units, even where their texts agree.
    prompts = [row["prompt"] for row in rows["sft"]]
    judge = judges.from_function(world.true_reward)
    wins: dict[str, dict[str, float]] = {name: {} for name in found}
    for a, b in itertools.permutations(found, 2):
        compared = compare.compare_responses(prompts, texts[a], texts[b], judge)
        wins[a][b] = compared.win_rate.mean
    table = {name: means(paths) for name, paths in found.items()}
    return {"objectives": table, "win_rates": wins}


def as_text(table: dict[str, dict[str, list[float]]]) -> str:
    """The table for a terminal, best reward first."""
    lines = [f"{'objective':<22}{'true reward':>12}{'KL':>9}{'tokens':>9}"]
    for name in sorted(table, key=lambda n: -np.mean(table[n]["reward"])):
        reward, kl, tokens = (np.mean(table[name][k]) for k in _COLUMNS)
        lines.append(f"{name:<22}{reward:>12.3f}{kl:>9.2f}{tokens:>9.1f}")
    return "\n".join(lines)
