"""A plan as a text table and as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from jaxalign.planning.hardware import GIB
from jaxalign.report import style

_COLUMNS = (
    *("topology", "mesh d,f,t", "step", "fits", "params GiB", "optimizer GiB"),
    *("act+temp GiB", "limit GiB", "PFLOP", "sent GiB", "predicted s"),
)


def rows(plan: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per candidate and program; the cheapest candidate is starred."""
    lines = []
    for number, found in enumerate(plan["candidates"]):
        star = " *" if number == plan["cheapest"] else ""
        for step, program in found["programs"].items():
            sent = program["collective_bytes"]
            seconds = program["predicted_step_seconds"]
            fits = "yes"
            if not program["fits"]:
                short = program["shortfall"]
                fits = f"no, {'>' * short['at_least']}{_gib(short['short'])} GiB short"
            line = [found["topology"], _mesh(found) + star, step, fits]
            line += map(_gib, program["hbm_bytes"].values())
            line.append(f"{program['flops_per_step'] / 1e15:.3g}")
            line.append("-" if sent is None else _gib(sum(sent.values())))
            line.append("-" if seconds is None else f"{seconds:.3g}")
            lines.append(tuple(line))
    return lines


def _mesh(found: dict[str, Any]) -> str:
    return ",".join(str(n) for n in found["mesh"].values())


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f}"


def _notes(plan: dict[str, Any]) -> list[str]:
    notes = []
    for found in plan["candidates"]:
        for step, program in found["programs"].items():
            if not program["fits"]:
                where = f"{found['topology']} mesh {_mesh(found)}, {step}"
                notes.append(f"{where}: {program['shortfall']['message']}.")
    notes += [f"Left out: {reason}" for reason in plan["left_out"]]
    if plan["cheapest"] is None:
        notes.append(
            "Nothing fits. Try more fsdp, a larger slice, a smaller BATCH_SIZE, more "
            "NUM_MICROBATCHES, models.T5Config.remat_policy='full', or "
            "models.T5Config.logits_chunk."
        )
    else:
        best = plan["candidates"][plan["cheapest"]]
        line = f"Cheapest that fits (*): {best['topology']}, mesh {best['mesh']}"
        if "largest_batch" in best:
            line += f"; largest BATCH_SIZE that trains: {best['largest_batch']}"
        notes.append(line + ".")
    counts = plan["candidates"][0]["parameter_count"]
    networks = ", ".join(f"{name} {n:,}" for name, n in counts.items())
    notes.append(f"Parameters: {networks}.")
    return notes


def table(plan: dict[str, Any]) -> str:
    """The plan as text; memory and communication are per device."""
    lines = [_COLUMNS, *rows(plan)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    assumed = [f"  - {line}" for line in plan["candidates"][0]["assumptions"]]
    return "\n".join([*text, "", *_notes(plan), "", "Assumed:", *assumed])


def html(plan: dict[str, Any], title: str = "Plan") -> str:
    """The plan as one self-contained page."""

    def all_in(tag: str, texts: Iterable[str]) -> str:
        return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)

    lines = [f"<tr>{all_in('td', line)}</tr>" for line in rows(plan)]
    assumed = all_in("li", plan["candidates"][0]["assumptions"])
    return style.page(
        title,
        f"<h1>{escape(title)}</h1><p class='sub'>Memory and bytes sent are "
        "per device; a star marks the cheapest mesh that fits.</p>"
        f"{style.table(all_in('th', _COLUMNS), lines)}{all_in('p', _notes(plan))}"
        f"<h2>Assumed</h2><ul>{assumed}</ul>",
    )
