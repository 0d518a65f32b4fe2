"""The device mesh, and where every array lives on it.

One mesh, three axes: ``data`` and ``fsdp`` split the batch, ``fsdp`` and ``tensor``
split the parameters. The network names its axes logically (T5X's names); the rules
below map them to mesh axes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None
) -> Mesh:
    """Builds the mesh; one axis may be -1, meaning "all that remains".

    Args:
      data: replicas of the model, each with its own rows of the batch.
      fsdp: ways the parameters, and the batch, are split.
      tensor: ways the heads, the hidden layer and the vocabulary are split.
      devices: the devices to use; all by default.

    Raises:
      ValueError: when the sizes do not multiply to the number of devices.

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
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"The mesh {dict(zip(AXES, sizes, strict=True))} needs "
            f"{math.prod(sizes)} devices, but there are {len(devices)}."
        )
    # Tensor varies fastest: its devices are neighbours, which talk the most.
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data axes; what every array of a batch uses."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def param_shardings(mesh: Mesh, logical_axes: Any, shapes: Any) -> Any:
    """A `NamedSharding` per parameter, from its logical axes.

    Args:
      mesh: the mesh.
      logical_axes: tree of tuples of axis names.
      shapes: the same tree of arrays or ``ShapeDtypeStruct``.

    Raises:
      ValueError: naming the parameter, when an axis does not divide.
    """

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

    A leaf whose path ends in a parameter's path and whose shape is the parameter's
    gets the parameter's sharding; anything else (counters, factored moments) is small
    and replicated.
    """
    known = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        known[jax.tree_util.keystr(path)] = leaf.shape
    placed = dict(
        zip(known, jax.tree.leaves(shardings), strict=True)
    )  # same order: same tree

    def one(path: Any, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            name = jax.tree_util.keystr(path[start:])
            if name in known and known[name] == leaf.shape:
                return placed[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Refuses, before compilation, a batch that does not divide.

    Raises:
      ValueError: with the nearest batch sizes that do.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = ways * microbatches
    if microbatches < 1 or batch_size % unit:
        lower = batch_size // unit * unit if microbatches > 0 else 0
        raise ValueError(
            f"BATCH_SIZE={batch_size} rows must divide by {ways} devices along "
            f"data x fsdp times NUM_MICROBATCHES={microbatches}; nearest: "
            f"{sorted({max(lower, unit), lower + unit})}."
        )


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Places this process's rows of a global batch on its devices."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def process_rows(batch_size: int) -> slice:
    """The rows of the global batch that this process feeds."""
    per_process = batch_size // jax.process_count()
    start = jax.process_index() * per_process
    return slice(start, start + per_process)
