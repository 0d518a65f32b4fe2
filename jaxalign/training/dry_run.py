"""What a run would be, without running it: for ``--dry_run`` and ``jaxalign data``."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from jaxalign import batch as batch_lib
from jaxalign import prepare
from jaxalign.cluster import mesh as meshes
from jaxalign.training import announce, inputs
from jaxalign.training import run as runs
from jaxalign.training.fingerprints import leaf_names


def describe(run: runs.Run) -> str:
    """Parameters, batch and memory of a run, from its compiled but unrun step.

    The data is prepared, as the shapes depend on it; nothing is trained and nothing is
    written to the run directory.
    """
    ready = runs.setup(run)
    shapes = dict(ready.inputs.train.shapes)
    if ready.objective.uses_reference and run.reference == "cached":
        columns = batch_lib.extra(ready.objective.columns, "pass")
        responses = shapes["response_mask"]
        shapes |= {name: responses for name in columns}
    sharding = meshes.batch_sharding(ready.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)
        for name, s in shapes.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = ready.train_step().lower(ready.abstract_state, batch, key)
    with announce.compiling("the training step"):
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    sizes = {
        "parameters": _bytes(ready.abstract_state.networks),
        "optimizer": _bytes(ready.abstract_state.opt_state),
        "batch": _bytes(batch),
        "temporaries of a step, per device": int(memory.temp_size_in_bytes),
    }
    announce.random_start(run, ready.objective)
    announce.another_template(run)
    lines = announce.describe(run, ready, 0)
    lines += ["", "Parameters:", *_parameter_table(ready.abstract_state.networks)]
    lines += ["", "Batch:"]
    lines += [f"  {n:<26}{s.dtype!s:<10}{s.shape}" for n, s in sorted(batch.items())]
    lines += ["", "Memory:"]
    lines += [f"  {name:<36}{_human(size):>12}" for name, size in sizes.items()]
    lines += ["", describe_data(run)]
    return "\n".join(lines)


def describe_data(run: runs.Run) -> str:
    """The summary of a run's data: counts, lengths, truncation, occupancy."""
    objective = run.objective(model=run.model)
    caches = inputs.prepare(run.dataset, objective, run.vocabulary)
    lengths = run.dataset.feature_lengths
    texts = []
    for split, of_split in caches.items():
        for cache in of_split:
            table = prepare.describe(
                cache,
                **lengths,
                packing=run.dataset.packing,
                decoder_rows=run.dataset.decoder_rows,
                truncate=run.dataset.truncate,
                on_too_long=run.dataset.on_too_long,
            )
            texts.append(f"{split}\n{table}")
    if not run.dataset.synthetic and (told := inputs.shared_prompts(caches)):
        texts.append(told)
    return "\n\n".join(texts)


def _parameter_table(params: Any) -> list[str]:
    named = leaf_names(params)
    width = max(map(len, named)) + 2
    lines = [
        f"  {name:<{width}}{s.shape!s:<20}{s.dtype!s:<9}{s.sharding.spec}"
        for name, s in named.items()
    ]
    total = sum(math.prod(s.shape) for s in named.values())
    return [*lines, f"  {total:,} parameters in {len(named)} arrays"]


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
