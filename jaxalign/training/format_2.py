"""Reads a run's checkpoint of formats 1 and 2, to go on from it.

They held two items: ``policy``, and ``rest`` with the other networks, the optimizer's
state, and ``carried``: running statistics and a moving reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxalign.training import checkpoints
from jaxalign.training.step import REFERENCE, TrainState


def restore(folder: Path, meta: dict[str, Any], like: TrainState) -> TrainState:
    """The state of such a checkpoint, without a reference that rests.

    Raises:
      DamagedCheckpointError: when it is not what was written.
      ValueError: when it does not have the shapes of `like`.
    """
    carried: dict[str, Any] = {"running": like.running} if like.running else {}
    if REFERENCE in like.frozen and _moves(folder):
        carried[REFERENCE] = {"policy": like.frozen[REFERENCE]}
    others = {name: tree for name, tree in like.params.items() if name != "policy"}
    policy = checkpoints.read_item(folder, meta, "policy", like.params["policy"])
    rest = checkpoints.read_item(
        folder,
        meta,
        "rest",
        {
            "params": others,
            "opt_state": like.opt_state,
            "step": like.step,
            "carried": carried,
        },
    )
    carried = rest["carried"]
    return TrainState(
        step=rest["step"],
        params={"policy": policy, **rest["params"]},
        opt_state=rest["opt_state"],
        finite=jax.device_put(np.array(True), like.finite.sharding),
        frozen={n: t["policy"] for n, t in carried.items() if n == REFERENCE},
        running=carried.get("running", {}),
    )


def _moves(folder: Path) -> bool:
    """Whether the checkpoint holds a reference."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder / "rest").item_metadata.tree
    return REFERENCE in tree.get("carried", {})
