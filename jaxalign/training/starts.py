"""What the networks of a run begin with: checkpoints, the seed, or each other."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxalign import models, remote, vocabularies
from jaxalign.files import json_sha256
from jaxalign.models import adapters, soft_prompt
from jaxalign.training import checkpoints as ckpt
from jaxalign.training import partial
from jaxalign.training.fingerprints import params_fingerprint
from jaxalign.training.run import Setup, in_layout_of
from jaxalign.training.step import REFERENCE, TrainState

_log = logging.getLogger(__name__)


def load_network(path: str, name: str, ready: Setup) -> Any:
    """Parameters that a network starts from, on the run's mesh and in its layout.

    They are those of the checkpoint's network of the same name, else of its main one;
    with ``ASSIGNMENT`` some of them.

    Raises:
      ValueError: naming what differs: a field of the architecture, or the vocabulary.
    """
    meta = ckpt.read_meta(path)
    source = ckpt.source(meta, name)
    # Dropout changes no parameter's meaning, and is off when a reference is there.
    saved = meta["networks"][source]["shape"]
    ours = ready.run.model.config.architecture()
    if name != REFERENCE:
        ours = ready.networks[name].config.architecture()
    in_part = bool(ready.run.assignment) and name != REFERENCE
    free = ("dropout_rate", *(partial.SHOWN if in_part else ()))
    differing = {
        field: (saved.get(field), value)
        for field, value in ours.items()
        if field not in free and saved.get(field) != value
    }
    if differing:
        raise ValueError(
            f"{path} holds another network. "
            + "; ".join(
                f"{field}: checkpoint {theirs!r}, MODEL {ours!r}"
                for field, (theirs, ours) in differing.items()
            )
        )
    if in_part:
        found = partial.load(path, name, source, ready)
        if "embedding" in found.get("token_embedder", {}):
            _check_vocabulary(path, meta, ready.run.vocabulary)
        return found
    _check_vocabulary(path, meta, ready.run.vocabulary)
    found = ckpt.load(path, source, ready.mesh)
    soft_prompt.refuse_start(path, found.params)
    config = found.model.config
    own = ready.run.model.config.scan_layers
    if config.scan_layers == own:
        return found.params
    model = found.model.clone(config=dataclasses.replace(config, scan_layers=own))
    return in_layout_of(ckpt.on_mesh(model, ready.mesh), found.params)


def _check_vocabulary(
    path: str, meta: Mapping[str, Any], vocabulary: vocabularies.Vocabulary
) -> None:
    """Refuses a checkpoint whose ids mean other text."""
    theirs = meta.get("vocabulary_fingerprint")
    if meta["vocabulary"] is None:  # another project's, without its tokenizer
        return
    if theirs is None:  # an older checkpoint: from the model file beside it
        folder = ckpt.resolve(path).parents[1]
        theirs = vocabularies.from_json(meta["vocabulary"], folder).fingerprint
    if theirs != vocabulary.fingerprint:
        raise ValueError(
            f"{path} was trained with another vocabulary: {meta['vocabulary']} with "
            f"the fingerprint {theirs[:12]}; VOCABULARY is {vocabulary!r} with "
            f"{vocabulary.fingerprint[:12]}. Use the checkpoint's, "
            f"{vocabularies.MODEL_FILE} in its run directory."
        )


def described(ready: Setup, fingerprints: Mapping[str, str | None]) -> dict[str, Any]:
    """The networks as a checkpoint's ``meta`` describes them.

    Args:
      ready: the run.
      fingerprints: of what it begins with, as of `parents`.
    """
    found = {}
    for name, network in ready.networks.items():
        found[name] = models.stored(network)
        begin = name if name in ready.starts else ready.objective.main
        # Where rules say what comes from where, no checkpoint is the network.
        starts = begin in ready.starts and not ready.run.assignment
        if starts:
            path = ready.starts[begin]
            origin = {
                "from": path if remote.is_remote(path) else os.path.abspath(path),
                "fingerprint": fingerprints[_parent(ready, begin)],
            }
        adapted = name == ready.objective.main and ready.run.adapter is not None
        if adapted:
            found[name] |= ready.partition.stored()
        # What rests can be read again where it was; a checkpoint need not repeat it.
        rests = name not in ready.abstract_state.params
        moves = name == REFERENCE and ready.moving_reference
        if starts and rests and not moves:
            found[name] |= origin
        elif starts and adapted:
            found[name]["base"] = origin
    return found


def parents(ready: Setup, saved: Mapping[str, Any] | None) -> dict[str, str | None]:
    """Fingerprints of what a run begins with: ``initial``, ``reference``, and others.

    Args:
      ready: the run.
      saved: the ``meta`` of the checkpoint that it goes on from, if it does.

    Returns:
      By content, not by path. None stands for one made from the run's seed; there is a
      ``reference`` only where the objective has one.
    """
    found = {"initial": None}
    for name, path in ready.starts.items():
        if name != REFERENCE or ready.objective.uses_reference:
            parent = _parent(ready, name)
            found[parent] = _content(path, saved, name, parent, ready)
    if ready.objective.uses_reference:
        found.setdefault(REFERENCE, found["initial"])
        if found[REFERENCE] is None and saved:
            found[REFERENCE] = saved["parents"].get(REFERENCE)
    return found


def _parent(ready: Setup, name: str) -> str:
    return "initial" if name == ready.objective.main else name


def _content(
    path: str, saved: Mapping[str, Any] | None, name: str, parent: str, ready: Setup
) -> str | None:
    """The fingerprint of what a network starts from.

    Of a part of a checkpoint, and the seed, it is one of all that it is made of.
    """
    try:
        meta = ckpt.read_meta(path)
        found = ckpt.description(meta, ckpt.source(meta, name), path)["fingerprint"]
        if ready.run.assignment and name != REFERENCE:
            rules = [list(rule) for rule in ready.run.assignment]
            found = json_sha256([found, rules, ready.run.seed])
        return found
    except FileNotFoundError:
        if saved is None or saved["parents"].get(parent) is None:
            raise
        # A run that goes on may do without what it began with.
        _log.warning(
            "The %s checkpoint %s is gone: that the run began with it is not checked.",
            parent,
            path,
        )
        return saved["parents"][parent]


def start(ready: Setup, key: jax.Array) -> TrainState:
    """The state before the first step: what checkpoints give, else random."""
    return ready.init_state(key, _loaded(ready))


def _loaded(ready: Setup) -> dict[str, Any]:
    return {
        name: load_network(path, name, ready)
        for name, path in ready.starts.items()
        if name in ready.networks
    }


def with_frozen(ready: Setup, key: jax.Array, state: TrainState) -> TrainState:
    """The state of a checkpoint, with the networks that it does not hold."""
    missing = tuple(n for n in ready.abstract_state.frozen if n not in state.frozen)
    if not missing:
        return state
    wanted = {
        name if name in ready.starts else ready.objective.main for name in missing
    }
    loaded = {
        name: load_network(ready.starts[name], name, ready)
        for name in wanted
        if name in ready.starts
    }
    made = ready.init_networks(key, loaded, missing)
    _, made = ready.partition.split(made)
    return state.replace(frozen={**state.frozen, **made})


def reference_policy(
    ready: Setup,
    key: jax.Array,
    begun_with: Mapping[str, str | None],
    state: TrainState,
    new: bool,
) -> tuple[str, Callable[[], Any]]:
    """The reference policy's fingerprint, and how to get its parameters.

    Args:
      ready: the run.
      key: the run's.
      begun_with: of `parents`.
      state: the run's. Where it holds the reference, nothing is loaded.
      new: whether it is the one before the first step.
    """
    written, starts = begun_with[REFERENCE], ready.starts
    held = None if ready.moving_reference else state.frozen.get(REFERENCE)
    if held is None and not ready.run.reference_checkpoint_path:
        held = ready.partition.reference(state.frozen)  # an adapter's base
    if held is None and new and begun_with["initial"] == written:
        held = adapters.plain(state.networks["policy"])
    path = starts.get(REFERENCE) or starts.get(ready.objective.main)
    if held is None and path and ready.run.assignment and REFERENCE not in starts:

        def begun() -> Any:
            made = ready.init_networks(key, _loaded(ready), ("policy",))
            return adapters.plain(made["policy"])

        return written, begun
    if held is None and path:
        return written, lambda: load_network(path, REFERENCE, ready)

    def made() -> Any:
        policy = ready.init_networks(key, only=("policy",))["policy"]
        return checked(policy)

    def checked(policy: Any) -> Any:
        if written is not None and written != params_fingerprint(policy):
            raise ValueError(
                "The reference of this run is the policy that its seed gave, and jax "
                f"{jax.__version__} on this processor gives another: go on with the "
                "version in manifest.json, on a machine as that was."
            )
        return policy

    if held is None:
        return written, made
    if not path:
        checked(held)
    return written or params_fingerprint(held), lambda: held
