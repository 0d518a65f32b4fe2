"""What a run needs of hardware that is not there: ahead-of-time compilation.

``jaxalign plan`` compiles the run's own training, scoring and decoding steps for a TPU
topology on any machine, and reads memory, operations and communication from what the
compiler made.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from jaxalign.planning import hardware, programs
from jaxalign.planning.estimate import candidate
from jaxalign.planning.report import html, table
from jaxalign.training import run as runs

__all__ = ["html", "largest_batch", "plan", "table"]

_log = logging.getLogger(__name__)


def plan(
    run: runs.Run,
    topologies: Sequence[str],
    *,
    meshes: Sequence[dict[str, int]] = (),
    steps: Sequence[str] = programs.STEPS,
    find_largest_batch: bool = False,
) -> dict[str, Any]:
    """Compiles a run for pods and reports what each mesh would take.

    Args:
      run: the run; its data is not read.
      topologies: such as ``v5e:4x4``; see `hardware.find`.
      meshes: sizes to compare; by default the run's own, else a few that are usual.
      steps: programs to compile, of `programs.STEPS`.
      find_largest_batch: also search the largest batch of the cheapest mesh.

    Returns:
      ``{"candidates": [...], "cheapest": index or None}``. A candidate has ``fits``,
      ``hbm_bytes`` per device (``parameters``, ``optimizer``,
      ``activations_and_temporaries``, ``limit``), ``flops_per_step`` over all devices,
      ``collective_bytes`` sent per device by kind, ``predicted_step_seconds``,
      ``assumptions``, ``parameter_count``, and, where it does not fit,
      ``shortfall``; ``programs`` holds the same for each step. The cheapest candidate
      is the one that fits with the fewest predicted device-seconds per row.

    Raises:
      ValueError: where nothing fits the question: unknown topology, or no mesh over
        which batch and network divide.
      ImportError: where libtpu is needed and missing.
    """
    unknown = [step for step in steps if step not in programs.STEPS]
    if unknown or not steps:
        raise ValueError(
            f"--steps: expected some of {', '.join(programs.STEPS)}, got {unknown}."
        )
    config = run.model.config
    limit = math.gcd(config.num_heads, config.mlp_dim, config.vocab_size)
    candidates, refused = [], []
    for name in topologies:
        topology = hardware.find(name)
        slices = len(set(topology.slice_of.values()))
        wanted = list(meshes) or ([dict(run.mesh)] if run.mesh else [])
        if not wanted:
            wanted = hardware.candidate_meshes(len(topology.devices), slices, limit)
        for sizes in wanted:
            _log.info("Compiling for %s, mesh %s", name, sizes)
            try:
                candidates.append(candidate(run, topology, sizes, tuple(steps)))
            except ValueError as error:
                refused.append(f"{name} {sizes}: {error}")
                _log.warning("Left out: %s", refused[-1])
    if not candidates:
        raise ValueError("No mesh could be planned. " + " ".join(refused))
    # Predicted device-seconds per row of the batch.
    costs = {
        i: c["predicted_step_seconds"] * c["devices"] / c["batch_size"]
        for i, c in enumerate(candidates)
        if c["fits"]
    }
    cheapest = min(costs, key=costs.__getitem__, default=None)
    if find_largest_batch and cheapest is not None:
        best = candidates[cheapest]
        topology = hardware.find(best["topology"])
        best["largest_batch"] = largest_batch(run, topology, best)
    return {"candidates": candidates, "cheapest": cheapest, "left_out": refused}


def largest_batch(
    run: runs.Run, topology: hardware.Topology, fitting: dict[str, Any]
) -> int:
    """The largest ``BATCH_SIZE`` whose training step fits, from a candidate that does.

    Memory is nearly a straight line in the batch: two compilations give it, and the
    size that it predicts is compiled too, and lowered until it fits.
    """
    ways = fitting["mesh"]["data"] * fitting["mesh"]["fsdp"]
    unit = ways * run.num_microbatches

    def measure(units: int) -> tuple[bool, int]:
        dataset = dataclasses.replace(run.dataset, batch_size=units * unit)
        bigger = dataclasses.replace(run, dataset=dataset)
        got = candidate(bigger, topology, fitting["mesh"], ("train",))
        parts = {k: v for k, v in got["hbm_bytes"].items() if k != "limit"}
        return got["fits"], sum(parts.values())

    limit = fitting["hbm_bytes"]["limit"]
    low = fitting["batch_size"] // unit
    known = {low: measure(low), 2 * low: measure(2 * low)}
    while True:
        fits = max(units for units, (ok, _) in known.items() if ok)
        too_many = min((u for u, (ok, _) in known.items() if not ok), default=math.inf)
        if too_many == fits + 1 or len(known) >= 14:
            return fits * unit
        (a, (_, at_a)), (b, (_, at_b)) = sorted(known.items())[-2:]
        slope = max((at_b - at_a) / (b - a), 1.0)
        guess = max(int(b + (limit - at_b) / slope), fits + 1)
        guess = min(guess, too_many - 1)
        known[guess] = measure(guess)
