"""Adapters on T5: what they add, that merging changes nothing, what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import batch as batches
from jaxalign import models
from jaxalign.models import adapters

CONFIG = models.T5Config(48, 16, 2, 8, 32, 2, 2)
ALL = "attention/|mlp/"
KINDS = {
    "lora": adapters.LoRA(rank=3),
    "all": adapters.LoRA(rank=3, targets=ALL),
    "rslora": adapters.LoRA(rank=3, rslora=True),
    "dora": adapters.LoRA(rank=3, dora=True, targets=ALL),
    "ia3": adapters.IA3(),
    "prompt": adapters.SoftPrompt(length=3),
    "uniform": adapters.SoftPrompt(length=2, start="uniform"),
}
MERGING = [kind for kind, adapter in KINDS.items() if adapter.merges]


def model(scan_layers=False):
    return models.T5(dataclasses.replace(CONFIG, scan_layers=scan_layers))


def with_random(adapter, base):
    """An adapter that has moved away from where it starts."""
    key = jax.random.key(5)
    own = adapter.init(key, base)
    leaves, tree = jax.tree.flatten(own)
    keys = jax.random.split(key, len(leaves))
    moved = [
        leaf + 0.3 * jax.random.normal(k, leaf.shape)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def logits(net, params):
    return jax.jit(net.apply)({"params": params}, batches.example())


@pytest.fixture(scope="module")
def base():
    return models.init_params(model(), jax.random.key(0))


def test_every_kind_is_here():
    assert {type(adapter) for adapter in KINDS.values()} == {*adapters.KINDS.values()}


@pytest.mark.parametrize("kind", MERGING)
def test_merged_it_is_the_same_function_in_both_layouts(kind, base):
    adapter = KINDS[kind]
    own = with_random(adapter, base)
    expanded = adapter.expand(adapters.overlay(base, own))
    found = logits(model(), expanded)
    assert float(abs(found - logits(model(), base)).max()) > 0.1
    merged = adapters.merge(expanded)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_allclose(logits(model(), merged), found, rtol=1e-4, atol=1e-4)
    adapters.merge(merged)  # nothing to do
    together = models.stack_layers(adapters.overlay(base, own))
    stacked = adapter.expand(together)
    scanned = logits(model(scan_layers=True), stacked)
    np.testing.assert_allclose(scanned, found, rtol=1e-4, atol=1e-4)
    for a, b in zip(
        jax.tree.leaves(models.unstack_layers(adapters.merge(stacked))),
        jax.tree.leaves(merged),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", MERGING)
def test_what_merges_starts_at_the_base(kind, base):
    adapter = KINDS[kind]
    own = adapter.init(jax.random.key(1), base)
    expanded = adapter.expand(adapters.overlay(base, own))
    found, wanted = logits(model(), expanded), logits(model(), base)
    if kind == "dora":  # a length divided by itself, computed in two ways
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_same_numbers_and_function_in_both_layouts(kind, base):
    adapter, key = KINDS[kind], jax.random.key(1)
    own = adapter.init(key, base)
    adapters.check_targets(adapter, models.shapes(model()), model())
    expanded = adapter.expand(adapters.overlay(base, own))
    moved = adapters.overlay(base, with_random(adapter, base))
    found = logits(model(), adapter.expand(moved))
    assert float(abs(found - logits(model(), base)).max()) > 0.1
    scanned = logits(model(True), adapter.expand(models.stack_layers(moved)))
    np.testing.assert_allclose(scanned, found, rtol=1e-4, atol=1e-4)
    stacked = adapter.init(key, models.stack_layers(base))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=0.0),
        models.unstack_layers(stacked),
        own,
    )
    again = adapters.plain(expanded)
    jax.tree.map(np.testing.assert_array_equal, again, base)
    assert adapters.restored(adapters.stored(adapter)) == adapter
    axes = adapter.axes(models.logical_axes(model()))
    jax.tree.map(
        lambda names, leaf: np.testing.assert_equal(len(names), leaf.ndim),
        axes,
        own,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_dropout_drops_inputs_of_the_update_alone_and_only_in_training(base):
    adapter = adapters.LoRA(rank=3, dropout=0.5)
    own = with_random(adapter, base)
    tree = adapters.overlay(base, own)
    batch = batches.example()

    def logps(params, key):
        return models.final_states(
            model(), params, batch, deterministic=key is None, dropout_key=key
        )[0]

    training = adapter.expand(tree, training=True)
    still = logps(adapter.expand(tree), None)
    np.testing.assert_array_equal(logps(training, None), still)
    one, two = (logps(training, jax.random.key(i)) for i in (1, 2))
    assert float(abs(one - two).max()) > 1e-3
    np.testing.assert_array_equal(logps(training, jax.random.key(1)), one)
    # An update of nothing has nothing to drop.
    zero = adapters.LoRA(rank=3, dropout=0.5)
    nothing = zero.expand(
        adapters.overlay(base, zero.init(jax.random.key(0), base)), training=True
    )
    bare = logps(base, None)
    np.testing.assert_array_equal(logps(nothing, jax.random.key(1)), bare)


def test_what_dropout_leaves_has_the_mean_of_all():
    """One layer, many rows: each has a mask of its own for all of its positions."""
    from jaxalign.models.layers import Dense

    layer = Dense(6, ("embed", "mlp"), jnp.float32)
    key = jax.random.key(0)
    params = {
        "kernel": jnp.zeros((4, 6)),
        "lora_a": jax.random.normal(key, (4, 2)),
        "lora_b": jax.random.normal(key, (2, 6)),
        "lora_keep": jnp.full(1, 0.75),
    }
    x = jnp.broadcast_to(jax.random.normal(key, (4,)), (20000, 2, 4))
    y = layer.apply({"params": params}, x, rngs={"dropout": key})
    np.testing.assert_array_equal(y[:, 0], y[:, 1])
    whole = layer.apply({"params": params}, x[:1])[0, 0]
    np.testing.assert_allclose(y[:, 0].mean(0), whole, rtol=0.01)
    assert len(np.unique(np.asarray(y[:, 0, 0]).round(5))) == 2**4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapters.LoRA(rank=0), "rank must be at least 1"),
        (lambda: adapters.LoRA(rank=2.5), "rank must be a whole number"),
        (lambda: adapters.LoRA(dropout=1.0), r"dropout must be in \[0, 1\)"),
        (lambda: adapters.LoRA(alpha=-1.0), "alpha must be positive"),
        (lambda: adapters.LoRA(targets="("), "targets must be a regular expression"),
        (lambda: adapters.IA3(inputs=3), "inputs must be a regular expression"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_targets_that_take_no_adapter_are_refused(base):
    net = model()
    adapters.check_targets(adapters.LoRA(targets=ALL), base, net)
    with pytest.raises(ValueError, match=r"in no module's path.*layers_\*/attention"):
        adapters.LoRA(targets="q_proj").init(jax.random.key(0), base)
    with pytest.raises(ValueError, match="logits_dense, which take no adapter"):
        adapters.check_targets(adapters.LoRA(targets="decoder/"), base, net)
    scanned = model(scan_layers=True)
    found = adapters.adaptable(scanned)
    assert "encoder/encoder/attention/query" in found and len(found) == 7 + 11
