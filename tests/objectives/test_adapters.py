"""Every objective trains an adapter; a step is one step however it is cut."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from objectives_cases import (
    CONFIG,
    BagOfTokens,
    Case,
    assert_same_gradients,
    assert_same_metrics,
    get_case,
    make_batch,
    make_rows,
)

from jaxalign import models, objectives
from jaxalign.cluster import mesh as meshes
from jaxalign.models import adapters, soft_prompt
from jaxalign.models.layers import Dense
from jaxalign.training import step as steps
from jaxalign.training.partition import REFERENCE, Partition

LORA = adapters.LoRA(rank=2, alpha=2, targets="mix")
KINDS = {
    "LoRA": LORA,
    "IA3": adapters.IA3(targets="mix", inputs="(?!)"),
    "SoftPrompt": adapters.SoftPrompt(length=2),
}
# Of networks that have a trunk of their own.
TRUNK = {"targets": "decoder/.*mlp/wo"}


class BagWithDense(BagOfTokens):
    """A network that compiles in no time, with one kernel that takes an adapter.

    A soft prompt is among what its decoder takes the mean of.
    """

    def setup(self):
        super().setup()
        width = self.config.emb_dim
        self.mix = Dense(width, ("embed", "mlp"), jnp.float32)

    def encode(self, tokens, segments, *, prompts=None, deterministic=True):
        return soft_prompt.encode(
            self.token_embedder, lambda x, of, _: x, tokens, segments, prompts
        )

    def decode(self, encoded, of_encoder, *arguments, **settings):
        of_encoder = soft_prompt.segments(
            self.token_embedder, of_encoder, encoded.shape[1]
        )
        return 0.05 * self.mix(
            super().decode(encoded, of_encoder, *arguments, **settings)
        )


def moved(networks, partition):
    """The networks with an adapter that is not where it starts."""
    own, base = partition.split(networks)
    keys = iter(jax.random.split(jax.random.key(0), 200))
    own[partition.main] = jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape),
        own[partition.main],
    )
    return adapters.overlay(base, own)


@functools.cache
def adapted(name, adapter=LORA, network=BagWithDense):
    """An objective's case, a partition, and networks with the adapter."""
    case = get_case(name, network)
    main = case.objective.main
    if main != "policy" and network is BagWithDense and hasattr(adapter, "targets"):
        adapter = dataclasses.replace(adapter, **TRUNK)
    partition = Partition(main, case.objective.frozen, adapter)
    networks = partition.with_adapter(dict(case.params), jax.random.key(9))
    return case, partition, networks


@functools.cache
def _step(case: Case, partition: Partition, **settings):
    return jax.jit(
        steps.make_train_step(case.objective, case.tx, partition=partition, **settings)
    )


def step(case, partition, networks, batch, **settings):
    """Gradients of what trains, metrics, and the states before and after."""
    state = steps.TrainState.create(networks, case.tx, case.objective, partition)
    new, metrics = _step(case, partition, **settings)(state, batch, case.key)
    gradients = jax.tree.map(lambda a, b: a - b, state.params, new.params)
    return gradients, objectives.metrics.summarize([metrics]), state, new


def with_base_reference(case, networks, batch):
    if not case.objective.uses_reference:
        return batch
    base = adapters.plain(networks["policy"])
    return {**batch, **jax.device_get(case._score(base, batch))}


# Those whose forward passes differ; all others are among the slow tests.
FAST = {"LoRA": ("SFT", "DPO", "KTO", "DROV")}
CASES = [
    pytest.param(
        name,
        kind,
        marks=[] if name in FAST.get(kind, ("DPO", "DROV")) else [pytest.mark.slow],
    )
    for name in sorted(objectives.OBJECTIVES)
    for kind in KINDS
]


def test_every_kind_is_here():
    assert KINDS.keys() == adapters.KINDS.keys()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_however_it_is_cut_only_the_adapter_moves(name, kind):
    """Packed on one device with cached columns; and unpacked, in four microbatches
    where the loss is a sum over them, over eight devices, with the base as the
    reference in the step."""
    case, partition, networks = adapted(name, KINDS[kind])
    networks = moved(networks, partition)
    batch = make_batch(case.rows, 4)
    cached = with_base_reference(case, networks, batch)
    gradients, metrics, state, new = step(case, partition, networks, cached)
    own = traverse_util.flatten_dict(gradients[partition.main], sep="/")
    assert own and all(adapters.is_adapter(name) for name in own)
    assert all(abs(x).max() > 0 for x in own.values())
    assert set(state.params) == set(case.objective.networks())
    jax.tree.map(np.testing.assert_array_equal, new.frozen, state.frozen)
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    axes = partition.with_axes(case.objective.logical_axes())
    shardings = meshes.param_shardings(mesh, axes, networks)
    rows = meshes.put_batch(mesh, make_batch(case.rows, 2))
    placed = jax.device_put(networks, shardings)
    pieces = 4 if case.objective.additive else 1
    cut = step(case, partition, placed, rows, num_microbatches=pieces)
    assert_same_gradients(cut[0], gradients)
    assert_same_metrics(cut[1], metrics)


def test_a_value_that_shares_the_encoder_reads_the_tokens_of_a_prompt():
    """Not the rows before it, whose states are there as well."""
    case = get_case("DROV", BagWithDense, share_trunk=True)
    partition = Partition("policy", case.objective.frozen, KINDS["SoftPrompt"])
    networks = partition.with_adapter(dict(case.params), jax.random.key(9))
    networks = moved(networks, partition)
    batches = (make_batch(case.rows, n) for n in (4, 2))
    packed, pairs = (with_base_reference(case, networks, b) for b in batches)
    gradients, metrics, *_ = step(case, partition, networks, packed)
    again = step(case, partition, networks, pairs)
    assert_same_gradients(again[0], gradients)
    assert_same_metrics(again[1], metrics)
    bare = step(
        case, Partition(), {**networks, "policy": case.params["policy"]}, packed
    )
    # The mean of these encoder states is of tokens alone, and no prompt moves it.
    np.testing.assert_allclose(bare[1]["value/mean"], metrics["value/mean"], rtol=1e-5)


T5_LORA = adapters.LoRA(rank=2, targets="attention/|mlp/")


def test_dpo_starts_at_log_2_with_its_base_as_the_reference():
    case, partition, networks = adapted("DPO", T5_LORA, models.T5)
    _, metrics, state, _ = step(case, partition, networks, make_batch(case.rows, 2))
    assert REFERENCE not in state.networks
    evaluate = jax.jit(steps.make_eval_step(case.objective, partition))
    found = objectives.metrics.summarize([evaluate(state, make_batch(case.rows, 2))])
    for told in (metrics, found):
        assert told["log_ratios/mean"] == told["rewards/margins/abs/p95"] == 0
        # To the rounding of a mean over pairs.
        np.testing.assert_allclose(told["loss"], np.log(2.0), rtol=1e-6)


def test_on_t5_it_is_the_gradient_of_the_merged_network():
    """By the chain rule, from the gradient of every kernel; in both layouts."""
    case, partition, networks = adapted("DPO", T5_LORA, models.T5)
    own, base = partition.split(networks)
    noise = iter(jax.random.split(jax.random.key(4), 200))
    own = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), own)
    networks = adapters.overlay(base, own)
    batch = with_base_reference(case, networks, make_batch(case.rows, 2))
    found = step(case, partition, networks, batch)[0]["policy"]
    merged = adapters.merge(T5_LORA.expand(networks["policy"]))
    kernels = case.step(batch, params={"policy": merged})[0]["policy"]
    for module, kernel in adapters.targeted(kernels, T5_LORA.targets).items():
        a, b, da, db = (
            functools.reduce(lambda t, k: t[k], (*module.split("/"), leaf), tree)
            for tree in (networks["policy"], found)
            for leaf in ("lora_a", "lora_b")
        )
        for ours, wanted in (
            (da, T5_LORA.scale * kernel @ b.T),
            (db, T5_LORA.scale * a.T @ kernel),
        ):
            bound = 1e-3 * float(abs(wanted).max()) + 2e-6
            assert float(abs(ours - wanted).max()) < bound, module
    config = dataclasses.replace(CONFIG, scan_layers=True)
    scanned = Case("DPO")
    scanned.objective = dataclasses.replace(case.objective, model=models.T5(config))
    stacked = {"policy": models.stack_layers(networks["policy"])}
    again = step(scanned, partition, stacked, batch)[0]["policy"]
    assert_same_gradients(models.unstack_layers(again), found)


def test_trainable_and_untrained_say_what_moves():
    case = get_case("DROV", BagWithDense)
    batch = case.with_reference(make_batch(case.rows, 2))
    whole = case.step(batch)[0]
    partition = Partition(trainable="policy/|value/value_head", untrained="embedding")
    gradients, _, state, _ = step(case, partition, dict(case.params), batch)
    assert set(gradients["policy"]) == {"kernel", "mix"}
    assert set(gradients["value"]) == {"value_head"}
    wanted = {
        name: {part: whole[name][part] for part in tree}
        for name, tree in gradients.items()
    }
    assert_same_gradients(gradients, wanted)
    adam = steps.TrainState.create(
        dict(case.params), optax.adam(1.0), case.objective, partition
    )
    moments = jax.tree.leaves(adam.opt_state)
    assert len(moments) == 2 * len(jax.tree.leaves(state.params)) + 1


def test_expressions_that_name_nothing_are_refused():
    case = get_case("DROV", BagWithDense)
    shapes, nets = case.params, case.objective.networks()
    for settings, message in (
        ({"trainable": "policy/decoder"}, "TRAINABLE='policy/decoder' is found in no"),
        ({"untrained": "("}, "UNTRAINED must be a regular expression"),
        ({"trainable": "value/"}, "nothing of the main network 'policy'"),
        ({"adapter": adapters.LoRA()}, "is found in no module's path"),
        ({"adapter": adapters.LoRA(targets="mix|embed")}, None),
    ):
        if message is None:
            Partition(**settings).check(shapes, nets)
            continue
        with pytest.raises(ValueError, match=message):
            Partition(**settings).check(shapes, nets)


def test_there_is_one_copy_of_the_base_and_no_gradient_of_it():
    """By the compiler's account of DPO with the reference in the step."""
    config = models.T5Config(64, 512, 8, 64, 2048, 1, 1)
    objective = objectives.DPO(model=models.T5(config))
    partition = Partition(adapter=adapters.LoRA())
    shapes = {"policy": models.shapes(objective.model)}
    shapes = jax.eval_shape(partition.with_adapter, shapes, jax.random.key(0))
    tx = optax.adam(1e-3)
    state = jax.eval_shape(
        lambda networks: steps.TrainState.create(networks, tx, objective, partition),
        shapes,
    )
    function = steps.make_train_step(objective, tx, partition=partition)
    batch = make_batch(make_rows(2), 1)
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = jax.jit(function, donate_argnums=0).lower(state, batch, key).compile()
    memory = compiled.memory_analysis()

    def size(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    base, own = size(state.frozen), size(state.params)
    assert own < base / 50
    # The state is an argument and is given back in place: the base is there once.
    assert memory.argument_size_in_bytes < base + 4 * own + size(batch) + 4096
    assert memory.alias_size_in_bytes >= base + 3 * own
    # Neither a gradient of it nor a merged copy is among the temporaries.
    assert memory.temp_size_in_bytes < base / 4
