"""What a program needs of each device, and how long a step takes: one candidate."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Shortfall:
    """Why a program does not fit: bytes per device."""

    needed: int
    limit: int
    at_least: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "needed": self.needed,
            "short": self.needed - self.limit,
            "at_least": self.at_least,
            "message": str(self),
        }

    def __str__(self) -> str:
        over = (self.needed - self.limit) / GIB
        return (
            f"does not fit: needs {'at least ' if self.at_least else ''}"
            f"{self.needed / GIB:.2f} GiB per device, "
            f"{self.limit / GIB:.2f} GiB are there, {over:.2f} GiB too many"
        )


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
    exact = {
        "parameters": bytes_per_device(state.networks),
        "optimizer": bytes_per_device(state.opt_state),
    }
    for step in steps:
        held = exact
        if step != "train":
            policy = bytes_per_device(state.params["policy"])
            held = {"parameters": policy, "optimizer": 0}
        found["programs"][step] = _program(ready, topology, step, held)
    first = found["programs"][steps[0]]
    return {
        **first,
        **found,
        "fits": all(p["fits"] for p in found["programs"].values()),
    }


def _program(
    ready: runs.Setup, topology: Topology, step: str, held: dict[str, int]
) -> dict[str, Any]:
    limit, known = topology.chip.memory, sum(held.values())
    program = programs.program(ready, step)
    count = flops.matmul_flops(
        program.function, *program.arguments, loop_trips=program.loop_trips
    )

    def too_large(shortfall: Shortfall) -> dict[str, Any]:
        others = None if shortfall.at_least else shortfall.needed - known
        return {
            "fits": False,
            "flops_per_step": count,
            "hbm_bytes": {
                **held,
                "activations_and_temporaries": others,
                "limit": limit,
            },
            "collective_bytes": None,
            "predicted_step_seconds": None,
            "shortfall": shortfall.as_json(),
        }

    if known > limit:  # not worth compiling
        return too_large(Shortfall(known, limit, at_least=True))
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        shortfall = _out_of_memory(str(error))
        if shortfall is None:
            raise
        return too_large(shortfall)
    memory = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    moved = hlo.traffic(compiled.as_text(), topology.slice_of)
    times = _times(ready, topology, count, moved)
    found = {
        "fits": total <= limit,
        "flops_per_step": count,
        "hbm_bytes": {
            **held,
            "activations_and_temporaries": total - known,
            "limit": limit,
        },
        "collective_bytes": {
            kind: moved.collectives.get(kind, 0) + moved.across_slices.get(kind, 0)
            for kind in sorted({*moved.collectives, *moved.across_slices})
        },
        "collective_bytes_across_slices": moved.across_slices,
        "memory_bytes": moved.memory,
        "arithmetic_intensity": count / ready.mesh.size / max(moved.memory, 1),
        "roofline_seconds": times,
        "predicted_step_seconds": max(times["compute"], times["memory"])
        + times["links"]
        + times["network"],
    }
    if total > limit:
        found["shortfall"] = Shortfall(total, limit).as_json()
    return found


def _times(
    ready: runs.Setup, topology: Topology, count: int, moved: hlo.Traffic
) -> dict[str, float]:
    chip = topology.chip
    half = 2.0 if ready.objective.model.config.dtype == "float32" else 1.0
    return {
        "compute": half * count / ready.mesh.size / (chip.flops * COMPUTE_SHARE),
        "memory": moved.memory / (chip.memory_bandwidth * MEMORY_SHARE),
        "links": sum(moved.collectives.values()) / (chip.link_bandwidth * LINK_SHARE),
        "network": sum(moved.across_slices.values())
        / (chip.network_bandwidth * LINK_SHARE),
    }


def _out_of_memory(message: str) -> Shortfall | None:
    """The figures of libtpu's refusal; None for any other error.

    >>> print(_out_of_memory("RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm."))
    does not fit: needs 20.00 GiB per device, 15.75 GiB are there, 4.25 GiB too many
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message:
        return None
    for pattern in (
        r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm",
        r"\(([\d.]+[KMGT])\) exceeds available \w+ \(([\d.]+[KMGT])\)",
    ):
        sizes = re.search(pattern, message)
        if sizes:
            return Shortfall(_bytes(sizes.group(1)), _bytes(sizes.group(2)))
    return None


def _bytes(text: str) -> int:
    return int(float(text[:-1]) * 2 ** (10 * (1 + "KMGT".index(text[-1]))))
