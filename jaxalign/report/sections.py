"""Headers, results, settings and samples as HTML. Run data is always escaped."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign.report import charts
from jaxalign.report.charts import number
from jaxalign.report.runs import Run, gin_bindings

esc = html.escape

_MAX_PROMPTS = 20
_MAX_RESPONSES = 4
_MAX_CHARACTERS = 6000


def chip(run: Run, text: str | None = None) -> str:
    return f'<span class="chip c{run.colour}">{esc(text or run.name)}</span>'


def key(run: Run) -> str:
    return f'<i class="key c{run.colour}"></i>{esc(run.name)}'


# --- Results --------------------------------------------------------------------


def results_table(path: Path, rows: dict[str, dict[str, Any]], runs: list[Run]) -> str:
    """The summary of ``results.json``, with a point range per row."""
    colours = {run.path.name: run.colour for run in runs}
    taken = set(colours.values())
    spare = [c for c in range(10) if c not in taken] or list(range(10))
    means = {k: v.get("true_reward") for k, v in rows.items()}
    intervals = {k: _interval(v.get("ci95")) for k, v in rows.items()}
    known = [m for m in means.values() if _is_number(m)]
    limits = None
    if known:
        ends = known + [x for i in intervals.values() if i for x in i]
        pad = 0.06 * (max(ends) - min(ends)) or 0.5
        limits = (min(ends) - pad, max(ends) + pad)
    used = {"true_reward", "ci95", "win_rate_vs_sft", "win_rate_ci95"}
    extra = list(dict.fromkeys(k for v in rows.values() for k in v if k not in used))
    has_wins = any("win_rate_vs_sft" in v for v in rows.values())
    head = ["<th>run</th>", '<th class="num">true reward</th>']
    head += ["<th>mean and 95% interval</th>"] if limits else []
    head += ['<th class="num">win rate vs SFT</th>'] if has_wins else []
    head += [f'<th class="num">{esc(k.replace("_", " "))}</th>' for k in extra]
    body = []
    for i, (name, row) in enumerate(rows.items()):
        colour = colours.get(name, spare[i % len(spare)])
        mean, interval = means[name], intervals[name]
        cells = [f'<th scope="row"><i class="key c{colour}"></i>{esc(name)}</th>']
        text = f"{mean:.3f}" if _is_number(mean) else "—"
        if interval:
            text += f" <small>[{interval[0]:.3f}, {interval[1]:.3f}]</small>"
        cells.append(f'<td class="num">{text}</td>')
        if limits:
            first = next(iter(means.values()))
            baseline = first if _is_number(first) else None
            picture = "—"
            if _is_number(mean):
                picture = charts.point_range(
                    mean, interval, limits, colour=colour, baseline=baseline
                )
            cells.append(f"<td>{picture}</td>")
        if has_wins:
            cells.append(f'<td class="num">{_win_rate(row)}</td>')
        cells += [f'<td class="num">{_plain(row.get(k))}</td>' for k in extra]
        body.append(f"<tr>{''.join(cells)}</tr>")
    if limits:
        after = "<td></td>" * (int(has_wins) + len(extra))
        axis = charts.range_axis(limits)
        body.append(
            f'<tr class="axis-row"><td></td><td></td><td>{axis}</td>{after}</tr>'
        )
    return (
        f'<p class="note">From <code>{esc(path.parent.name)}/{path.name}</code>. The '
        f"dashed line is the mean of {esc(next(iter(rows)))}.</p>"
        f'<div class="scroll"><table class="results"><thead><tr>{"".join(head)}</tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def _interval(value: Any) -> tuple[float, float] | None:
    if isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)):
        return value[0], value[1]
    return None


def _win_rate(row: dict[str, Any]) -> str:
    rate = row.get("win_rate_vs_sft")
    if not _is_number(rate):
        return "—"
    text = f"{100 * rate:.1f}%"
    interval = _interval(row.get("win_rate_ci95"))
    if interval:
        low, high = interval
        text += f" <small>[{100 * low:.1f}, {100 * high:.1f}]</small>"
    return text


def _plain(value: Any) -> str:
    if _is_number(value):
        return number(value)
    if _interval(value):
        return f"[{number(value[0])}, {number(value[1])}]"
    return "—" if value is None else esc(str(value))


# --- Headers and settings ------------------------------------------------------


def headers(runs: list[Run]) -> str:
    """One line a run: what it is, and which data and parameters it stands for."""
    out = []
    for run in runs:
        facts = _facts(run)
        shown = [
            f"{label} {_cell(facts[key])}".strip()
            for label, key in (
                ("", "objective"),
                ("step", "steps"),
                ("", "wall time"),
                ("data", "data fingerprint"),
                ("params", "params fingerprint"),
            )
            if key in facts
        ]
        text = " · ".join(shown) or "nothing recorded"
        out.append(f"<li>{chip(run)} <span>{text}</span></li>")
    return f'<ul class="heads">{"".join(out)}</ul>'


def runs_table(runs: list[Run]) -> str:
    """What each run was: one column a run, equal cells merged."""
    rows = [
        (label, [facts.get(label) for facts in map(_facts, runs)])
        for label in _labels(runs)
    ]
    head = "".join(f'<th scope="col">{key(run)}</th>' for run in runs)
    body = []
    for label, values in rows:
        if all(v == values[0] for v in values):
            cells = f'<td colspan="{len(runs)}">{_cell(values[0])}</td>'
        else:
            cells = "".join(f'<td class="differs">{_cell(v)}</td>' for v in values)
        body.append(f'<tr><th scope="row">{esc(label)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="runs"><thead><tr><th></th>{head}</tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _labels(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(label for run in runs for label in _facts(run)))


def _facts(run: Run) -> dict[str, str]:
    """The settings and identities worth comparing, most important first."""
    m = run.manifest
    facts: dict[str, Any] = {"objective": m.get("objective")}
    last = max((int(s[-1]) for s, _ in run.metrics.values()), default=None)
    step = m.get("step", last)
    if step is not None:
        facts["steps"] = f"{step}" + (f" ({m['status']})" if m.get("status") else "")
    elif m.get("status"):
        facts["steps"] = m["status"]
    if "time" in run.metrics:
        times = run.metrics["time"][1]
        facts["wall time"] = _duration(float(times[-1] - times[0]))
    facts["warnings"] = m.get("warnings")
    model = m.get("model")
    if isinstance(model, dict):
        facts["model"] = (
            f"{model.get('num_encoder_layers', '?')}+"
            f"{model.get('num_decoder_layers', '?')} layers, width "
            f"{model.get('emb_dim', '?')}, vocabulary {model.get('vocab_size', '?')}, "
            f"{(m.get('execution') or model).get('dtype', '?')}"
        )
    for key in ("batch_size", "seed", "feature_lengths", "reward_stats"):
        facts[key.replace("_", " ")] = m.get(key)
    bindings = gin_bindings(run.config)
    facts |= {k: v for k, v in bindings.items() if k.isupper() and k not in _SHOWN}
    facts |= {
        k: v
        for k, v in bindings.items()
        if re.search(r"\.(learning_rate|warmup_steps|beta|tau|grad_clip)$", k)
    }
    facts["data fingerprint"] = m.get("data_fingerprint")
    for name, value in (m.get("parents") or {}).items():
        facts[f"{name} policy"] = value
    facts["params fingerprint"] = m.get("params_fingerprint")
    facts["git revision"] = m.get("git_revision")
    versions = m.get("versions")
    if isinstance(versions, dict):
        names = ("jaxalign", "jax", "flax", "optax")
        shown = [f"{n} {versions[n]}" for n in names if n in versions]
        facts["versions"] = ", ".join(shown)
    return {
        k: v if isinstance(v, str) else _value(v)
        for k, v in facts.items()
        if v not in (None, "", {}, [])
    }


# Macros that the manifest already tells.
_SHOWN = {"BATCH_SIZE", "RANDOM_SEED", "SEED", "RUN_DIR", "MODEL_DIR"}


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return number(value) if isinstance(value, float) else str(value)


def _cell(value: str | None) -> str:
    if value is None:
        return "—"
    if re.fullmatch(r"[0-9a-f]{32,}(-dirty)?", value):
        return f'<code title="{value}">{value[:12]}…</code>'
    if len(value) > 90:
        return f'<span title="{esc(value)}">{esc(value[:88])}…</span>'
    return esc(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def configs(runs: list[Run]) -> str:
    """Each run's whole config.gin, folded."""
    return "".join(
        f"<details><summary>{chip(run)} config.gin</summary>"
        f"<pre>{esc(run.config)}</pre></details>"
        for run in runs
        if run.config
    )


# --- Samples --------------------------------------------------------------------


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
    steps = ", ".join(
        f"{r.name} at step {r.samples_step}" for r in runs if r.samples_step is not None
    )
    out = [
        f'<p class="note">{len(order)} of {len(by_prompt)} prompts. Samples of '
        f"{esc(steps)}. log p is the sum over a response's tokens, in nats.</p>"
    ]
    for prompt in order:
        columns = [
            _response(run, row, i)
            for run in runs
            for i, row in enumerate(
                by_prompt[prompt].get(run.name, [])[:_MAX_RESPONSES]
            )
        ]
        absent = [r.name for r in runs if r.samples and r.name not in by_prompt[prompt]]
        if absent:
            columns.append(
                f'<div class="caption">No answer: {esc(", ".join(absent))}</div>'
            )
        target = ""
        if prompt in targets:
            target = (
                f'<div class="target"><h4>Target</h4>{_text(targets[prompt])}</div>'
            )
        out.append(
            f'<article><div class="prompt"><h4>Prompt</h4>{_text(prompt)}</div>{target}'
            f'<div class="responses">{"".join(columns)}</div></article>'
        )
    return "".join(out)


def _response(run: Run, row: dict[str, Any], index: int) -> str:
    facts = []
    if _is_number(row.get("logp")):
        facts.append(f"log p {number(row['logp'])}")
    if _is_number(row.get("num_tokens")):
        facts.append(f"{int(row['num_tokens'])} tokens")
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
