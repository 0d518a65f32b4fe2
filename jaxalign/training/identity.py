"""What the parameters of a run depend on, in one place and by name.

A run directory goes on as the same run or not at all. `of` says what this run is:
objective, architecture, vocabulary, data, order, optimizer, and where it starts. It is
in every checkpoint, and `check` compares it before anything is written. How a run is
computed (``models.config.Execution``, the mesh, microbatches), what is looked at
(evaluation, samples, logs) and how long it lasts are no part of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import optax

import jaxalign
from jaxalign.data import augment
from jaxalign.training import description
from jaxalign.training.run import Setup

# What follows from other entries: told only where none of them differs.
_CONSEQUENCES = {
    "plan": (
        "objective",
        "data_fingerprint",
        "feature_lengths",
        "packing",
        "decoder_rows",
        "truncate",
        "on_too_long",
    ),
    "reward_stats": ("data_fingerprint",),
}

_OF_REFERENCE = ("reference_checkpoint", "moving_reference")


def of(ready: Setup, parents: Mapping[str, str | None]) -> dict[str, Any]:
    """Everything that the parameters of a run depend on.

    Args:
      ready: the run.
      parents: fingerprints of the ``"initial"`` and the ``"reference"`` policy, of
        those that there are. One made from the run's seed needs no entry of its own.

    Returns:
      JSON values by name, nested once.
    """
    run, objective, feed = ready.run, ready.objective, ready.inputs.train
    found: dict[str, Any] = {
        "objective": _objective(objective),
        "model": _architecture(objective, run.model.config.architecture()),
        "vocabulary": run.vocabulary.fingerprint,
        "data_fingerprint": [cache.content_fingerprint for cache in feed.caches],
        "rates": _shares(run.dataset.sources().values()),
        "feature_lengths": dict(run.dataset.feature_lengths),
        "packing": run.dataset.packing or None,
        "decoder_rows": feed.shape.decoder_rows,
        "plan": [plan.fingerprint for plan in feed.plans],
        "reward_stats": ready.inputs.reward_stats,
        "batch_size": run.dataset.batch_size,
        "shuffle": run.dataset.shuffle,
        "seed": run.seed,
        "dataset_seed": run.dataset.seed,
        "optimizer": description.describe(run.optimizer),
        "described_by": f"jaxalign {jaxalign.__version__}, optax {optax.__version__}",
        "initial_checkpoint": parents.get("initial"),
    }
    if run.dataset.truncate is not None:
        found["truncate"] = run.dataset.truncate
    if run.dataset.on_too_long != "truncate":
        found["on_too_long"] = run.dataset.on_too_long
    for name in ("adapter", "trainable", "untrained"):
        if (value := getattr(run, name)) is not None:
            found[name] = description.describe(value)
    if feed.augment is not None:
        found["augment"] = augment.identity(feed.augment)
    if objective.uses_reference:
        moving = ready.moving_reference
        named = run.reference_checkpoint_path or run.initial_checkpoint_path
        found["reference_checkpoint"] = parents.get("reference") if named else None
        found["moving_reference"] = dataclasses.asdict(moving) if moving else None
    return json.loads(json.dumps(found))  # as it comes back: lists, no tuples


def check(
    saved: Mapping[str, Any], now: Mapping[str, Any], ready: Setup, where: str
) -> None:
    """Refuses to go on with a checkpoint of another run.

    Args:
      saved: the checkpoint's ``meta``. One from before runs had an identity is
        compared in what it holds.
      now: the run's identity.
      ready: the run.
      where: the run directory, for the message.

    Raises:
      ValueError: naming each setting that differs.
    """
    before = saved.get("identity")
    if before is None:
        before, now = _before_identities(saved, now, ready)
    differing = _differing(before, now)
    if differing:
        lines = [
            f"{name}: saved {_short(theirs)}, now {_short(ours)}"
            for name, (theirs, ours) in differing.items()
        ]
        raise ValueError(
            f"The run directory {where} holds a checkpoint of another run. Give "
            "another --run_dir, or the settings it was started with. "
            + "; ".join(lines)
        )


def _differing(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, by full name: what was saved, and what is now."""
    theirs, ours = _flat(before), _flat(now)
    # The names inside a closure are its library's: of another one, what both have.
    other_library = before.get("described_by") != now.get("described_by")
    other_objective = theirs["objective"] != ours["objective"]
    differing = {}
    for name in sorted({*theirs, *ours}):
        both = name in theirs and name in ours
        part = name.split(".")[0]
        optional = part == "optimizer" and (other_library or "[python " in name)
        optional |= other_objective and part in ("objective", *_OF_REFERENCE)
        if name == "described_by" or (optional and not both):
            continue
        if not description.same(theirs.get(name), ours.get(name)):
            differing[name] = (theirs.get(name), ours.get(name))
    for name, causes in _CONSEQUENCES.items():
        if any(other.split(".")[0] in causes for other in differing):
            differing.pop(name, None)
    return differing


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in identity.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{k}" if k else name: v for k, v in value.items()}
        else:
            flat[name] = value
    return flat


def _objective(objective: Any) -> dict[str, Any]:
    """The class, and its numbers."""
    found = {"": _class_name(objective)}
    for field in dataclasses.fields(objective):
        if field.name == "model":
            continue
        inner = description.describe(getattr(objective, field.name))
        found |= {f"{field.name}.{k}" if k else field.name: v for k, v in inner.items()}
    return found


def _class_name(objective: Any) -> str:
    kind = type(objective)
    own = kind.__module__.split(".")[0] == "jaxalign"
    return kind.__qualname__ if own else f"{kind.__module__}.{kind.__qualname__}"


def _architecture(objective: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Dropout counts where it is on."""
    off = () if objective.dropout else ("dropout_rate",)
    return {name: value for name, value in fields.items() if name not in off}


def _shares(rates: Any) -> list[float]:
    rates = [float(rate) for rate in rates]
    return [round(rate / sum(rates), 12) for rate in rates]


def _before_identities(
    saved: Mapping[str, Any], now: Mapping[str, Any], ready: Setup
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint of format 1 holds of an identity, and the same of `now`."""
    objective = type(ready.objective)
    parents = saved["parents"]
    before = {
        "objective": saved["objective"],
        "model": {k: saved["model"].get(k) for k in now["model"]},
        "seed": saved["seed"],
        "batch_size": saved["batch_size"],
        "feature_lengths": saved["feature_lengths"],
        "data_fingerprint": saved["data_fingerprint"],
        "initial_checkpoint": parents.get("initial"),
    }
    ours = {name: now[name] for name in before}
    ours["objective"] = objective.__name__
    ours["data_fingerprint"] = ready.inputs.train.fingerprint
    if now.get("reference_checkpoint"):
        before["reference_checkpoint"] = parents.get("reference")
        ours["reference_checkpoint"] = now["reference_checkpoint"]
    if saved["vocabulary"] != ready.run.vocabulary.to_json():
        before["vocabulary"] = json.dumps(saved["vocabulary"])
        ours["vocabulary"] = json.dumps(ready.run.vocabulary.to_json())
    return before, ours


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
