"""HH-RLHF: dialogues whose last answer people preferred over another (2204.05862)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from jaxalign.data.bad_rows import FieldError, show
from jaxalign.prepare.tasks import add_task

TURN = "\n\nAssistant:"


def preferences(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Splits both dialogues where they part.

    The prompt is the dialogue up to and with the last ``Assistant:`` that both share;
    the responses are what follows it.
    """
    for field in ("chosen", "rejected"):
        if not isinstance(raw[field], str):
            raise FieldError(field, "type", "a dialogue as text", show(raw[field]))
    shared = os.path.commonprefix([raw["chosen"], raw["rejected"]])
    start = shared.rfind(TURN)
    if start < 0:
        raise FieldError(
            "chosen",
            "shape",
            f"a dialogue that shares a turn {TURN.strip()!r} with rejected",
            f"{len(shared)} shared characters without one",
        )
    end = start + len(TURN)
    return [
        {
            "prompt": shared[:end].strip(),
            "chosen": raw["chosen"][end:].strip(),
            "rejected": raw["rejected"][end:].strip(),
        }
    ]


add_task(
    "hh_rlhf",
    doc="Anthropic HH-RLHF: dialogues with a preferred and a rejected last answer.",
    records={"preference": preferences},
    source="huggingface:anthropic__hh_rlhf",
)
