"""Which preferences an ensemble of reward models doubts, and a file without the doubts.

Wang et al. 2024, *Secrets of RLHF in Large Language Models Part II* (arXiv 2401.06080):
several reward models score every pair; where they agree that the rejected response is
better, the label is likely wrong. A study: the same command after a kill goes on where
it stopped.

    run_dir/pairs.jsonl, folds/*.jsonl, models/*/, scores/*.jsonl
            strengths.jsonl, cleaned.jsonl, study.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxalign import configs, remote
from jaxalign.data import jsonl
from jaxalign.evaluation import intervals, strength
from jaxalign.models.reward import PAIRWISE
from jaxalign.objectives.reward import RewardObjective
from jaxalign.pipelines import pairs as pairs_lib
from jaxalign.pipelines import strengths
from jaxalign.pipelines.study import Study
from jaxalign.report import strength as page
from jaxalign.training import inputs
from jaxalign.training import run as runs

_OWN = ("DATA", "MODEL_DIR", "TRAIN_STEPS", "RANDOM_SEED")
_MEMBER_SHARE = 0.8  # of the prompts, that each head of a shared trunk sees


def run(
    *,
    data: str,
    run_dir: str,
    checkpoint: str | None = None,
    members: int = 10,
    folds: int = 5,
    shared_trunk: bool = False,
    steps: int | None = None,
    zscore: bool = False,
    mode: Literal[
        "flip_margin", "flip", "margin", "soft_margin", "bands"
    ] = "flip_margin",
    flip_share: float = 0.1,
    smoothing: float = 0.2,
    truth: str | None = None,
    gin_files: Sequence[str] = ("runs/reward_model.gin",),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str | Path] = (),
    field_map: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    seed: int = 0,
    redo: Sequence[str] = (),
) -> str:
    """Grades preference pairs by an ensemble of reward models; writes a cleaned file.

    Args:
      data: JSON Lines, CSV or TSV of ``prompt``, ``chosen`` and ``rejected``; or the
        authors' graded HH-RLHF, whose scores are taken as they are.
      run_dir: where all is written. ``strengths.jsonl``: each row as it was read, with
        ``strength_mean``, ``strength_std``, ``band`` and ``action``. ``cleaned.jsonl``:
        the same with the action taken, and the reason.
      checkpoint: what the reward models start from.
      members: models; each has its own head and order of the pairs.
      folds: each pair is scored by models that have not seen its prompt, one training
        for each fold; 0: by models that were trained on all pairs, as in the paper.
      shared_trunk: the members are heads of one model, each of which sees 80 % of the
        prompts: one training in place of `members`.
      steps: of each training; by default one epoch.
      zscore: divide each model's differences by their deviation first.
      mode: what is done: flip_margin, flip, margin, soft_margin or bands; see
        `jaxalign.evaluation.strength.repair`.
      flip_share: of the pairs, the weakest, whose labels may be flipped.
      smoothing: of labels that are softened.
      truth: a field that is true where a label is known to be wrong; the page then says
        how well it was found.
      gin_files: of the reward model's run, as in ``--gin_file``.
      bindings: ``"NAME = VALUE"`` for it.
      search_paths: folders to look for gin files in.
      field_map: our field names to the file's.
      on_bad_row: ``"error"`` or ``"skip"``.
      seed: of the members' heads and orders; folds do not depend on it.
      redo: stages to make again, such as ``scores/fold0.0.jsonl``.

    Returns:
      A table of bands and actions.

    Raises:
      ValueError: before anything is trained, for settings that cannot be; when models
        tell nothing apart.
    """
    if members < 1 or folds < 0 or folds == 1:
        raise ValueError(
            "--members must be at least 1 and --folds 0 or at least 2, got "
            f"{members} and {folds}."
        )
    repair = {"mode": mode, "flip_share": flip_share, "smoothing": smoothing}
    strength.repair(
        strength.strengths(np.diag([1.0, 3.0])), **repair
    )  # refuses what cannot be
    source: dict[str, Any] = {"field_map": field_map, "on_bad_row": on_bad_row}
    with Study(run_dir, redo=redo) as study:
        pairs = study.file(
            "pairs.jsonl", strengths.write_pairs, data=Path(remote.copy(data)), **source
        )
        rows = jsonl.read_rows(pairs)
        if not rows:
            raise ValueError(f"{data} holds no pairs.")
        held_out = None
        scores: list[Path] = []
        if "differences" not in rows[0]:
            held_out = folds > 0
            given = (gin_files, bindings, search_paths)
            how = {"members": members, "shared_trunk": shared_trunk, "steps": steps}
            scores = _ensemble(study, pairs, rows, folds, given, how, checkpoint, seed)
        asked = {"pairs": pairs, "scores": scores, "zscore": zscore, **repair}
        study.file("strengths.jsonl", strengths.write_strengths, cleaned=False, **asked)
        study.file("cleaned.jsonl", strengths.write_strengths, cleaned=True, **asked)
        gaps = strengths.differences(rows, scores)
        found = strength.strengths(gaps, zscore=zscore)
        actions = strength.repair(found, **repair).actions()
        shown = [{**row, "action": a} for row, a in zip(rows, actions, strict=True)]
        wrong = pairs_lib.known_wrong(rows, truth)
        body = page.body(shown, gaps, found, held_out=held_out, truth=wrong)
        study.page("Preference strength", body)
        return _table(study.folder, found, actions, wrong)


def _ensemble(
    study: Study,
    pairs: Path,
    rows: Sequence[Mapping[str, Any]],
    folds: int,
    given: tuple[Sequence[str], Sequence[str], Sequence[str | Path]],
    how: Mapping[str, Any],
    checkpoint: str | None,
    seed: int,
) -> list[Path]:
    """Trains the models of each fold and has them score its pairs."""
    parts = sorted({pairs_lib.fold(r["prompt"], folds) for r in rows}) if folds else []
    if folds and len(parts) < 2:
        raise ValueError(
            f"All {len(rows)} pairs fall into {len(parts)} of {folds} folds by their "
            "prompts: there is nothing to hold out. Give --folds=0, or more prompts."
        )
    gin_files, bindings, search_paths = given
    heads = how["members"] if how["shared_trunk"] else 1
    if heads > 1:
        bindings = [*bindings, f"MEMBERS = {heads}", f"MEMBER_SHARE = {_MEMBER_SHARE}"]
    common: dict[str, Any] = {"EVAL_FRACTION": 0.0}
    if checkpoint is not None:
        common["INITIAL_CHECKPOINT_PATH"] = Path(checkpoint).absolute()
    cache = {"CACHE_DIR": str(study.folder / "cache")}
    found = []
    for part in parts or [None]:
        name = "all" if part is None else f"fold{part}"
        of: dict[str, Any] = {"pairs": pairs, "folds": folds, "part": part}
        data = study.file(f"folds/{name}.jsonl", strengths.write_fold, **of)
        for member in range(1 if heads > 1 else how["members"]):
            own = {**common, "DATA": data, "RANDOM_SEED": seed + member}
            if member == 0:
                epoch = _epoch(gin_files, bindings, search_paths, {**own, **cache})
                steps = how["steps"] or epoch
            trained = study.train(
                f"models/{name}.{member}",
                gin_files,
                bindings=bindings,
                search_paths=search_paths,
                execution={**cache, "CHECKPOINT_PERIOD": steps, "EVAL_PERIOD": steps},
                TRAIN_STEPS=steps,
                **own,
            )
            found.append(
                study.file(
                    f"scores/{name}.{member}.jsonl",
                    strengths.write_scores,
                    model=trained,
                    **of,
                )
            )
    return found


def _epoch(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str | Path],
    macros: Mapping[str, Any],
) -> int:
    """The steps of one epoch; refuses a run that trains no scores on pairs."""
    if not {*_OWN} <= configs.macros(gin_files, search_paths):
        raise configs.ConfigError(
            f"No run in {', '.join(map(str, gin_files))}: add a file that describes "
            "one, such as --gin_file=runs/reward_model.gin."
        )
    spelt = [
        f"{k} = {(str(v) if isinstance(v, Path) else v)!r}" for k, v in macros.items()
    ]
    configs.parse(gin_files, [*bindings, *spelt, "MODEL_DIR = 'x'"], search_paths)
    described = runs.from_gin()
    objective = described.objective(model=described.model)
    name = type(objective).__name__
    if not isinstance(objective, RewardObjective) or objective.schema != "preference":
        raise ValueError(
            f"{name} trains no scores on preference pairs: take runs/reward_model.gin."
        )
    if objective.read in PAIRWISE:
        raise ValueError(
            f"READ = {objective.read!r} compares two responses and scores none; the "
            "strength of a pair is a difference of scores: take 'response_last'."
        )
    built = inputs.build(described.dataset, objective, described.vocabulary)
    return built.train.steps_per_epoch


def _table(
    folder: Path,
    found: strength.Strengths,
    actions: Sequence[str],
    wrong: np.ndarray | None,
) -> str:
    count = len(actions)
    lines = [f"{'band':<12}{'pairs':>8}{'strength':>10}{'deviation':>11}"]
    for i, name in enumerate(strength.BANDS):
        inside = found.band == i
        if inside.any():
            mean, deviation = found.mean[inside].mean(), found.deviation[inside].mean()
            lines.append(f"{name:<12}{inside.sum():>8,}{mean:>10.3f}{deviation:>11.3f}")
    told = [f"{name} {actions.count(name):,}" for name in sorted({*actions})]
    share = intervals.wilson_interval(int((found.mean < 0).sum()), count)
    lines += [
        "",
        f"Done: {', '.join(told)}.",
        f"Negative strength: {share.mean:.1%} of {count:,} pairs (95% interval "
        f"{share.low:.1%} to {share.high:.1%}).",
    ]
    if wrong is not None:
        auroc = page.told_apart(found, wrong)
        lines.append(f"AUROC of low strength for labels known to be wrong: {auroc:.3f}")
    lines.append(f"{folder}/strengths.jsonl, cleaned.jsonl, study.html")
    return "\n".join(lines)
