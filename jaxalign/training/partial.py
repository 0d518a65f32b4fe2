"""Starts from a part of a checkpoint: ``ASSIGNMENT`` says what comes from where.

Rules ``(pattern, replacement)`` as T5X's ``assignment_map``, for checkpoints of every
format. A parameter's name is its network's and its path, layers apart::

    ASSIGNMENT = [
        (r'policy/decoder/layers_(\\d+)/(.*)', r'decoder/layers_0/\\2'),
        (r'policy/token_embedder/embedding', None),
    ]

The first pattern that matches a whole name decides: its replacement is the name in the
checkpoint, and None leaves the parameter to the run's seed. What none matches has to be
in the checkpoint under its own name.
"""

from __future__ import annotations

import difflib
import json
import logging
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from jaxalign import remote
from jaxalign.files import write_atomically
from jaxalign.interop.assignment import Report, assigned
from jaxalign.interop.folders import place, stack, unstack
from jaxalign.interop.leaves import Leaf
from jaxalign.models import adapters, soft_prompt
from jaxalign.training import leafwise
from jaxalign.training.run import Setup
from jaxalign.training.step import REFERENCE

_log = logging.getLogger(__name__)
FILE = "assignment.json"  # in the run directory
# Fields that show in the shapes of parameters, which are compared one by one.
SHOWN = ("vocab_size", "mlp_dim", "num_encoder_layers", "num_decoder_layers")
SHOWN += ("logits_via_embedding",)


def load(path: str, name: str, source: str, ready: Setup) -> dict[str, Any]:
    """Those parameters of a network that its checkpoint gives it.

    What became of all is logged, and written into the run directory.

    Args:
      path: of the checkpoint.
      name: of the network in the run.
      source: of the network in the checkpoint.
      ready: the run.

    Returns:
      A part of the network's tree, on the run's mesh and in its layout.

    Raises:
      ValueError: for a rule that matches nothing, and a parameter that the checkpoint
        lacks or has in another shape.
    """
    stored = leafwise.opened(path, source)
    held = unstack(stored.leaves)
    soft_prompt.refuse_start(path, traverse_util.unflatten_dict(held, sep="/"))
    like = _like(ready, name)
    wanted = unstack(like)
    names = _names(ready, name)
    chosen = {}
    for parameter, taken in names.items():
        if taken is not None:
            leaf = _found(path, f"{name}/{parameter}", taken, held)
            _check(path, f"{name}/{parameter}", taken, leaf, wanted[parameter])
            chosen[parameter] = leaf
    used = {names[parameter] for parameter in chosen}
    report = Report(
        {parameter: (str(names[parameter]),) for parameter in chosen},
        tuple(parameter for parameter in names if parameter not in chosen),
        tuple(sorted({*held, *stored.left_over} - used)),
    )
    scanned = ready.run.model.config.scan_layers
    if scanned:
        _check_stacks(name, chosen, wanted)
    shardings = {p: leaf.sharding for p, leaf in _flat(like).items()}
    kept = stack(chosen) if scanned else chosen
    nested = traverse_util.unflatten_dict({p: shardings[p] for p in kept}, sep="/")
    placed = place(chosen, nested, scan_layers=scanned)
    tell(report, path, name, ready)
    return placed


def _like(ready: Setup, name: str) -> Any:
    """A network's own parameters; what an adapter puts beside them starts by itself."""
    return adapters.plain(ready.abstract_state.networks[name])


def _flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(dict(tree), sep="/")


def _names(ready: Setup, name: str) -> dict[str, str | None]:
    """Where each parameter of a network comes from; rules are for all networks."""
    every = [
        f"{network}/{path}"
        for network in ready.starts
        if network in ready.networks and network != REFERENCE
        for path in unstack(_like(ready, network))
    ]
    found = assigned(every, ready.run.assignment or ())
    prefix = f"{name}/"
    return {
        full.removeprefix(prefix): taken and taken.removeprefix(prefix)
        for full, taken in found.items()
        if full.startswith(prefix)
    }


def _found(path: str, name: str, taken: str, held: dict[str, Leaf]) -> Leaf:
    if taken in held:
        return held[taken]
    near = difflib.get_close_matches(taken, held, n=1)
    hint = f"; the nearest it has is {near[0]!r}" if near else ""
    raise ValueError(
        f"{path} lacks {taken!r}, for {name}{hint}. Another name for it, or a random "
        f"start: ASSIGNMENT = [({name!r}, None)]."
    )


def _check(path: str, name: str, taken: str, leaf: Leaf, wanted: Leaf) -> None:
    if leaf.shape != wanted.shape:
        raise ValueError(
            f"{name} must have shape {wanted.shape}, but {taken!r} of {path} has "
            f"{leaf.shape}. To start it at random: ASSIGNMENT = [({name!r}, None)]."
        )


def _check_stacks(name: str, chosen: dict[str, Leaf], wanted: dict[str, Leaf]) -> None:
    """A stack of layers starts as a whole."""
    begun = stack(chosen)
    for path, leaf in stack(wanted).items():
        if path in begun and begun[path].shape != leaf.shape:
            raise ValueError(
                f"ASSIGNMENT leaves out some layers of {name}/{path} {leaf.shape}, and "
                "with scan_layers they start together: set T5Config.scan_layers = "
                "False, or leave out all of them."
            )


def tell(report: Report, path: str, name: str, ready: Setup) -> None:
    """Logs a report, and writes it into the run directory."""
    _log.info("%s starts from %s:\n%s", name, path, report)
    run_dir = ready.run.run_dir
    if not run_dir or jax.process_index() > 0:
        return
    at = remote.copy_path(run_dir, "runs") if remote.is_remote(run_dir) else run_dir
    file = Path(at) / FILE
    told = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    told[name] = {"checkpoint": path, "rules": ready.run.assignment, **vars(report)}
    write_atomically(file, json.dumps(told, indent=1) + "\n")
