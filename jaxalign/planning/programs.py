"""The programs of a run, as shapes: what training, scoring and decoding compile.

Nothing is allocated and no data is read: the step functions are the run's own, the
arguments are ``ShapeDtypeStruct``s with the shardings that the run would use.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import batch as batch_lib
from jaxalign import models
from jaxalign.cluster import mesh as meshes
from jaxalign.data import convert
from jaxalign.data.plan import RowShape
from jaxalign.decoding import Sampling, generate
from jaxalign.models import adapters
from jaxalign.objectives import Objective
from jaxalign.training import reference_cache, scoring
from jaxalign.training import run as runs

STEPS = ("train", "score", "decode")


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments."""

    function: Callable[..., Any]  # what the run would call
    arguments: tuple[Any, ...]  # ``ShapeDtypeStruct``s with shardings
    loop_trips: int = 1  # how often its data-dependent loop runs at most

    def compile(self) -> jax.stages.Compiled:
        return self.function.lower(*self.arguments).compile()


def row_shape(run: runs.Run, objective: Objective) -> RowShape:
    """The batch row that full-length examples make: ``PACKING`` prompts in each."""
    dataset = run.dataset
    packing = dataset.packing or 1
    pairs = objective.schema == "preference"
    rows = dataset.decoder_rows or (2 if pairs else 1)
    return RowShape(
        encoder_length=packing * dataset.feature_lengths["inputs"],
        decoder_rows=rows,
        decoder_length=packing * dataset.feature_lengths["targets"],
        prompts=packing,
        responses=packing * rows,
        pairs=packing if pairs else 1,
    )


def abstract_setup(run: runs.Run, mesh: jax.sharding.Mesh) -> runs.Setup:
    """The run's `Setup` on a mesh, without data."""
    objective = run.objective(model=run.model)
    meshes.check_batch(mesh, run.dataset.batch_size, run.num_microbatches)
    state = runs.abstract_state(run, objective, mesh)
    return runs.Setup(run, objective, None, mesh, state)


def abstract_batch(ready: runs.Setup, *, reference: bool) -> dict[str, Any]:
    """The global batch; with the columns of a reference pass if asked."""
    columns = batch_lib.extra(ready.objective.columns, "pass") if reference else ()
    row = convert.empty_batch(row_shape(ready.run, ready.objective), 1, columns)
    sharding = meshes.batch_sharding(ready.mesh)
    size = ready.run.dataset.batch_size
    return {
        name: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype, sharding=sharding)
        for name, a in row.items()
    }


def writes_text(ready: runs.Setup) -> bool:
    """Whether a run trains a policy, and no reward model, which decodes nothing."""
    main = ready.networks[ready.objective.main]
    return isinstance(main, models.EncoderDecoder)


def _numbers(model: Any, params: Any, batch: Any) -> jax.Array:
    return model.apply({"params": params}, batch)


def program(ready: runs.Setup, step: str) -> Program:
    """One of `STEPS` of a run.

    ``score`` is the reference pass: every response under the policy, or the scores of a
    reward model. ``decode`` samples
    one full-length response to each of ``BATCH_SIZE`` prompts with the run's sampler.
    """
    policy = ready.abstract_state.networks[ready.objective.main]
    if step == "train":
        key = jax.eval_shape(lambda: jax.random.key(0))
        batch = abstract_batch(ready, reference=ready.run.reference == "cached")
        return Program(ready.train_step(), (ready.abstract_state, batch, key))
    if step == "score":
        batch = abstract_batch(ready, reference=False)
        function = reference_cache.scorer(ready.objective)
        if not writes_text(ready):
            model = ready.networks[ready.objective.main]
            function = functools.partial(_numbers, model)
        score = scoring.compiled(function, ready.mesh)
        return Program(score, (adapters.plain(policy), batch))
    sampler, lengths = ready.run.sampler, ready.run.dataset.feature_lengths
    numbers = (sampler.temperature, sampler.top_k, sampler.top_p) if sampler else ()
    sampling = Sampling(*numbers)
    rows = meshes.batch_sharding(ready.mesh)
    size = ready.run.dataset.batch_size

    def decode(params: Any, tokens: jax.Array, ids: jax.Array, key: jax.Array) -> Any:
        return generate(
            ready.objective.model,
            params,
            tokens,
            key=key,
            prompt_ids=ids,
            num_samples=1,
            max_new_tokens=lengths["targets"],
            sampling=sampling,
        )

    decode = meshes.with_activation_rules(ready.mesh, decode)
    tokens = jax.ShapeDtypeStruct((size, lengths["inputs"]), jnp.int32, sharding=rows)
    ids = jax.ShapeDtypeStruct((size,), jnp.uint32, sharding=rows)
    decode, trips = jax.jit(decode, out_shardings=rows), lengths["targets"]
    return Program(decode, (policy, tokens, ids, key), loop_trips=trips)
