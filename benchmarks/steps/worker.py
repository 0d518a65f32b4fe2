"""One measurement in a process of its own: ``python -m benchmarks.steps.worker``.

Reads a JSON object from standard input and prints one as its last line. A process per
measurement, so that memory is that measurement's alone and nothing compiled before it
helps.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.steps import synthetic
from jaxalign import batch as batch_lib
from jaxalign import configs
from jaxalign.cluster import mesh as meshes
from jaxalign.planning import flops, programs
from jaxalign.training import inputs
from jaxalign.training import run as runs

# A step of synthetic tokens needs neither text nor vocabulary.
NO_DATA = ["VOCABULARY = None", "MIXTURE_OR_TASK_NAME = None", "DATA = 'synthetic'"]


def matmul_ceiling(dtype: str, size: int = 2048, repeats: int = 7) -> float:
    """The FLOP/s of one square matrix product on this machine, the best of a few.

    The result is asked for in `dtype` and in float32: for a CPU's bfloat16 unit only
    the latter is fast.
    """
    x = jnp.ones((size, size), dtype)
    rates = []
    for result in dict.fromkeys((dtype, "float32")):
        product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=result))
        jax.block_until_ready(product(x, x))
        rates += [_timed(lambda p=product: p(x, x)) for _ in range(repeats)]
    return 2 * size**3 / min(rates)


def _timed(function: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def configured_run(
    gin_files: list[str], bindings: list[str], synthetic_data: bool
) -> runs.Run:
    """The run of some gin files, with or without its data."""
    configs.parse(gin_files, [*bindings, *(NO_DATA if synthetic_data else [])])
    return configs.configured(runs.Run)()


def model_flops(ready: runs.Setup, arguments: tuple[Any, ...], data: bool) -> int:
    """Matrix operations of a step without what memory savings compute again.

    Of synthetic rows that are packed, what their examples would cost alone: products
    with another example's keys are no work done.
    """
    config = dataclasses.replace(
        ready.objective.model.config,
        logits_chunk=0,
        remat_policy="none",
        attention="whole",
    )
    model = ready.objective.model.clone(config=config)
    plain = dataclasses.replace(
        ready, objective=dataclasses.replace(ready.objective, model=model)
    )
    dataset = ready.run.dataset
    if not data and (dataset.packing or 1) > 1:
        alone = dataclasses.replace(
            dataset, packing=None, batch_size=dataset.batch_size * dataset.packing
        )
        plain = dataclasses.replace(
            plain, run=dataclasses.replace(ready.run, dataset=alone)
        )
        cached = ready.run.reference == "cached"
        batch = programs.abstract_batch(plain, reference=cached)
        arguments = (arguments[0], batch, arguments[2])
    return flops.matmul_flops(plain.train_step(), *arguments)


def train_step(
    gin_files: list[str],
    bindings: list[str],
    *,
    steps: int = 6,
    data: bool = False,
) -> dict[str, Any]:
    """Times the training step of a run.

    Args:
      gin_files: of the run.
      bindings: of the run.
      steps: timed; two more come first.
      data: whether the batches are the run's data, each with its transfer to the
        device; else one batch of random tokens without padding, on the device already.

    Returns:
      Seconds of each step, and what `benchmarks.steps.cases` makes of them.
    """
    run = configured_run(gin_files, bindings, not data)
    mesh = meshes.named_mesh(run.mesh)
    ready = runs.setup(run) if data else programs.abstract_setup(run, mesh)
    key = jax.random.key(0)
    state = ready.init_state(key)

    def placed(batch: dict[str, np.ndarray]) -> Any:
        return meshes.put_batch(mesh, batch, run.dataset.batch_size)

    batches: Iterator[dict[str, np.ndarray]]
    if data:
        batches = _with_reference(ready, ready.inputs.train.iterate(0))
    else:
        batches = itertools.repeat(synthetic.batch(run, ready.objective))
    first = placed(next(batches))
    arguments = (state, first, key)
    start = time.perf_counter()
    compiled = ready.train_step().lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    flops_per_step = model_flops(ready, arguments, data)
    ceiling = matmul_ceiling(run.model.config.dtype)
    seconds = []
    for i in range(steps + 2):
        if data:
            batch = next(batches)
            start = time.perf_counter()
            on_device = placed(batch)
        else:
            batch, on_device = next(batches), first
            start = time.perf_counter()
        state, _ = compiled(state, on_device, key)
        jax.block_until_ready(state.params)
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    ceiling = max(ceiling, matmul_ceiling(run.model.config.dtype))
    tokens = synthetic.real_tokens(batch)
    if data:
        # Of the mean batch: a few batches of ragged rows are no fair sample.
        plans = ready.inputs.train.plans
        held = sum(sum(plan.tokens.values()) for plan in plans)
        tokens = held / sum(map(len, plans)) * run.dataset.batch_size
    if not bool(state.finite):
        raise FloatingPointError("A step of the benchmark was not finite.")
    memory = compiled.memory_analysis()
    return {
        "seconds": seconds,
        "real_tokens": tokens,
        "positions": int(
            first["encoder_segment_ids"].size + first["decoder_segment_ids"].size
        ),
        "compile_seconds": compile_seconds,
        "model_flops": flops_per_step,
        "matmul_ceiling": ceiling,
        "peak_temporary_bytes": memory.temp_size_in_bytes,
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": _device(),
        "dtype": run.model.config.dtype,
    }


def _with_reference(
    ready: runs.Setup, batches: Iterator[dict[str, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
    """Columns that a reference cache would join: numbers of the usual size."""
    cached = ready.run.reference == "cached"
    columns = batch_lib.extra(ready.objective.columns, "pass") if cached else ()
    for batch in batches:
        shape = batch["response_mask"].shape
        yield {**batch, **{c: np.full(shape, -50.0, np.float32) for c in columns}}


def feed(
    gin_files: list[str], bindings: list[str], *, seconds: float = 5.0
) -> dict[str, Any]:
    """Real tokens per second that the input pipeline delivers, nothing consuming."""
    run = configured_run(gin_files, bindings, False)
    objective = run.objective(model=run.model)
    start = time.perf_counter()
    found = inputs.build(run.dataset, objective, run.vocabulary, None)
    prepared = time.perf_counter() - start
    batches = found.train.iterate(0)
    next(batches)
    tokens, count, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        tokens += synthetic.real_tokens(next(batches))
        count += 1
    elapsed = time.perf_counter() - start
    return {
        "real_tokens_per_second": tokens / elapsed,
        "batches_per_second": count / elapsed,
        "examples": sum(len(cache) for cache in found.train.caches),
        "occupancy": found.train.plans[0].occupancy(),
        "prepare_seconds": prepared,
        "device": _device(),
    }


def _device() -> str:
    return jax.devices()[0].device_kind


def memory(gin_files: list[str], bindings: list[str]) -> dict[str, Any]:
    """What the compiler says a run's training step needs; nothing is allocated."""
    run = configured_run(gin_files, bindings, True)
    ready = programs.abstract_setup(run, meshes.named_mesh(run.mesh))
    found = programs.program(ready, "train").compile().memory_analysis()
    return {
        "peak_temporary_bytes": found.temp_size_in_bytes,
        "device": _device(),
        "dtype": run.model.config.dtype,
    }


_KINDS = {"train_step": train_step, "feed": feed, "memory": memory}


def main() -> None:
    request = json.load(sys.stdin)
    found = _KINDS[request.pop("kind")](**request)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
