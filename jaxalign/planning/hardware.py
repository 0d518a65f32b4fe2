"""The devices a plan can be made for: names, published figures, topologies.

Figures are per device as JAX counts them, from the vendors' public specifications:
https://cloud.google.com/tpu/docs/system-architecture-tpu-vm (TPU),
https://www.nvidia.com/en-us/data-center/ (GPU data sheets). Link figures of TPUs are
those of https://jax-ml.github.io/scaling-book/tpus/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

import jax

from jaxalign import configs

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one device."""

    flops: float  # bfloat16 matrix operations per second, dense
    memory: int  # bytes of main memory (HBM) that a program may use
    memory_bandwidth: float  # bytes per second
    # bytes per second that one device sends in a ring over its fast links: both
    # directions of one torus axis, or NVLink
    link_bandwidth: float
    network_bandwidth: float  # bytes per second and device between slices or hosts


CHIPS = {
    # What libtpu leaves a program of 32, 16, 95.75 and 32 GiB. A v4 device is a chip:
    # two cores that share their memory.
    "v4": Chip(275e12, int(30.75 * GIB), 1.228e12, 2 * 45e9, 3.1e9),
    "v5e": Chip(197e12, int(15.75 * GIB), 8.19e11, 2 * 45e9, 3.1e9),
    "v5p": Chip(459e12, int(95.74 * GIB), 2.765e12, 2 * 90e9, 6.25e9),
    "v6e": Chip(918e12, int(31.25 * GIB), 1.64e12, 2 * 90e9, 12.5e9),
    "gpu-a100": Chip(312e12, 80 * GIB, 2.039e12, 300e9, 25e9),
    "gpu-h100": Chip(989e12, 80 * GIB, 3.35e12, 450e9, 50e9),
    "cpu": Chip(1e11, 16 * GIB, 2e10, 1e10, 1e9),
}

_LARGEST = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256}  # chips in a slice


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    name: str  # as the user wrote it
    kind: str  # a key of `CHIPS`
    devices: list[Any]  # compile-only TPU devices, or this machine's CPU devices
    # whether the compiler is the target's own. Where it is not, memory is an estimate
    # from the CPU compiler.
    exact: bool

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def slice_of(self) -> dict[int, int]:
        """The slice of each device, by its place in `devices`."""
        return {
            i: getattr(device, "slice_index", None) or 0
            for i, device in enumerate(self.devices)
        }


def find(name: str) -> Topology:
    """The devices of a topology ``KIND:SHAPE``.

    ``KIND`` is one of `CHIPS`: ``v5e:4x4``, ``v5p:4x4x8``, ``v5e:4x4:2`` (two slices);
    ``gpu-h100:8`` or ``cpu:8`` for an estimate.

    Raises:
      ValueError: for a name that means nothing, with the nearest that does.
      ImportError: where libtpu is missing or of another release than jax's.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        near = configs.nearest(kind, CHIPS)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"Unknown topology {name!r}: expected KIND:SHAPE with KIND one of "
            f"{', '.join(CHIPS)}, such as v5e:4x4, v5p:4x4x8, v5e:4x4:2 (two slices) "
            f"or gpu-h100:8.{hint}"
        )
    if kind.startswith(("gpu", "cpu")):
        if not re.fullmatch(r"[1-9]\d*", shape):
            raise ValueError(
                f"--topology={name}: expected a number of devices, as in {kind}:8."
            )
        return Topology(name, kind, _cpu_devices(int(shape)), exact=kind == "cpu")
    return Topology(name, kind, _tpu_devices(name, kind, shape), exact=True)


def _tpu_devices(name: str, kind: str, shape: str) -> list[Any]:
    found = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\d+))?", shape)
    axes = 3 if kind in ("v4", "v5p") else 2
    example = "4x4x8" if axes == 3 else "4x4"
    sizes = [int(n) for n in found[1].split("x")] if found else []
    if len(sizes) != axes:
        raise ValueError(
            f"--topology={name}: a {kind} slice has {axes} dimensions; expected "
            f"{kind}:{example}, or {kind}:{example}:2 for two slices, got {shape!r}."
        )
    options: dict[str, Any] = {"num_slices": int(found[2])} if found[2] else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"
    if math.prod(sizes) > _LARGEST[kind]:
        raise ValueError(
            f"--topology={name}: the largest {kind} slice has {_LARGEST[kind]} chips; "
            f"{kind}:{example}:2 is two slices."
        )
    if any(n > 1 and n % 2 for n in sizes):
        why = "a slice is made of whole hosts, so its sizes are 1 or even"
        raise ValueError(f"--topology={name}: {why}.")
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "jaxalign plan compiles with libtpu, which is not installed (no TPU is "
            "needed): pip install 'jaxalign[plan]'. GPU and CPU estimates, such as "
            "--topology=gpu-h100:8, do without it."
        )
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a nightly's
        version, wants = importlib.metadata.version, importlib.metadata.requires("jax")
        check_libtpu(version("jax"), wants or [], version("libtpu"))
    from jax.experimental import topologies

    # On a machine without TPUs libtpu would ask the cloud's metadata server, then
    # complain; what is said here does not enter the topology.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # It lets one process at a time have the TPU; several plans want none.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    try:
        described = topologies.get_topology_desc(
            f"{kind}:{found[1]}", platform="tpu", **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--topology={name}: libtpu knows none. {reason}") from error
    return list(described.devices)


def check_libtpu(jax_version: str, wants: list[str], found: str) -> None:
    """Refuses a libtpu of another release than ``wants``, jax's requirements, names.

    A jaxlib reads what the compiler of its own release makes; of a newer one it may
    not, and then fails where a program is printed.

    >>> check_libtpu("0.10.2", ["libtpu==0.0.42.*; extra == 'tpu'"], "0.0.42.1")
    """
    for requirement in wants:
        match = re.match(r"libtpu ?==([\d.]+(?:\.\*)?) ?(?:;|$)", requirement)
        if match is None:
            continue
        release = match[1]  # 0.0.42.* holds 0.0.42 itself, too
        wanted = release if release.endswith("*") else f"{release}."
        if not fnmatch.fnmatch(f"{found}.", wanted):
            raise ImportError(
                f"jaxalign plan compiles with libtpu, and libtpu {found} does not go "
                f"with jax {jax_version}: pip install 'libtpu=={release}'. (pip "
                "install 'jaxalign[plan]' brings the one that goes with it.)"
            )


def _cpu_devices(count: int) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # jax has its devices already, in tests
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"Only {len(devices)} CPU devices: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return devices[:count]


def parse_mesh(text: str) -> dict[str, int]:
    """``data,fsdp,tensor`` sizes, one of them -1 at most.

    >>> parse_mesh("1,64,-1")
    {'data': 1, 'fsdp': 64, 'tensor': -1}
    """
    sizes = text.split(",")
    if len(sizes) != 3 or not all(re.fullmatch(r"-1|[1-9]\d*", s) for s in sizes):
        raise ValueError(
            f"--mesh={text}: expected three sizes DATA,FSDP,TENSOR, one of them -1 at "
            "most, as in --mesh=1,64,2."
        )
    return dict(zip(("data", "fsdp", "tensor"), map(int, sizes), strict=True))


def candidate_meshes(count: int, slices: int, limit: int) -> list[dict[str, int]]:
    """Meshes to compare: fsdp over a slice, then ever more tensor, then more data.

    Of ``count`` devices in slices, over which data goes; a tensor axis divides
    ``limit``, as it must heads, hidden layer and vocabulary.

    >>> candidate_meshes(16, 1, 4)[:2]
    [{'data': 1, 'fsdp': 16, 'tensor': 1}, {'data': 1, 'fsdp': 8, 'tensor': 2}]
    """
    inside = count // slices
    found = [
        {"data": slices, "fsdp": inside // tensor, "tensor": tensor}
        for tensor in (1, 2, 4)
        if inside % tensor == 0 and math.gcd(limit, tensor) == tensor
    ]
    found.append({"data": count, "fsdp": 1, "tensor": 1})
    return [m for i, m in enumerate(found) if m not in found[:i]]
