"""What a program needs of each device, and how long a step takes: one candidate."""

from __future__ import annotations

import math
import re
from typing import Any

import jax

from jaxalign.cluster import mesh as meshes
from jaxalign.planning import flops, hlo, programs
from jaxalign.planning.hardware import GIB, Topology
from jaxalign.training import run as runs

# Shares of peak that well-tuned transformer steps reach; see `assumptions`.
COMPUTE_SHARE = 0.6
MEMORY_SHARE = 0.8
LINK_SHARE = 0.8


def assumptions(topology: Topology) -> list[str]:
    """What the predictions rest on, for people to disagree with."""
    chip = topology.chip
    lines = [
        f"{topology.kind}: {chip.flops / 1e12:g} TFLOP/s bfloat16, "
        f"{chip.memory / GIB:.2f} GiB for programs at "
        f"{chip.memory_bandwidth / 1e9:g} GB/s, "
        f"{chip.link_bandwidth / 1e9:g} GB/s sent per device over fast links, "
        f"{chip.network_bandwidth / 1e9:g} GB/s between slices.",
        f"Of these, {COMPUTE_SHARE:.0%} of compute, {MEMORY_SHARE:.0%} of memory "
        f"bandwidth and {LINK_SHARE:.0%} of links are reached.",
        "Step time = max(compute, memory) + collectives: no overlap of communication "
        "with compute. Float32 products take twice the time of bfloat16 ones.",
        "Operations are those of matrix products, rematerialised ones included, spread "
        "evenly over devices. Bytes are read from the compiled program, loops counted, "
        "and collectives are rings.",
        "Batches are full-length: PACKING prompts of TASK_FEATURE_LENGTHS tokens in "
        "each row; decode steps run to the last token.",
    ]
    if not topology.exact:
        lines.append(
            "Compiled by the CPU compiler for as many devices: temporaries and "
            "collectives are estimates, which the GPU compiler's fusions undercut."
        )
    return lines


def _shortfall(needed: int, limit: int, at_least: bool = False) -> dict[str, Any]:
    """Why a program does not fit: bytes per device."""
    over = needed - limit
    message = (
        f"does not fit: needs {'at least ' * at_least}{needed / GIB:.2f} GiB per "
        f"device, {limit / GIB:.2f} GiB are there, {over / GIB:.2f} GiB too many"
    )
    return {"needed": needed, "short": over, "at_least": at_least, "message": message}


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of sharded shapes on one device: exact arithmetic.

    >>> one = meshes.replicated(meshes.make_mesh(devices=jax.devices()[:1]))
    >>> bytes_per_device(jax.ShapeDtypeStruct((3, 4), "float32", sharding=one))
    48
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def candidate(
    run: runs.Run, topology: Topology, sizes: dict[str, int], steps: tuple[str, ...]
) -> dict[str, Any]:
    """Compiles a run's programs for one mesh: a candidate of `jaxalign.planning.plan`.

    ``sizes`` are of ``data``, ``fsdp`` and ``tensor``, one of them -1 at most; the
    first of ``steps`` is what the top-level keys describe. Raises a ValueError where
    batch or network do not divide over the mesh.
    """
    mesh = meshes.make_mesh(**sizes, devices=topology.devices)
    ready = programs.abstract_setup(run, mesh)
    if not programs.writes_text(ready):  # a reward model decodes nothing
        steps = tuple(step for step in steps if step != "decode") or ("train",)
    state = ready.abstract_state
    found: dict[str, Any] = {
        "topology": topology.name,
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "batch_size": run.dataset.batch_size,
        "parameter_count": {
            name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
            for name, tree in state.networks.items()
        },
        "programs": {},
        "assumptions": assumptions(topology),
    }
    found["parameter_count"]["total"] = sum(found["parameter_count"].values())
    for step in steps:
        held = state.networks, state.opt_state
        if step != "train":
            held = state.networks[ready.objective.main], ()
        sizes = map(bytes_per_device, held)
        held = dict(zip(("parameters", "optimizer"), sizes, strict=True))
        found["programs"][step] = _program(ready, topology, step, held)
    fits = all(p["fits"] for p in found["programs"].values())
    return {**found["programs"][steps[0]], **found, "fits": fits}


def _program(
    ready: runs.Setup, topology: Topology, step: str, held: dict[str, int]
) -> dict[str, Any]:
    chip, known = topology.chip, sum(held.values())
    program = programs.program(ready, step)
    count = flops.matmul_flops(
        program.function, *program.arguments, loop_trips=program.loop_trips
    )
    memory = {**held, "activations_and_temporaries": None, "limit": chip.memory}
    found: dict[str, Any] = {
        "fits": False,
        "flops_per_step": count,
        "hbm_bytes": memory,
        "collective_bytes": None,
        "predicted_step_seconds": None,
    }
    if known > chip.memory:  # not worth compiling
        return found | {"shortfall": _shortfall(known, chip.memory, at_least=True)}
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = _out_of_memory(str(error))
        if sizes is None:
            raise
        memory["activations_and_temporaries"] = sizes[0] - known
        return found | {"shortfall": _shortfall(*sizes)}
    told = compiled.memory_analysis()
    total = (
        told.argument_size_in_bytes
        + told.output_size_in_bytes
        - told.alias_size_in_bytes
        + told.temp_size_in_bytes
        + told.generated_code_size_in_bytes
    )
    memory["activations_and_temporaries"] = total - known
    moved = hlo.traffic(compiled.as_text(), topology.slice_of)
    inside, across = moved.collectives, moved.across_slices
    half = 2.0 if ready.objective.model.config.dtype == "float32" else 1.0
    share = count / ready.mesh.size
    times = {
        "compute": half * share / (chip.flops * COMPUTE_SHARE),
        "memory": moved.memory / (chip.memory_bandwidth * MEMORY_SHARE),
        "links": sum(inside.values()) / (chip.link_bandwidth * LINK_SHARE),
        "network": sum(across.values()) / (chip.network_bandwidth * LINK_SHARE),
    }
    if total > chip.memory:
        found["shortfall"] = _shortfall(total, chip.memory)
    return found | {
        "fits": total <= chip.memory,
        "collective_bytes": {
            kind: inside.get(kind, 0) + across.get(kind, 0)
            for kind in sorted({*inside, *across})
        },
        "collective_bytes_across_slices": across,
        "memory_bytes": moved.memory,
        "arithmetic_intensity": share / max(moved.memory, 1),
        "roofline_seconds": times,
        "predicted_step_seconds": max(times["compute"], times["memory"])
        + times["links"]
        + times["network"],
    }


def _out_of_memory(message: str) -> tuple[int, int] | None:
    """Bytes that libtpu's refusal says are needed and there; None: another error.

    >>> _out_of_memory("RESOURCE_EXHAUSTED: Used 2.50K of 1.00K hbm.")
    (2560, 1024)
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message:
        return None
    for pattern in (
        r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
        r"\(([\d.]+)([KMGT])\) exceeds available \w+ \(([\d.]+)([KMGT])\)",
    ):
        if sizes := re.search(pattern, message):
            units = [2 ** (10 * (1 + "KMGT".index(sizes[i]))) for i in (2, 4)]
            return int(float(sizes[1]) * units[0]), int(float(sizes[3]) * units[1])
    return None
