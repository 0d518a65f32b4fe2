"""``jaxalign score --judge=NAME``: a judge's numbers for the rows of a file.

Lines are appended as they are judged, so that the same command, started again after a
kill, asks for at most one batch twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign import judges, remote
from jaxalign.data import jsonl, packed, tables
from jaxalign.data.bad_rows import BadRow
from jaxalign.inference import generation, outputs

_log = logging.getLogger(__name__)

_AT_ONCE = 256  # rows of a batch; a kill asks for so many again at most
SCORE, CHOSEN, REJECTED = "score", "chosen_score", "rejected_score"


def score(
    judge: str,
    *,
    data: str,
    output: str,
    field_map: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    template: str | None = None,
) -> int:
    """Scores a file's completions or pairs; see `jaxalign.inference.score.score`.

    Args:
      judge: a name, see `jaxalign.judges`.
      template: of chat messages, as text.

    Returns:
      The number of lines.

    Raises:
      ValueError: when a finished output was made with other settings, the rows have
        fields of the names that are to be written, or the judge compares responses and
        the rows hold no pairs.
    """
    judging = judges.resolve(judge)
    place = remote.local_only(output, "--output, which grows line by line,")
    asked = {
        "verb": "score",
        "judge": judging.fingerprint,
        "data": outputs.input_key(data),
        "field_map": field_map,
        "on_bad_row": on_bad_row,
    }
    if template is not None:
        asked["chat_template"] = template
    count = outputs.kept(place, asked)
    if count >= 0:
        return count
    schema = _schema(data, field_map)
    if judges.is_pairwise(judging) and schema != "preference":
        raise ValueError(
            f"The judge {judge} compares two responses: it scores rows with chosen and "
            f"rejected, and {data} has none."
        )
    rows = generation.read_rows(data, schema, output, field_map, on_bad_row, template)
    names = (CHOSEN, REJECTED) if schema == "preference" else (SCORE,)
    _check_free(rows, names, data)
    told = _Told(schema == "preference")
    with generation.appending(place, asked) as (there, write):
        for first in range(there, len(rows), _AT_ONCE):
            part = rows[first : first + _AT_ONCE]
            found = list(zip(*_scores(judging, schema, part), strict=True))
            told.add(found)
            write(
                [
                    jsonl.json_line({**raw, **dict(zip(names, scores, strict=True))})
                    for (raw, _), scores in zip(part, found, strict=True)
                ]
            )
    told.log(judge)
    return len(rows)


def _schema(data: str, field_map: Mapping[str, str] | None) -> str:
    """``"preference"`` of a file whose first row holds a pair, and no completion."""
    table = packed.kind(data).lower() in tables.DELIMITERS
    read = tables.read_table(data) if table else jsonl.read_jsonl(data)
    first = next((row for _, row in read if not isinstance(row, BadRow)), {})
    names = {*first, *(field_map or {})}
    pair = {"chosen", "rejected"} <= names and "completion" not in names
    return "preference" if pair else "supervised"


def _check_free(
    rows: Sequence[tuple[Mapping[str, Any], Any]], names: Sequence[str], data: str
) -> None:
    for number, (raw, _) in enumerate(rows, 1):
        if taken := [name for name in names if name in raw]:
            raise ValueError(
                f"{data}: row {number} has a field {taken[0]!r} already, which would "
                "be written over. Rename it."
            )


def _scores(
    judge: Any, schema: str, rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> Iterator[list[float | None]]:
    """A list for each field that is written; None for no verdict."""
    prompts, about = [r["prompt"] for _, r in rows], [raw for raw, _ in rows]
    if schema != "preference":
        texts = [record["completion"] for _, record in rows]
        yield _json(judges.scores(judge, prompts, texts, about))
        return
    pair = [[record[side] for _, record in rows] for side in ("chosen", "rejected")]
    if judges.is_pairwise(judge):
        preferred, _ = judges.preferences(judge, prompts, *pair, about)
        both = np.append(preferred, 1.0 - preferred)
    else:
        both = judges.scores(judge, prompts * 2, pair[0] + pair[1], about * 2)
    yield from map(_json, np.split(both, 2))


def _json(scores: np.ndarray) -> list[float | None]:
    """As the shortest numbers that are the same in float32."""
    found = np.asarray(scores, np.float32)
    return [None if np.isnan(s) else float(str(s)) for s in found]


class _Told:
    """What is told at the end: how often the chosen response is ahead."""

    def __init__(self, pairs: bool):
        self.pairs, self.ahead, self.tied, self.missing, self.all = pairs, 0, 0, 0, 0

    def add(self, found: Sequence[Sequence[float | None]]) -> None:
        for scores in found:
            self.all += 1
            if None in scores:
                self.missing += 1
            elif self.pairs:
                self.ahead += scores[0] > scores[1]
                self.tied += scores[0] == scores[1]

    def log(self, judge: str) -> None:
        judged = self.all - self.missing
        if self.missing:
            _log.warning("%s: %d of %d rows have no verdict.", judge, self.missing,
                         self.all)  # fmt: skip
        if self.pairs and judged:
            _log.info(
                "%s: the chosen response is ahead in %d of %d pairs (%.1f %%), %d tie.",
                judge,
                self.ahead,
                judged,
                100.0 * self.ahead / judged,
                self.tied,
            )
        if self.pairs and judged and self.tied == judged:
            _log.warning("%s: all %d pairs tie: it tells nothing apart.", judge, judged)
