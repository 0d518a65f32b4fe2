"""What reward models learn from, and the pairs of people that they are measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import configs, judges, remote
from jaxalign.data import jsonl, records
from jaxalign.evaluation import rewards
from jaxalign.objectives.reward import RewardObjective
from jaxalign.pipelines import pairs as pairs_lib
from jaxalign.pipelines import selection
from jaxalign.pipelines.study import Study
from jaxalign.training import run as runs

SIDES = ("prompt", "chosen", "rejected")
SOURCE = "prompt_source"  # of a prompt, in the files between
PARTS = 10  # of the prompts, of which one is held out

_PAIRS = 256  # judged between two saves
_OWN = ("DATA", "MODEL_DIR", "RANDOM_SEED")


def write_pairs(
    output: Path,
    data: Path,
    test: Path | None,
    held_out: bool,
    field_map: Mapping[str, str] | None,
    on_bad_row: str,
) -> None:
    """The human pairs to learn from, or those held out, as `pairs.read` has them.

    Held out are the pairs of `test`, or of one tenth of the prompts, whatever the seed.
    No pair to learn from has a prompt that is held out.
    """
    listing = output.with_name(f"{output.stem}.bad_rows.jsonl")
    given = (field_map, on_bad_row, listing)
    if held_out and test is not None:
        rows = pairs_lib.read(test, *given)
    else:
        rows = pairs_lib.read(data, *given)
        if test is None:
            rows = [r for r in rows if (_fold(r) == 0) == held_out]
        else:
            others = [r["prompt"] for r in pairs_lib.read(test, *given)]
            free = {*selection.unseen((r["prompt"] for r in rows), others)}
            same = {selection.same_text(p).casefold() for p in free}
            rows = [r for r in rows if _key(r["prompt"]) in same]
    if not rows:
        kind = "held out" if held_out else "to learn from"
        raise ValueError(
            f"No pair of {data} is {kind}: give --test=FILE with pairs of other "
            "prompts, or more prompts."
        )
    jsonl.write_rows(output, rows)


def _key(prompt: str) -> str:
    return selection.same_text(prompt).casefold()


def _fold(row: Mapping[str, Any]) -> int:
    return pairs_lib.fold(_key(row["prompt"]), PARTS)


def write_prompts(
    output: Path,
    prompts: Path | None,
    human: Path,
    test: Path,
    source: str | None,
    template: str | None,
) -> None:
    """Distinct prompts to sample from, none of which is held out.

    Those of a file, or those of the human pairs; with where each is from.
    """
    if prompts is None:
        rows = [(row["raw"], row["prompt"]) for row in jsonl.read_rows(human)]
    else:
        examples, _ = records.load(prompts, "prompts", chat_template=template)
        rows = [(e.raw, record["prompt"]) for e in examples for record in e.records]
    held_out = [row["prompt"] for row in jsonl.read_rows(test)]
    of: dict[str, Any] = {}
    for raw, prompt in rows:
        of.setdefault(prompt, raw)
    kept = selection.unseen(of, held_out)
    if not kept:
        raise ValueError(
            f"All {len(of)} prompts to sample from are held out for the evaluation: "
            "give --prompts=FILE with others."
        )
    if source is not None and not any(source in of[prompt] for prompt in kept):
        raise ValueError(f"No prompt has the field {source!r} that --source names.")
    more = [{SOURCE: str(of[p].get(source))} if source else {} for p in kept]
    jsonl.write_rows(
        output, [{"prompt": p, **own} for p, own in zip(kept, more, strict=True)]
    )


def verdicts(
    items: Sequence[Mapping[str, Any]], judge: judges.Judge | judges.PairwiseJudge
) -> list[float | None]:
    """The differences that a judge gives to held-out pairs; None for no verdict."""
    prompts, chosen, rejected = ([i[name] for i in items] for name in SIDES)
    if judges.is_pairwise(judge):
        gaps = rewards.logits(judges.preferences(judge, prompts, chosen, rejected)[0])
    else:
        both = judges.scores(judge, prompts * 2, chosen + rejected)
        gaps = rewards.differences(*np.split(both, 2))
    return [None if gap != gap else float(gap) for gap in gaps]


def metrics(gaps: Path, test: Path) -> dict[str, Any]:
    """Accuracy, log-loss and calibration of differences of held-out pairs."""
    found = np.array([np.nan if g is None else g for g in jsonl.read_rows(gaps)])
    prompts = [row["prompt"] for row in jsonl.read_rows(test)]
    told = rewards.pair_metrics(found, prompts).to_json()
    return {**told, "ece": rewards.reliability(found).ece}


def measured(
    study: Study, name: str, test: Path, judge: judges.Judge | judges.PairwiseJudge
) -> dict[str, Any]:
    """`metrics` of a judge, by a stage ``NAME.gaps.jsonl`` of a study."""
    rows = [{k: row[k] for k in SIDES} for row in jsonl.read_rows(test)]
    of = f"{name}.gaps.jsonl"
    return metrics(study.lines(of, verdicts, rows, batch=_PAIRS, judge=judge), test)


def raw(trained: Path) -> judges.Judge | judges.PairwiseJudge:
    """A run's judge; differences of raw scores are logits of the preference."""
    return judges.resolve(f"reward:{trained}?scale=raw")


def place(checkpoint: str) -> str | Path:
    """A checkpoint as a stage counts it, by content."""
    return checkpoint if remote.is_remote(checkpoint) else Path(checkpoint).absolute()


def file(path: str | None) -> Path | None:
    """A file as a stage counts it, fetched from a bucket."""
    return None if path is None else Path(remote.copy(path)).absolute()


def check_run(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str | Path],
    checkpoint: str | None,
) -> None:
    """Refuses a run that trains no rewards on pairs."""
    if not {*_OWN} <= configs.macros(gin_files, search_paths):
        raise configs.ConfigError(
            f"No run in {', '.join(map(str, gin_files))}: add a file that describes "
            "one, such as --gin_file=runs/reward_model.gin."
        )
    spelt = ["DATA = 'x'", "MODEL_DIR = 'x'"]
    if checkpoint is not None:  # the network may be the checkpoint's
        spelt.append(f"INITIAL_CHECKPOINT_PATH = {checkpoint!r}")
    configs.parse(gin_files, [*bindings, *spelt], search_paths)
    described = runs.from_gin()
    objective = described.objective(model=described.model)
    if not isinstance(objective, RewardObjective) or objective.schema != "preference":
        raise ValueError(
            f"{type(objective).__name__} trains no rewards on preference pairs: take "
            "runs/reward_model.gin."
        )
