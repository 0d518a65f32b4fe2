"""AlpacaEval: models' answers against a baseline's, as a judge saw them.

One object a line: ``instruction``, ``baseline`` (its answer) and ``responses``, a list
of ``{"generator", "text", "preference"}`` with the preference from 1 (the baseline is
better) to 2 (the response is).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.data.bad_rows import FieldError, show
from jaxalign.prepare.tasks import add_task, as_rows


def win_probability(response: Mapping[str, Any]) -> float:
    """How sure the judge is that the response beats the baseline, in [0, 1]."""
    value = response["preference"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldError("preference", "type", "a number in [1, 2]", show(value))
    if not 1 <= value <= 2:
        raise FieldError("preference", "range", "a number in [1, 2]", show(value))
    return value - 1.0


def demonstrations(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The baseline's answer."""
    return [{"prompt": raw["instruction"], "completion": raw["baseline"]}]


def trajectories(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every response; its win probability is the reward, above a half desirable."""
    return [
        {
            "prompt": raw["instruction"],
            "completion": response["text"],
            "reward": win_probability(response),
            "label": win_probability(response) > 0.5,
        }
        for response in as_rows(raw["responses"])
    ]


def preferences(
    raw: Mapping[str, Any], *, confidence: float = 0.9
) -> list[dict[str, Any] | None]:
    """Baseline against response, where the judge was at least this sure."""
    records: list[dict[str, Any] | None] = []
    for response in as_rows(raw["responses"]):
        win = win_probability(response)
        texts = [response["text"], raw["baseline"]]
        if max(win, 1 - win) < confidence or texts[0] == texts[1]:
            records.append(None)
            continue
        chosen, rejected = texts if win > 0.5 else texts[::-1]
        records.append(
            {
                "prompt": raw["instruction"],
                "chosen": chosen,
                "rejected": rejected,
                "margin": abs(2 * win - 1),
            }
        )
    return records


add_task(
    "alpaca_eval",
    doc="AlpacaEval annotations: responses judged against a baseline's.",
    records={
        "supervised": demonstrations,
        "trajectory": trajectories,
        "preference": preferences,
    },
)
