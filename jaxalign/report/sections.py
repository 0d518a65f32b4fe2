"""What each run was: headers, settings, configurations. Run data is always escaped."""

from __future__ import annotations

import html
import re
from typing import Any

from jaxalign.report import style
from jaxalign.report.charts import number
from jaxalign.report.runs import Run, gin_bindings

esc = html.escape


def chip(run: Run, text: str | None = None) -> str:
    return f'<span class="chip c{run.colour}">{esc(text or run.name)}</span>'


def key(run: Run) -> str:
    return f'<i class="key c{run.colour}"></i>{esc(run.name)}'


_HEADER = {"objective": "", "steps": "step", "wall time": ""}
_HEADER |= {"data fingerprint": "data", "params fingerprint": "params"}


def headers(runs: list[Run]) -> str:
    """One line a run: what it is, and which data and parameters it stands for."""
    out = ""
    for run in runs:
        facts = _facts(run)
        shown = [f"{t} {_cell(facts[k])}" for k, t in _HEADER.items() if k in facts]
        text = " · ".join(map(str.strip, shown)) or "nothing recorded"
        out += f"<li>{chip(run)} <span>{text}</span></li>"
    return f'<ul class="heads">{out}</ul>'


def runs_table(runs: list[Run]) -> str:
    """What each run was: one column a run, equal cells merged."""
    facts = [_facts(run) for run in runs]
    head = "".join(f'<th scope="col">{key(run)}</th>' for run in runs)
    body = []
    for label in dict.fromkeys(label for own in facts for label in own):
        values = [own.get(label) for own in facts]
        if all(v == values[0] for v in values):
            cells = f'<td colspan="{len(runs)}">{_cell(values[0])}</td>'
        else:
            cells = "".join(f'<td class="differs">{_cell(v)}</td>' for v in values)
        body.append(f'<tr><th scope="row">{esc(label)}</th>{cells}</tr>')
    return style.table(f"<th></th>{head}", body, "runs")


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
    facts |= {k: v for k, v in bindings.items() if _SETTING.search(k)}
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


# Macros that the manifest already tells, and bindings worth telling.
_SHOWN = {"BATCH_SIZE", "RANDOM_SEED", "SEED", "RUN_DIR", "MODEL_DIR"}
_SETTING = re.compile(r"\.(learning_rate|warmup_steps|beta|tau|grad_clip)$")


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
