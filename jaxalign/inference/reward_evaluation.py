"""``jaxalign eval`` of reward models: how far their verdicts can be trusted.

Everything is computed from a model's scores of preference pairs, and of pools of
responses; see `jaxalign.evaluation.rewards` and `jaxalign.evaluation.best_of`.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from jaxalign import judges
from jaxalign.evaluation import probes, rewards, strength
from jaxalign.evaluation.intervals import mean_with_ci
from jaxalign.inference import generation, reward_pools
from jaxalign.models.reward import PAIRWISE, READS
from jaxalign.training import checkpoints

GROUPS = ("split", "category", "subset", "source", "band")  # fields that part pairs
_MOST_GROUPS = 64  # values of a field that parts them; one with more is an id
_PROBED = 200  # pairs whose rejected response is changed
_NONE = "(none)"

Rows = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


class Verdicts(NamedTuple):
    """What a model says of pairs.

    Attributes:
      gaps: differences, NaN for no verdict.
      chosen, rejected: the scores; None of a judge that compares.
      bias: how far what stands first is favoured; None of a judge that scores.
    """

    gaps: np.ndarray
    chosen: np.ndarray | None = None
    rejected: np.ndarray | None = None
    bias: np.ndarray | None = None


def judge_name(model: str) -> str:
    """The judge of a reward model named by its path, or as one, in its raw scale.

    Bradley-Terry trains the raw scale: its differences are logits, and log-loss and
    calibration are about those.

    >>> judge_name("runs/rm"), judge_name("reward:runs/rm?aggregate=worst")
    ('reward:runs/rm?scale=raw', 'reward:runs/rm?aggregate=worst&scale=raw')
    >>> judge_name("my_judge.py:score")
    'my_judge.py:score'
    """
    kind, colon, rest = model.partition(":")
    if not colon or "/" in kind or rest.startswith("//"):
        kind, rest = "reward", model
    own = kind == "reward" and not glob.has_magic(rest.partition("?")[0])
    if own and " " not in rest and "scale=" not in rest:
        rest += ("&" if "?" in rest else "?") + "scale=raw"
    return f"{kind}:{rest}"


def is_reward_model(checkpoint: str) -> bool:
    """Whether a checkpoint's main network scores responses; False if there is none."""
    try:
        meta = checkpoints.newest_meta(checkpoint)
        about = checkpoints.description(meta, meta["main"], checkpoint)
    except (FileNotFoundError, KeyError):
        return False
    return about.get("options", {}).get("read") in (*READS, *PAIRWISE)


def evaluate(
    rows: Rows,
    models: Mapping[str, judges.Judge | judges.PairwiseJudge],
    pools: Sequence[reward_pools.Pool] = (),
    gold: judges.Judge | None = None,
) -> dict[str, Any]:
    """All that a page says of reward models.

    Args:
      rows: as they were read, and with ``prompt``, ``chosen`` and ``rejected``.
      models: judges by the name to show.
      pools: prompts with samples, for best-of-n.
      gold: the judge of those.

    Returns:
      ``{"pairs", "models": {name: ...}, "agreement": [...], "best_of_n": ...}``.

    Raises:
      ValueError: without pairs, or for a model without any verdict.
    """
    if not rows:
        raise ValueError("There are no pairs to evaluate a reward model on.")
    found = {name: verdicts(judge, rows) for name, judge in models.items()}
    told: dict[str, Any] = {"pairs": len(rows), "models": {}, "agreement": []}
    for name, verdict in found.items():
        told["models"][name] = {
            **_of_model(rows, verdict),
            "formats": _formats(rows, models[name], verdict),
        }
    for one, other in itertools.combinations(found, 2):
        same = rewards.agreement(found[one].gaps, found[other].gaps)
        told["agreement"].append({"models": [one, other], **same})
    scoring = {n: j for n, j in models.items() if not judges.is_pairwise(j)}
    if pools and scoring:
        told["best_of_n"] = reward_pools.curves(pools, scoring, gold)
    return told


def verdicts(judge: judges.Judge | judges.PairwiseJudge, rows: Rows) -> Verdicts:
    """A judge's verdicts on pairs, each response scored once, or both orders asked."""
    about = [raw for raw, _ in rows]
    prompts = [record["prompt"] for _, record in rows]
    sides = [[record[side] for _, record in rows] for side in ("chosen", "rejected")]
    if judges.is_pairwise(judge):
        preferred, bias = judges.preferences(judge, prompts, *sides, about)
        return Verdicts(rewards.logits(preferred), bias=bias)
    both = judges.scores(judge, prompts * 2, sides[0] + sides[1], about * 2)
    chosen, rejected = np.split(both.astype(np.float64), 2)
    return Verdicts(rewards.differences(chosen, rejected), chosen, rejected)


def _of_model(rows: Rows, found: Verdicts) -> dict[str, Any]:
    gaps, prompts = found.gaps, [record["prompt"] for _, record in rows]
    longer = [len(r["chosen"]) - len(r["rejected"]) for _, r in rows]
    curve = rewards.reliability(gaps)
    told = {
        **rewards.pair_metrics(gaps, prompts).to_json(),
        "ece": curve.ece,
        "best_scale": rewards.best_scale(gaps),
        "reliability": {
            "confidence": curve.confidence.tolist(),
            "accuracy": curve.accuracy.tolist(),
            "count": curve.count.tolist(),
        },
        "groups": by_group(rows, gaps),
        "length": rewards.length_probe(gaps, np.array(longer), prompts),
        "position": None,
    }
    if found.bias is not None and (there := ~np.isnan(found.bias)).any():
        names = np.array(prompts, dtype=object)[there].astype(str)
        mean = mean_with_ci(found.bias[there], names)
        told["position"] = {"mean": mean.mean, "ci95": [mean.low, mean.high]}
    if (tenths := _tenths(rows, gaps)) is not None:
        told["strength_tenths"] = tenths
    return told


def by_group(rows: Rows, gaps: np.ndarray) -> dict[str, Any]:
    """Metrics by each field of `GROUPS` that rows have.

    ``{field: {"values": {value: metrics}, "mean": ...}}``, of which ``mean`` is that of
    the values' accuracies, each counted once, as RewardBench counts its categories.
    Values without a verdict are left out.
    """
    prompts = [record["prompt"] for _, record in rows]
    told = {}
    for field in GROUPS:
        values = [raw.get(field) for raw, _ in rows]
        names = [str(v) if isinstance(v, str | int | bool) else _NONE for v in values]
        distinct = {*names}
        if distinct == {_NONE} or len(distinct) > _MOST_GROUPS:
            continue
        order = list(strength.BANDS) if field == "band" else []
        every = {}
        for name in sorted(
            distinct, key=lambda n: (order.index(n) if n in order else 99, n)
        ):
            inside = np.array([n == name for n in names])
            if np.isfinite(gaps[inside]).any():
                own = [p for p, here in zip(prompts, inside, strict=True) if here]
                every[name] = rewards.pair_metrics(gaps[inside], own).to_json()
        means = [one["accuracy"]["mean"] for one in every.values()]
        told[field] = {"values": every, "mean": float(np.mean(means))}
    return told


def _tenths(rows: Rows, gaps: np.ndarray) -> list[float] | None:
    """Accuracy by tenth of ``strength_mean``, where all rows have it."""
    found = [raw.get("strength_mean") for raw, _ in rows]
    if not all(isinstance(v, int | float) and np.isfinite(v) for v in found):
        return None
    kept = ~np.isnan(gaps)
    place = (scipy.stats.rankdata(found) - 0.5) / len(found)
    return strength.deciles(rewards.right(gaps[kept]), place[kept]).tolist()


def _formats(
    rows: Rows, judge: judges.Judge | judges.PairwiseJudge, found: Verdicts
) -> dict[str, Any]:
    """What each of `probes.FORMATS` does, put on rejected responses."""
    kept = np.unique(np.linspace(0, len(rows) - 1, _PROBED).astype(int))
    told = {}
    for name, change in probes.FORMATS.items():
        changed = [
            (raw, {**record, "rejected": change(record["rejected"])})
            for raw, record in (rows[i] for i in kept)
        ]
        if found.chosen is None:
            now = verdicts(judge, changed).gaps
            gaps = found.gaps[kept]
            told[name] = {
                **probes.effect(gaps, np.zeros(len(kept)), gaps - now),
                "shift": None,
            }
            continue
        scores = judges.scores(
            judge,
            [record["prompt"] for _, record in changed],
            [record["rejected"] for _, record in changed],
            [raw for raw, _ in changed],
        )
        told[name] = probes.effect(found.chosen[kept], found.rejected[kept], scores)
    return told


def read_rows(
    data: str,
    models: Sequence[str],
    output: str | None,
    field_map: Mapping[str, str] | None,
    on_bad_row: str,
) -> Rows:
    """The pairs of a file; chats as the first model that is a checkpoint reads them."""
    template = None
    for model in models:
        path = judge_name(model).removeprefix("reward:").partition("?")[0]
        if judge_name(model) != model and not glob.has_magic(path):
            template = checkpoints.chat_template(path)
            break
    return generation.read_rows(
        data, "preference", output, field_map, on_bad_row, template
    )


def as_text(result: Mapping[str, Any]) -> str:
    """A table: a line a model, then categories."""
    lines = [f"{'model':<32}{'accuracy':>10}{'95% interval':>20}{'log-loss':>10}"
             f"{'ECE':>8}{'length only':>13}"]  # fmt: skip
    for name, one in result["models"].items():
        low, high = one["accuracy"]["ci95"]
        lines.append(
            f"{name[-31:]:<32}{one['accuracy']['mean']:>10.1%}"
            f"{f'{low:.1%} to {high:.1%}':>20}{one['log_loss']['mean']:>10.3f}"
            f"{one['ece']:>8.3f}{one['length']['baseline']['mean']:>13.1%}"
        )
        for field, group in one["groups"].items():
            told = ", ".join(
                f"{value} {m['accuracy']['mean']:.1%} of {m['pairs']}"
                for value, m in group["values"].items()
            )
            lines.append(f"  by {field}: {told}; mean {group['mean']:.1%}")
    return "\n".join(lines)
