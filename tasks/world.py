"""The embedded village (``jaxalign.world``) as the data set ``world``, any schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxalign import world
from jaxalign.prepare.tasks import add_task


def _drawn(schema: str) -> Callable[[Mapping[str, Any]], list[dict[str, Any]]]:
    def records(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [world.draw(schema, raw["prompt"], raw["key"])]

    return records


def rationales(
    raw: Mapping[str, Any], *, kind: str = "specific"
) -> list[dict[str, Any]]:
    """Pairs with the judge's reasons, general or specific."""
    return [world.draw("rationale", raw["prompt"], raw["key"], kind=kind)]


add_task(
    "world",
    doc="The embedded village: generated, with an exact judge of any response.",
    records={schema: _drawn(schema) for schema in world.SCHEMAS}
    | {"rationale": rationales},
    source=world.draws,
    made_by=(world.draw, world.judge, world.parse),
)
