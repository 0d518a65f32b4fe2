"""The device mesh, and where every array lives on it.

One mesh, three axes: ``data`` and ``fsdp`` split the batch, ``fsdp`` and ``tensor``
split the parameters. The network names its axes logically (T5X's names); the rules
below map them to mesh axes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign import user_code

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter -> mesh axis. T5X's "2-D parameters": the embedding axis
# is split over fsdp, the wide axes over tensor.
RULES = {
    "vocab": "tensor",
    "mlp": "tensor",
    "heads": "tensor",
    "joined_kv": "tensor",
    "embed": "fsdp",
}

# Activations: the batch goes over both data axes, so that "embed" finds fsdp taken and
# stays whole; heads, hidden layer and vocabulary are split as their parameters are.
ACTIVATION_RULES = (("batch", ("data", "fsdp")), *RULES.items())


def with_activation_rules(mesh: Mesh, function: Callable[..., Any]) -> Callable:
    """The function with its network's activation constraints in force.

    Networks name the axes of their activations (``models.layers.constrain``), which
    means nothing elsewhere. Wrap before ``jax.jit``: it takes effect in tracing.

    >>> from jaxalign.models.layers import constrain
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> step = with_activation_rules(mesh, lambda x: constrain(x, "batch", "embed"))
    >>> "sharding_constraint" in str(jax.make_jaxpr(step)(np.ones((2, 2))))
    True
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            nn.logical_axis_rules(ACTIVATION_RULES),
        ):
            return function(*args, **kwargs)

    return traced


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None
) -> Mesh:
    """The mesh of all these devices; one axis may be -1, meaning "all that remains".

    Args:
      data: replicas of the model, each with its own rows of the batch.
      fsdp: ways the parameters, and the batch, are split.
      tensor: ways the heads, the hidden layer and the vocabulary are split.
      devices: the devices to use; all by default. On several TPU slices data goes
        over the network between them, fsdp and tensor stay inside one.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ValueError(
            f"Mesh sizes must be positive, at most one of them -1; got "
            f"{dict(zip(AXES, sizes, strict=True))}."
        )
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // -math.prod(sizes), 1)
    shape = dict(zip(AXES, sizes, strict=True))
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"The mesh {shape} needs {math.prod(sizes)} devices, but there are "
            f"{len(devices)}."
        )
    slices = {getattr(device, "slice_index", None) or 0 for device in devices}
    if len(slices) == 1:
        # Tensor varies fastest: its devices are neighbours, which talk the most. An
        # axis may take a part of one of the torus' axes, such as 2 of 4.
        ordered = mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )
    elif sizes[0] % len(slices):
        raise ValueError(
            f"The mesh {shape} would stretch fsdp or tensor over the slow network "
            f"between {len(slices)} slices: make data a multiple of {len(slices)}, and "
            f"fsdp x tensor at most {len(devices) // len(slices)}."
        )
    else:
        inside, across = (sizes[0] // len(slices), *sizes[1:]), (len(slices), 1, 1)
        ordered = mesh_utils.create_hybrid_device_mesh(
            inside, across, devices, allow_split_physical_axes=True
        )
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 3)


def named_mesh(sizes: Mapping[str, int] | None) -> Mesh:
    """`make_mesh` of a setting such as ``MESH = {'data': -1, 'fsdp': 4}``."""
    sizes = dict(sizes or {})
    for name, size in sizes.items():
        if name not in AXES:
            hint = user_code.hint(str(name), AXES)
            raise ValueError(f"MESH has no axis {name!r}.{hint} Its axes: {AXES}.")
        if isinstance(size, bool) or not isinstance(size, int):
            raise ValueError(f"MESH's {name!r} must be a whole number, got {size!r}.")
    return make_mesh(**sizes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data axes; what every array of a batch uses."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def param_shardings(mesh: Mesh, logical_axes: Any, shapes: Any) -> Any:
    """A `NamedSharding` per parameter, from its logical axes; those must divide."""

    def one(path: Any, axes: tuple[str | None, ...], shape: Any) -> NamedSharding:
        spec: list[str | None] = []
        for size, axis in zip(shape.shape, axes, strict=True):
            target = RULES.get(axis)
            if target in spec:  # an axis of the mesh can split one dimension only
                target = None
            if target and size % mesh.shape[target]:
                raise ValueError(
                    f"Parameter {jax.tree_util.keystr(path)} of shape {shape.shape} "
                    f"cannot be split {mesh.shape[target]} ways along {axis!r} (mesh "
                    f"axis {target!r}): choose a mesh whose {target!r} divides {size}."
                )
            spec.append(target)
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(
        one, logical_axes, shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def shardings_like(params: Any, shardings: Any, tree: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that embeds copies of the parameters, e.g. an optimizer's.

    A leaf whose path ends in a parameter's path is placed as the parameter is, along
    every dimension in which the two agree: a factored moment is split along what it
    keeps. Anything else, such as a counter, is small and replicated.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    known = {
        jax.tree_util.keystr(path): (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            leaves, jax.tree.leaves(shardings), strict=True
        )
    }

    def one(path: Any, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, spec = known.get(jax.tree_util.keystr(path[start:]), ((), ()))
            if shape and len(shape) == len(leaf.shape):
                sizes = zip(spec, shape, leaf.shape, strict=True)
                kept = [t if own == size else None for t, own, size in sizes]
                return NamedSharding(mesh, P(*kept))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Refuses, before compilation, a batch that does not divide."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = ways * microbatches
    if microbatches < 1 or batch_size % unit:
        lower = batch_size // unit * unit if microbatches > 0 else 0
        raise ValueError(
            f"BATCH_SIZE={batch_size} rows must divide by {ways} devices along "
            f"data x fsdp times NUM_MICROBATCHES={microbatches}; nearest: "
            f"{sorted({max(lower, unit), lower + unit})}."
        )


def check_network(mesh: Mesh, config: Any) -> None:
    """Refuses, before compilation, a network that the mesh cannot split evenly."""
    split = {"tensor": ("num_heads", "mlp_dim", "vocab_size"), "fsdp": ("emb_dim",)}
    for axis, fields in split.items():
        ways = mesh.shape[axis]
        sizes = {field: getattr(config, field) for field in fields}
        bad = [f"{field}={size}" for field, size in sizes.items() if size % ways]
        if bad:
            common = math.gcd(*sizes.values())
            known = [n for n in range(1, 513) if common % n == 0]
            raise ValueError(
                f"T5Config.{', '.join(bad)} cannot be split {ways} ways along the mesh "
                f"axis {axis!r}: choose MESH's {axis!r} among {known}"
                + (", or pad the vocabulary." if axis == "tensor" else ".")
            )


def put_batch(
    mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Places this process's rows of a global batch on its devices.

    `batch` holds the rows `process_rows` of a batch of so many; by default all.
    """
    start = 0 if batch_size is None else process_rows(mesh, batch_size).start

    def place(value: np.ndarray) -> jax.Array:
        rows = batch_size or len(value)

        def part(index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(rows)
            return value[begin - start : end - start]

        shape = (rows, *value.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh), part)

    return {name: place(value) for name, value in batch.items()}


def process_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of the global batch that this process's devices hold.

    Processes that share a tensor axis read the same rows; where a process's rows have
    gaps, the rows between them are read too.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    bounds = [index[0].indices(batch_size)[:2] for index in held.values()]
    return slice(min(b for b, _ in bounds), max(e for _, e in bounds))
