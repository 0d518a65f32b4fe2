"""Every objective on the embedded data at equal compute: reward, KL, who beats whom.

One supervised policy per seed; from it every objective starts, takes the same number of
steps on the same number of responses per step, and samples answers to the same unseen
prompts. The village (`jaxalign.world`) judges them exactly.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxalign import objectives, remote, world
from jaxalign.cluster import exclusive
from jaxalign.data import jsonl
from jaxalign.data.bad_rows import nearest
from jaxalign.decoding import Sampling
from jaxalign.evaluation import compare
from jaxalign.inference import evaluation as inference
from jaxalign.inference import generation, outputs, score
from jaxalign.pipelines import stages
from jaxalign.pipelines.stages import COMMON, SFT, Stage
from jaxalign.training import checkpoints, run_directory

RESPONSES_PER_STEP = 48
_TEMPERATURE = 1.0
_MAX_NEW_TOKENS = 64
_ROWS = {"trajectory": 8000, "preference": 4000, "rationale": 4000}
_NOTHING_ELSE = {
    # No evaluation on the way and no samples: the comparison does its own.
    "EVAL_STEPS": "1",
    "run.Run.sampler": "None",
}

# By gin file: the objective's class, and what differs from the gin file's defaults. One
# learning rate for all, and strengths that are round numbers: none was searched for.
SETTINGS: dict[str, tuple[str, dict[str, str]]] = {
    "preferred_ft": ("PreferredFT", {}),
    "filtered_sft": ("FilteredSFT", {}),
    "reward_weighted_sft": ("RewardWeightedSFT", {}),
    "dpo": ("DPO", {"BETA": "0.5"}),
    "robust_dpo": ("RobustDPO", {"BETA": "0.5"}),
    "ipo": ("IPO", {"BETA": "2.0"}),
    "hinge": ("Hinge", {"BETA": "0.5"}),
    "exo": ("EXO", {"BETA": "0.5", "LABEL_SMOOTHING": "0.1"}),
    "nca": ("NCA", {"BETA": "0.5"}),
    "sppo": ("SPPO", {"BETA": "0.25"}),
    "apo_zero": ("APOZero", {"BETA": "0.5"}),
    "apo_down": ("APODown", {"BETA": "0.5"}),
    "dpo_nll": ("DPONLL", {"BETA": "0.5", "NLL_WEIGHT": "0.2"}),
    "pair_sum": ("PairSum", {"objectives.DPO.beta": "0.5"}),
    "cpo": ("CPO", {"BETA": "0.5"}),
    "simpo": ("SimPO", {"BETA": "2.5", "GAMMA": "0.5"}),
    "orpo": ("ORPO", {"BETA": "1.0"}),
    "slic_hf": ("SLiCHF", {"DELTA": "2.0"}),
    "kto": ("KTO", {"BETA": "0.5"}),
    "reward_kto": ("RewardKTO", {"BETA": "0.5"}),
    "apo_zero_unpaired": ("APOZeroUnpaired", {"BETA": "0.5"}),
    "bco": ("BCO", {"BETA": "0.5"}),
    "dro_v": ("DROV", {"TAU": "0.5", "VALUE_LEARNING_RATE": "1e-2"}),
    "dro_p": ("DROP", {"TAU": "0.5"}),
    "rdpo": ("RDPO", {"BETA": "0.5"}),
    "rorpo": ("RORPO", {"BETA": "1.0"}),
}


def stage_of(name: str, steps: int) -> Stage:
    """The stage of an objective, by its gin file's name.

    Raises:
      ValueError: naming the nearest one.
    """
    if name not in SETTINGS:
        hint = nearest(name, SETTINGS) or f"; known: {', '.join(SETTINGS)}"
        raise ValueError(f"No objective {name!r} to compare{hint}.")
    class_name, own = SETTINGS[name]
    kind = objectives.OBJECTIVES[class_name]
    per_row = 1 if kind.schema == "trajectory" else 2
    packing = kind.min_prompts
    settings = {
        **COMMON,
        **_NOTHING_ELSE,
        "TRAIN_STEPS": str(steps),
        "PACKING": str(packing),
        "BATCH_SIZE": str(RESPONSES_PER_STEP // per_row // packing),
    }
    if kind.schema == "rationale":
        # A rationale's prompt holds the question and both answers.
        settings["TASK_FEATURE_LENGTHS"] = "{'inputs': 320, 'targets': 112}"
    return Stage(name, kind.schema, _ROWS[kind.schema], settings | own)


def run(
    run_dir: str | Path,
    *,
    names: Sequence[str] = (),
    seeds: int = 3,
    steps: int = 100,
    num_prompts: int = 300,
    split: str = "test",
) -> dict[str, dict[str, Any]]:
    """Trains and compares; what is finished under the same settings is not repeated.

    Args:
      run_dir: gets ``seed<n>/<objective>/``, ``responses/``, ``comparison.json`` and
        ``comparison.html``.
      names: gin files' names; all objectives by default.
      seeds: how many.
      steps: of each objective.
      num_prompts: unseen prompts, one sample each at temperature 1.
      split: ``"test"``, or ``"validation"`` to choose settings by.

    Returns:
      ``{objective: {"reward", "kl", "tokens": [one per seed]}}``.

    Raises:
      ValueError: when `run_dir` holds stages or answers of other settings, before
        anything is trained; or for an unknown name.
    """
    folder = remote.local_only(run_dir, "--run_dir of several runs").absolute()
    names = list(names or SETTINGS)
    wanted = [stage_of(name, steps) for name in names]
    with exclusive.holding(folder, "folder of a comparison"):
        _refuse_other(folder, wanted, range(seeds), split, num_prompts)
        _make(folder, wanted, range(seeds), split, num_prompts)
        results = collect(folder, ["sft", *names], seeds, split)
        run_directory.write_atomically(
            folder / "comparison.json", jsonl.dumps(results, indent=2) + "\n"
        )
        from jaxalign.report import comparison as page

        page.write(folder / "comparison.html", results, steps=steps, split=split)
    return results["objectives"]


def _refuse_other(
    folder: Path, wanted: list[Stage], seeds: Sequence[int], split: str, count: int
) -> None:
    """Refuses what there is of other settings, before anything new is made."""
    for seed in seeds:
        prompts = world.sample_prompts(split, count, seed)
        for stage in (SFT, *wanted):
            home = folder / f"seed{seed}"
            stages.check(home, stage, data=folder / "data", seed=seed)
            path = answers_path(folder, stage.name, seed, split)
            outputs.check_file(path, _asked(prompts, seed, split))


def _make(
    folder: Path, wanted: list[Stage], seeds: Sequence[int], split: str, count: int
) -> None:
    """Trains and answers, one seed after another."""
    for seed in seeds:
        home = folder / f"seed{seed}"
        sft = stages.train(home, SFT, data=folder / "data", seed=seed, quiet=True)
        prompts = world.sample_prompts(split, count, seed)
        answer(folder, "sft", seed, split, prompts)
        start_from = {"INITIAL_CHECKPOINT_PATH": repr(str(sft))}
        for stage in tqdm(wanted, f"seed {seed}", disable=None):
            settings = {**stage.settings, **start_from}
            stage = dataclasses.replace(stage, settings=settings)
            stages.train(home, stage, data=folder / "data", seed=seed, quiet=True)
            answer(folder, stage.name, seed, split, prompts)


def answers_path(folder: Path, name: str, seed: int, split: str) -> Path:
    return folder / "responses" / split / f"seed{seed}" / f"{name}.jsonl"


def answer(
    folder: Path, name: str, seed: int, split: str, prompts: Sequence[str]
) -> None:
    """Samples and scores a policy's answers, once for the same policy and prompts."""
    path = answers_path(folder, name, seed, split)
    homes = {"policy": name, "reference": "sft"}
    key = _asked(prompts, seed, split)
    for role, run in homes.items():
        meta = checkpoints.read_meta(folder / f"seed{seed}" / run)
        key[role] = meta["policy_fingerprint"]
    if outputs.finished(path, key):
        return
    policy = checkpoints.load_policy(folder / f"seed{seed}" / name)
    generations = generation.sample(
        policy,
        prompts,
        sampling=Sampling(temperature=_TEMPERATURE),
        max_new_tokens=_MAX_NEW_TOKENS,
        batch_size=100,
        seed=seed,
    )
    found = [(g.texts[0], len(g.tokens[0])) for g in generations]
    pairs = list(zip(prompts, [text for text, _ in found], strict=True))
    base = checkpoints.load_policy(folder / f"seed{seed}" / "sft")
    own, _ = score.score_pairs(policy, pairs, batch_size=100)
    reference, _ = score.score_pairs(base, pairs, batch_size=100)
    inference.write_jsonl(
        path,
        (
            {
                "prompt": prompt,
                "response": text,
                "reward": world.true_reward(prompt, text),
                "log_ratio": float(a - b),
                "num_tokens": tokens,
            }
            for prompt, (text, tokens), a, b in zip(
                prompts, found, own, reference, strict=True
            )
        ),
        key=key,
    )


def _asked(prompts: Sequence[str], seed: int, split: str) -> dict[str, Any]:
    """What answers depend on, but for the policies."""
    return {
        "split": split,
        "num_prompts": len(prompts),
        "prompts": outputs.text_sha256(json.dumps(list(prompts))),
        "seed": seed,
        "temperature": _TEMPERATURE,
        "max_new_tokens": _MAX_NEW_TOKENS,
    }


def _answers(
    folder: Path, name: str, seeds: int, split: str
) -> list[list[dict[str, Any]]]:
    paths = [answers_path(folder, name, seed, split) for seed in range(seeds)]
    return [[json.loads(x) for x in p.read_text().splitlines()] for p in paths]


def _means(answers: list[list[dict[str, Any]]]) -> dict[str, list[float]]:
    columns = (("reward", "reward"), ("kl", "log_ratio"), ("tokens", "num_tokens"))
    return {
        column: [float(np.mean([row[field] for row in rows])) for rows in answers]
        for column, field in columns
    }


def rewards(
    folder: Path, names: Sequence[str], seeds: int, split: str
) -> dict[str, dict[str, list[float]]]:
    """Means by policy and seed: ``{name: {"reward", "kl", "tokens": [one per seed]}}``.

    Args:
      folder: of the comparison.
      names: of policies that have answered.
      seeds: how many.
      split: of the prompts.
    """
    return {name: _means(_answers(folder, name, seeds, split)) for name in names}


def collect(
    folder: Path, names: Sequence[str], seeds: int, split: str
) -> dict[str, Any]:
    """Means by objective and seed, and the matrix of win rates over all seeds."""
    answers = {name: _answers(folder, name, seeds, split) for name in names}
    table = {name: _means(found) for name, found in answers.items()}
    # Prompts of different seeds are different units, even where their texts agree.
    flat = {name: [r for rows in answers[name] for r in rows] for name in names}
    wins: dict[str, dict[str, float]] = {}
    for a in names:
        wins[a] = {}
        for b in names:
            if a == b:
                continue
            compared = compare.compare_responses(
                [r["prompt"] for r in flat[a]],
                [r["response"] for r in flat[a]],
                [r["response"] for r in flat[b]],
                world.true_reward,
            )
            wins[a][b] = compared.win_rate.mean
    return {"objectives": table, "win_rates": wins}


def as_text(table: dict[str, dict[str, list[float]]]) -> str:
    """The table for a terminal, best reward first."""
    lines = [f"{'objective':<22}{'true reward':>12}{'KL':>9}{'tokens':>9}"]
    for name in sorted(table, key=lambda n: -np.mean(table[n]["reward"])):
        reward, kl, tokens = (
            np.mean(table[name][k]) for k in ("reward", "kl", "tokens")
        )
        lines.append(f"{name:<22}{reward:>12.3f}{kl:>9.2f}{tokens:>9.1f}")
    return "\n".join(lines)
