"""Samples of all runs, side by side. Run data is always escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from jaxalign.report.charts import number
from jaxalign.report.runs import Run
from jaxalign.report.sections import chip

esc = html.escape

_MAX_PROMPTS = 20
_MAX_RESPONSES = 4
_MAX_CHARACTERS = 6000


def samples(runs: Sequence[Run]) -> str:
    """Responses of all runs to one prompt, side by side."""
    by_prompt: dict[str, dict[str, list[dict[str, Any]]]] = {}
    targets: dict[str, str] = {}
    for run in runs:
        for row in run.samples:
            prompt = str(row["prompt"])
            by_prompt.setdefault(prompt, {}).setdefault(run.name, []).append(row)
            if row.get("target") is not None:
                targets.setdefault(prompt, str(row["target"]))
    if not by_prompt:
        return "<p>No run has samples.</p>"
    # Prompts that more runs answered first; otherwise as they came.
    order = sorted(by_prompt, key=lambda p: -len(by_prompt[p]))[:_MAX_PROMPTS]
    sampled = [run for run in runs if run.samples_step is not None]
    steps = ", ".join(f"{run.name} at step {run.samples_step}" for run in sampled)
    out = [
        f'<p class="note">{len(order)} of {len(by_prompt)} prompts. Samples of '
        f"{esc(steps)}. log p is the sum over a response's tokens, in nats.</p>"
    ]
    for prompt in order:
        given = by_prompt[prompt]
        columns = [
            _response(run, row, i)
            for run in runs
            for i, row in enumerate(given.get(run.name, [])[:_MAX_RESPONSES])
        ]
        absent = ", ".join(r.name for r in runs if r.samples and r.name not in given)
        if absent:
            columns.append(f'<div class="caption">No answer: {esc(absent)}</div>')
        parts = [f'<div class="prompt"><h4>Prompt</h4>{_text(prompt)}</div>']
        if prompt in targets:
            text = _text(targets[prompt])
            parts.append(f'<div class="target"><h4>Target</h4>{text}</div>')
        parts.append(f'<div class="responses">{"".join(columns)}</div>')
        out.append(f"<article>{''.join(parts)}</article>")
    return "".join(out)


def _response(run: Run, row: dict[str, Any], index: int) -> str:
    facts = []
    for key, text in (("logp", "log p {}"), ("num_tokens", "{} tokens")):
        value = row.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            facts.append(text.format(number(value) if key == "logp" else int(value)))
    label = run.name if index == 0 else f"{run.name} · {index + 1}"
    return (
        f'<div class="response c{run.colour}"><div class="who">{chip(run, label)}'
        f"<small>{' · '.join(facts)}</small></div>{_text(str(row['response']))}</div>"
    )


def _text(text: str) -> str:
    if not text:
        return '<div class="text empty">(empty)</div>'
    cut = ""
    if len(text) > _MAX_CHARACTERS:
        cut = f" <em>… {len(text) - _MAX_CHARACTERS} more characters</em>"
    # Lone surrogates cannot be written as UTF-8.
    shown = text[:_MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
    return f'<div class="text" dir="auto">{esc(shown)}{cut}</div>'
