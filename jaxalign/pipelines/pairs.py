"""Preference pairs as `preference_strength` reads and repairs them, with their rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.data import jsonl, packed, records, tables
from jaxalign.data.bad_rows import FieldError, show
from jaxalign.evaluation.strength import BANDS, Repair, Strengths

# The columns of the authors' graded HH-RLHF (fnlp/hh-rlhf-strength-cleaned).
CHOSEN_SCORES, REJECTED_SCORES = "chosen score list", "rejected score list"
GPT4_LABEL = "GPT4 label"  # 1: as labelled, 0: the other response, -1: none

_TOLD = ("strength_mean", "strength_std", "band", "action")


def read(
    path: str | Path,
    field_map: Mapping[str, str] | None,
    on_bad_row: str,
    listing: Path | None = None,
) -> list[dict[str, Any]]:
    """The pairs of a file: ``{"prompt", "chosen", "rejected", "raw"}`` each.

    Rows of the authors' graded data have ``differences``, too, one for each model.

    Raises:
      DataError: listing bad rows, unless they are skipped.
    """
    first: Mapping[str, Any] = {}
    if packed.kind(path).lower() not in tables.DELIMITERS:
        rows = (row for _, row in jsonl.read_jsonl(path))
        first = next((row for row in rows if isinstance(row, Mapping)), {})
    if _name(first, CHOSEN_SCORES) is None:
        examples, _ = records.load(
            path,
            "preference",
            field_map=field_map,
            on_bad_row=on_bad_row,
            listing=listing,
        )
        return [
            {**{k: record[k] for k in ("prompt", "chosen", "rejected")}, "raw": e.raw}
            for e in examples
            for record in e.records
        ]
    return _graded(path, on_bad_row, listing)


def _graded(
    path: str | Path, on_bad_row: str, listing: Path | None
) -> list[dict[str, Any]]:
    bad, found = records.BadRows(listing), []
    for line, row in jsonl.read_jsonl(path):
        if not isinstance(row, Mapping):
            bad.add(row)
            continue
        try:
            found.append(graded_pair(row))
        except FieldError as error:
            bad.add(error.at(str(path), line))
    bad.kept = len(found)
    if bad.total and on_bad_row == "error":
        raise records.DataError(bad)
    bad.close()
    models = {len(pair["differences"]) for pair in found}
    if len(models) > 1:
        raise ValueError(
            f"{path}: rows were scored by {sorted(models)} models; expected as many "
            "for each."
        )
    return found


def graded_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the authors' graded data: lists of turns, and scores of each model.

    Raises:
      FieldError: naming the field at fault.
    """
    scores = []
    for wanted in (CHOSEN_SCORES, REJECTED_SCORES):
        values = row.get(_name(row, wanted) or wanted)
        if not isinstance(values, list) or not values:
            raise FieldError(wanted, "type", "a list of numbers", show(values))
        try:
            scores.append(np.array(values, np.float64))
        except (TypeError, ValueError):
            expected = "a list of numbers"
            raise FieldError(wanted, "type", expected, show(values)) from None
    if scores[0].shape != scores[1].shape:
        expected = f"as many as in {CHOSEN_SCORES!r}, {scores[0].size}"
        raise FieldError(REJECTED_SCORES, "shape", expected, str(scores[1].size))
    differences = scores[0] - scores[1]
    if not np.isfinite(differences).all():
        raise FieldError(CHOSEN_SCORES, "not finite", "finite numbers", "others")
    texts = {}
    for side in ("chosen", "rejected"):
        turns = row.get(side)
        if isinstance(turns, str):
            turns = [turns]
        if not isinstance(turns, list) or not all(isinstance(t, str) for t in turns):
            raise FieldError(side, "type", "a list of turns", show(turns))
        if len(turns) < 2:
            raise FieldError(side, "shape", "a prompt's turns and a response", "fewer")
        texts[side] = turns
    shared = os.path.commonprefix([t[:-1] for t in texts.values()])
    last = {side: turns[len(shared) :] for side, turns in texts.items()}
    if not shared or not all(last.values()):
        raise FieldError(
            "rejected", "shape", "the turns of chosen but the last", "other"
        )
    return {
        "prompt": "\n\n".join(shared).strip(),
        **{side: "\n\n".join(turns).strip() for side, turns in last.items()},
        "raw": row,
        "differences": differences.tolist(),
    }


def _name(row: Mapping[str, Any], wanted: str) -> str | None:
    """The name that a column has in a row, with spaces or underscores."""
    return next((n for n in (wanted, wanted.replace(" ", "_")) if n in row), None)


def fold(prompt: str, folds: int) -> int:
    """The fold of a prompt, whatever the seed of a run."""
    digest = hashlib.sha256(f"fold:{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % folds


def known_wrong(
    pairs: Sequence[Mapping[str, Any]], field: str | None
) -> np.ndarray | None:
    """1 where a label is known to be wrong, 0 where it is right, NaN where neither.

    Args:
      field: that is true of wrong labels; None: `GPT4_LABEL`, where there is one.

    Raises:
      ValueError: when no row has the field.
    """
    if field is None:
        found = [row["raw"].get(_name(row["raw"], GPT4_LABEL) or "") for row in pairs]
        told = np.array([{0: 1.0, 1: 0.0}.get(v, np.nan) for v in found])
        return told if np.isfinite(told).any() else None
    told = [row["raw"].get(field) for row in pairs]
    if all(value is None for value in told):
        raise ValueError(
            f"No row has the field {field!r} that --truth names; they have "
            f"{sorted(pairs[0]['raw'])}."
        )
    return np.array([np.nan if v is None else float(bool(v)) for v in told])


def strength_row(
    pair: Mapping[str, Any], found: Strengths, actions: Sequence[str], i: int
) -> dict[str, Any]:
    """A row with its fields, and what was found of it."""
    told = {
        "strength_mean": float(found.mean[i]),
        "strength_std": float(found.deviation[i]),
        "band": BANDS[int(found.band[i])],
        "action": actions[i],
    }
    return _with(pair["raw"], told)


def repaired_row(
    pair: Mapping[str, Any],
    found: Strengths,
    done: Repair,
    actions: Sequence[str],
    i: int,
) -> dict[str, Any]:
    """A row to train on: repaired, its fields kept, with the reason."""
    sides = ("rejected", "chosen") if done.flip[i] else ("chosen", "rejected")
    reason = (
        f"strength {found.mean[i]:.3g} +- {found.deviation[i]:.3g}, "
        f"percentile {100 * found.percentile[i]:.1f}: {BANDS[int(found.band[i])]}"
    )
    told = {
        "prompt": pair["prompt"],
        "chosen": pair[sides[0]],
        "rejected": pair[sides[1]],
        "margin": float(done.margin[i]),
        "pair_smoothing": float(done.smoothing[i]),
        "flipped": bool(done.flip[i]),
        "reason": reason,
    }
    return strength_row({"raw": _with(pair["raw"], told)}, found, actions, i)


def _with(raw: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """A row with more fields; of the same name and another value: ``original_``."""
    found = dict(raw)
    for name, value in told.items():
        if name in raw and raw[name] != value and f"original_{name}" not in raw:
            found[f"original_{name}"] = raw[name]
        found[name] = value
    return found
