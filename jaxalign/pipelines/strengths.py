"""The stages of `preference_strength`: functions of files, each of which writes one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import judges
from jaxalign.data import jsonl
from jaxalign.evaluation import strength
from jaxalign.pipelines import pairs as pairs_lib


def write_pairs(
    output: Path, data: Path, field_map: Mapping[str, str] | None, on_bad_row: str
) -> None:
    """The pairs of the data, as `pairs.read` has them."""
    listing = output.with_name("bad_rows.jsonl")
    jsonl.write_rows(output, pairs_lib.read(data, field_map, on_bad_row, listing))


def write_fold(output: Path, pairs: Path, folds: int, part: int | None) -> None:
    """What the models of a fold learn from: all other pairs."""
    jsonl.write_rows(
        output,
        [
            {k: row[k] for k in ("prompt", "chosen", "rejected")}
            for row in jsonl.read_rows(pairs)
            if part is None or pairs_lib.fold(row["prompt"], folds) != part
        ],
    )


def write_scores(
    output: Path, model: Path, pairs: Path, folds: int, part: int | None
) -> None:
    """``{"pair", "differences"}`` of each pair of a fold, one number for each head."""
    rows = [
        (i, row)
        for i, row in enumerate(jsonl.read_rows(pairs))
        if part is None or pairs_lib.fold(row["prompt"], folds) == part
    ]
    judge = judges.resolve(f"reward:{model}?scale=raw")
    prompts = [row["prompt"] for _, row in rows]
    texts = [row[side] for side in ("chosen", "rejected") for _, row in rows]
    scores = judge.heads(prompts * 2, texts)
    gaps = np.float64(scores[: len(rows)]) - np.float64(scores[len(rows) :])
    jsonl.write_rows(
        output,
        [
            {"pair": i, "differences": gap.tolist()}
            for (i, _), gap in zip(rows, gaps, strict=True)
        ],
    )


def differences(
    rows: Sequence[Mapping[str, Any]], scores: Sequence[Path]
) -> np.ndarray:
    """``[N, M]``: those that came with the rows, or of the models by fold."""
    if not scores:
        return np.array([row["differences"] for row in rows], np.float64)
    found: list[list[float]] = [[] for _ in rows]
    for path in sorted(scores, key=_member):
        for line in jsonl.read_rows(path):
            found[line["pair"]] += line["differences"]
    return np.array(found, np.float64)


def _member(path: Path) -> tuple[int, str]:
    """Members in order, whatever the fold."""
    return int(re.findall(r"\d+", path.stem)[-1]), path.stem


def write_strengths(
    output: Path,
    pairs: Path,
    scores: Sequence[Path],
    zscore: bool,
    cleaned: bool,
    **repair: Any,
) -> None:
    """Every row with its strength, repaired or as it was."""
    rows = jsonl.read_rows(pairs)
    found = strength.strengths(differences(rows, scores), zscore=zscore)
    done = strength.repair(found, **repair)
    actions = done.actions()
    jsonl.write_rows(
        output,
        [
            pairs_lib.repaired_row(row, found, done, actions, i)
            if cleaned
            else pairs_lib.strength_row(row, found, actions, i)
            for i, row in enumerate(rows)
        ],
    )
