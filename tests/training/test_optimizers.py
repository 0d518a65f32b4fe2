"""Adafactor against T5X's numbers and a float64 reference; the rest by closed form."""

from __future__ import annotations

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import models
from jaxalign.training import adafactor as adafactor_module
from jaxalign.training import optimizers, schedules

STEPS = 5
GRADIENT_SCALES = (1.0, 0.1, 10.0, 0.5, 3.0)

FLAT = {
    "token_embedder/embedding": (160, 128),
    "decoder/logits_dense/kernel": (128, 160),
    "encoder/layers_0/mlp/wi_0/kernel": (128, 192),
    "encoder/layers_0/attention/query/kernel": (128, 64),
    "encoder/layers_0/attention/out/kernel": (128, 128),
    "encoder/relpos_bias/rel_embedding": (4, 32),
    "encoder/encoder_norm/scale": (128,),
}
SCANNED = {  # the layers second, as T5X stores them
    "encoder/encoder/mlp/wi_0/kernel": (128, 3, 192),
    "encoder/encoder/mlp/wo/kernel": (192, 3, 128),
    "encoder/encoder/pre_mlp_layer_norm/scale": (128, 3),
}


def _tree(shapes, seed, scale):
    """Arithmetic rather than a generator: the same numbers in every NumPy."""
    out = {}
    for j, (name, shape) in enumerate(shapes.items()):
        i = np.arange(np.prod(shape), dtype=np.float64)
        x = np.sin(12.9898 * (i + 1) + 78.233 * (seed * 17 + j))
        x = (x * (1 + 0.5 * np.cos(0.37 * i))).reshape(shape) * scale * (1 + j % 3)
        if len(shape) == 3 or shape[-1] == 3:  # layers of different sizes
            x = x * np.reshape([1, 4, 0.3], (3,) + (1,) * (len(shape) - 2))
        if name.endswith("scale") and seed == 0:
            x = 1 + x
        out[name] = x.astype(np.float32)
    return out


def _nest(flat):
    tree = {}
    for name, leaf in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = jnp.asarray(leaf)
    return tree


def _flat(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, np.asarray(value)


def _train(tx, shapes):
    params = _nest(_tree(shapes, 0, 0.05))
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(STEPS):
        params, state = step(
            params, state, _nest(_tree(shapes, t + 1, GRADIENT_SCALES[t]))
        )
    return dict(_flat(params)), state


# fmt: off
# Made by running T5X's own t5x/adafactor.py (commit of 2026, stubs for its imports of
# t5x.utils and t5x.optimizers, logical_factor_rules = standard_logical_factor_rules())
# on `_tree` with JAX 0.10.2 on CPU. Per parameter, of (value after 5 steps - start):
# root mean square, then entries 0, n//3, n//2 and -1 of the flattened array.
T5X_FLAT = {  # learning_rate 0.01, decay_rate 0.8
    "decoder/logits_dense/kernel": [
        0.0002001353, -0.0004146639, -0.0003149509, -0.0003411546, -0.000298731
    ],
    "encoder/encoder_norm/scale": [
        0.0069615, -0.007457674, 0.002238452, -0.003648043, -0.0006241798
    ],
    "encoder/layers_0/attention/out/kernel": [
        0.0001990685, 0.0003140941, 0.0001255833, 0.0001540612, 0.0002632402
    ],
    "encoder/layers_0/attention/query/kernel": [
        0.0002598708, -0.0002570078, -0.0002771597, -0.0002074782, -0.0002587177
    ],
    "encoder/layers_0/mlp/wi_0/kernel": [
        0.0002986092, 0.0005875938, 0.0002034362, 0.0002155863, 0.0003786609
    ],
    "encoder/relpos_bias/rel_embedding": [
        0.0007835383, 0.002033144, 7.608533e-05, 2.875924e-05, 0.0008169822
    ],
    "token_embedder/embedding": [
        9.950258e-05, 0.0001616571, 0.0001660362, 9.948388e-05, 7.056445e-05
    ],
}
T5X_SCANNED = {
    "encoder/encoder/mlp/wi_0/kernel": [
        0.0002375, 0.0001644492, -9.493902e-06, -0.0001194961, -1.774495e-05
    ],
    "encoder/encoder/mlp/wo/kernel": [
        0.0004750317, -0.0003696065, -3.508478e-05, 0.0001659989, 4.02513e-05
    ],
    "encoder/encoder/pre_mlp_layer_norm/scale": [
        0.007177369, 0.005485415, 0.002884388, 0.007229269, -0.008138001
    ],
}
# learning_rate 0.01 * (step + 1), beta1 0.9, weight_decay_rate 0.001, global norm 0.5
T5X_ALL_OPTIONS = {
    "decoder/logits_dense/kernel": [
        9.885338e-05, -1.464784e-05, 5.987845e-05, 7.486343e-05, 0.0001133755
    ],
    "encoder/encoder_norm/scale": [
        0.007045838, -0.01517653, -0.005080879, -0.005330682, -0.00379169
    ],
    "encoder/layers_0/attention/out/kernel": [
        9.776347e-05, 0.0001598597, 4.839897e-05, 3.730506e-05, 6.15567e-05
    ],
    "encoder/layers_0/attention/query/kernel": [
        0.0001400547, -0.0002211817, -0.0001851507, -0.0001243073, -0.0001287796
    ],
    "encoder/layers_0/mlp/wi_0/kernel": [
        0.0001465661, 7.817149e-05, -2.092868e-05, -3.489107e-05, -0.000134781
    ],
    "encoder/relpos_bias/rel_embedding": [
        0.0004301106, 9.338558e-05, -2.724677e-05, 0.0004351139, 0.0003006421
    ],
    "token_embedder/embedding": [
        4.884142e-05, -4.015304e-05, -3.902242e-05, -7.477403e-05, -8.327514e-05
    ],
}
# fmt: on


@pytest.mark.parametrize(
    ("shapes", "golden", "options"),
    [
        (FLAT, T5X_FLAT, {"learning_rate": 0.01}),
        (SCANNED, T5X_SCANNED, {"learning_rate": 0.01}),
        (
            FLAT,
            T5X_ALL_OPTIONS,
            {
                "learning_rate": lambda step: 0.01 * (step + 1),
                "beta1": 0.9,
                "weight_decay_rate": 0.001,
                "grad_clip": 0.5,
            },
        ),
    ],
    ids=["flat", "scanned", "all options"],
)
def test_adafactor_equals_t5x(shapes, golden, options):
    params, _ = _train(optimizers.adafactor(**options), shapes)
    start = _tree(shapes, 0, 0.05)
    assert params.keys() == golden.keys()
    for name, value in params.items():
        change = value.astype(np.float64) - start[name]
        n = change.size
        got = [
            np.sqrt(np.mean(change**2)),
            *change.ravel()[[0, n // 3, n // 2, -1]],
        ]
        # A float32 parameter near 1 is only known to 6e-8.
        np.testing.assert_allclose(
            got, golden[name], rtol=2e-5, atol=3e-7, err_msg=name
        )


def _reference_adafactor(shape, name, *, steps=STEPS, learning_rate=0.01):
    """Shazeer and Stern (2018), Algorithm 4-6, one matrix or vector, float64."""
    shapes = {name: shape}
    x = _tree(shapes, 0, 0.05)[name].astype(np.float64)
    r = c = v = 0.0
    for t in range(1, steps + 1):
        g = _tree(shapes, t, GRADIENT_SCALES[t - 1])[name].astype(np.float64)
        beta = 1 - t**-0.8
        if min(shape) >= 128 and len(shape) == 2:
            r = beta * r + (1 - beta) * (g**2).sum(axis=1)
            c = beta * c + (1 - beta) * (g**2).sum(axis=0)
            v = np.outer(r, c) / r.sum()
        else:
            v = beta * v + (1 - beta) * g**2
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt(np.mean(u**2)))
        x = x - max(1e-3, np.sqrt(np.mean(x**2))) * learning_rate * u
    return x


@pytest.mark.parametrize("shape", [(160, 128), (128, 192), (64, 200), (4, 32), (128,)])
def test_adafactor_equals_the_paper_in_float64(shape):
    params, _ = _train(optimizers.adafactor(0.01), {"kernel": shape})
    expected = _reference_adafactor(shape, "kernel")
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5, atol=1e-7)


def test_scanned_layers_train_as_layers_apart():
    """Each layer its own clip, scale and moments, below the factoring size too."""
    for shape in [(128, 3, 192), (16, 3, 32), (128, 3)]:
        stacked = {"decoder/decoder/mlp/wo/kernel": shape}
        tree = lambda seed, s, stacked=stacked: _tree(stacked, seed, s)  # noqa: E731
        tx = optimizers.adafactor(0.01)
        together, _ = _train(tx, stacked)

        (name,) = stacked
        split = lambda x: {str(i): jnp.asarray(x[:, i]) for i in range(3)}  # noqa: E731
        params = split(tree(0, 0.05)[name])
        state = tx.init(params)
        for t in range(STEPS):
            grads = split(tree(t + 1, GRADIENT_SCALES[t])[name])
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        apart = np.stack([params[str(i)] for i in range(3)], axis=1)
        np.testing.assert_allclose(together[name], apart, rtol=1e-6, atol=1e-8)


def test_layers_axis_is_the_axis_that_the_model_names_layers():
    config = models.T5Config(32, 8, 2, 4, 16, 3, 2)
    for scan in (False, True):
        model = models.T5(dataclasses.replace(config, scan_layers=scan))
        tree = models.logical_axes(model)
        axes = jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda x: isinstance(x, tuple)
        )
        found = set()
        for path, names in axes:
            path = tuple(key.key for key in path)
            expected = names.index("layers") if "layers" in names else None
            axis = adafactor_module.layers_axis(("policy", *path), (7,) * len(names))
            assert axis == expected, path
            found.add(axis)
        assert found == ({None, 1} if scan else {None})


def test_adafactor_equals_optax_where_nothing_is_stacked():
    ours, _ = _train(optimizers.adafactor(0.01, beta1=0.9), FLAT)
    theirs, _ = _train(optax.adafactor(0.01, momentum=0.9), FLAT)
    for name in FLAT:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-8)
    # Why Optax's own is not enough: it clips three layers by their common size.
    ours, _ = _train(optimizers.adafactor(0.01), SCANNED)
    theirs, _ = _train(optax.adafactor(0.01), SCANNED)
    name = "encoder/encoder/mlp/wi_0/kernel"
    start = _tree(SCANNED, 0, 0.05)[name]
    difference = np.abs(ours[name] - theirs[name]).max()
    assert difference > 0.3 * np.abs(theirs[name] - start).max()


def test_adafactor_moments_keep_rank_and_save_memory():
    _, state = _train(optimizers.adafactor(0.01), {**FLAT, **SCANNED})
    moments = state[0]
    assert isinstance(moments, adafactor_module.AdafactorState)
    shapes = {
        field: {k: v.shape for k, v in _flat(getattr(moments, field))}
        for field in ("v_row", "v_col", "v")
    }
    name = "encoder/encoder/mlp/wi_0/kernel"
    assert {f: s[name] for f, s in shapes.items()} == {
        "v_row": (128, 3, 1),
        "v_col": (1, 3, 192),
        "v": (1, 1, 1),
    }
    name = "encoder/layers_0/attention/query/kernel"  # 64 < 128: whole
    assert shapes["v"][name] == (128, 64) and shapes["v_row"][name] == (1, 1)


def test_zero_gradients_leave_parameters_alone():
    tx = optimizers.adafactor(0.01)
    params = {"kernel": jnp.ones((128, 128)), "scale": jnp.ones(4)}
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    for update in jax.tree.leaves(updates):
        assert np.all(np.asarray(update) == 0)


@pytest.mark.parametrize(
    "tx",
    [optimizers.adafactor(0.1), optimizers.optimizer("adamw", learning_rate=0.1)],
    ids=["adafactor", "adamw"],
)
def test_only_float32_parameters(tx):
    with pytest.raises(
        TypeError, match=r"'a/b': expected float32, got bfloat16.*dtype"
    ):
        tx.init({"a": {"b": jnp.ones(2, jnp.bfloat16)}})


# --- Schedules: T5X's factor products, by hand in float64 -------------------------


def test_schedules():
    steps = np.arange(0, 30, dtype=np.float64)
    warm = np.minimum(1, steps / 8)
    cases = {
        "constant": (schedules.constant(0.3, 8), 0.3 * warm),
        "constant, no warm-up": (schedules.constant(0.3), 0.3 + 0 * steps),
        "rsqrt": (schedules.rsqrt(2.0, 8), 2 / np.sqrt(np.maximum(steps, 8))),
        "rsqrt, warm-up": (
            schedules.rsqrt(2.0, 8, linear_warmup=True),
            2 * warm / np.sqrt(np.maximum(steps, 8)),
        ),
        # T5X: base * min(step / warmup, 1 + decay_factor * (warmup - step))
        "linear": (
            schedules.linear(0.3, 24, 8),
            0.3 * np.minimum(steps / 8, 1 + (8 - steps) / 16),
        ),
        "cosine": (
            schedules.cosine(0.3, 24, 8),
            0.3 * warm * 0.5 * (1 + np.cos(np.pi * np.clip((steps - 8) / 16, 0, 1))),
        ),
    }
    for name, (schedule, expected) in cases.items():
        got = np.asarray(jax.vmap(schedule)(jnp.asarray(steps, jnp.int32)))
        expected = np.maximum(expected, 1e-8)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8, err_msg=name)


def test_schedule_rejects_a_span_without_decay():
    with pytest.raises(ValueError, match="total_steps > warmup_steps, got.*100.*150"):
        schedules.linear(0.1, 100, 150)


# --- Any optimizer, clipping, several networks ------------------------------------


def test_any_optax_optimizer_by_name():
    params = {"w": jnp.array([1.0, -2.0])}
    grads = {"w": jnp.array([0.5, 0.25])}
    tx = optimizers.optimizer("adamw", learning_rate=0.1, weight_decay=0.5, b1=0.8)
    updates, _ = tx.update(grads, tx.init(params), params)
    # First step of Adam: the sign of the gradient; decay is scaled by the rate.
    expected = -0.1 * (np.array([1.0, 1.0]) + 0.5 * np.array([1.0, -2.0]))
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5, atol=1e-6)
    for name in ("sgd", "lion", "rmsprop", "adafactor"):
        tx = optimizers.optimizer(name, learning_rate=0.1)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert np.all(np.asarray(updates["w"]) < 0)


def test_unknown_names_list_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown optimizer 'adamv'.*Nearest: .*adamw"
    ):
        optimizers.optimizer("adamv", learning_rate=0.1)
    with pytest.raises(
        ValueError, match=r"argument of adamw 'weight_decai'.*weight_de"
    ):
        optimizers.optimizer("adamw", learning_rate=0.1, weight_decai=0.1)
    with pytest.raises(ValueError, match="grad_clip: expected None or a norm > 0"):
        optimizers.optimizer("sgd", learning_rate=0.1, grad_clip=0.0)


def test_clip_is_by_global_norm_and_the_reported_norm_is_before_it():
    grads = {"policy": {"a": jnp.array([3.0]), "b": jnp.array([0.0, 4.0])}}
    assert float(optimizers.gradient_norms(grads)["grad_norm"]) == pytest.approx(5.0)
    assert set(optimizers.gradient_norms(grads)) == {"grad_norm"}
    tx = optimizers.optimizer("sgd", learning_rate=1.0, grad_clip=0.5)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["policy"]["a"], [-0.3], rtol=1e-6)
    np.testing.assert_allclose(updates["policy"]["b"], [0.0, -0.4], rtol=1e-6)


def test_networks_have_their_own_rates_and_clips():
    tx = optimizers.per_network(
        policy=optimizers.optimizer("sgd", learning_rate=1.0, grad_clip=1.0),
        value=optimizers.optimizer(
            "sgd", learning_rate=schedules.constant(0.1, 2), grad_clip=1.0
        ),
    )
    params = {"policy": {"w": jnp.zeros(2)}, "value": {"w": jnp.zeros(1)}}
    grads = {"policy": {"w": jnp.array([0.3, 0.4])}, "value": {"w": jnp.array([1e6])}}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
    # The value's huge gradient must not shrink the policy's, which is under its clip.
    np.testing.assert_allclose(updates["policy"]["w"], [-0.3, -0.4], rtol=1e-6)
    np.testing.assert_allclose(updates["value"]["w"], [-0.05], rtol=1e-6)
    rates = {k: float(v) for k, v in optimizers.learning_rates(state).items()}
    assert rates == pytest.approx(
        {"learning_rate/policy": 1.0, "learning_rate/value": 0.05}
    )
    norms = optimizers.gradient_norms(grads)
    assert float(norms["grad_norm/policy"]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"expected optimizers for \['policy'\], got"):
        tx.init({"policy": params["policy"]})


def test_adafactor_per_network_factors_scanned_layers_under_the_top_level_name():
    inner = optimizers.adafactor(0.01)
    tx = optimizers.per_network(policy=inner)
    tree = _nest(_tree(SCANNED, 0, 0.05))
    grads = _nest(_tree(SCANNED, 1, 1.0))
    updates, _ = tx.update(
        {"policy": grads}, tx.init({"policy": tree}), {"policy": tree}
    )
    expected, _ = inner.update(grads, inner.init(tree), tree)
    for (name, got), (_, want) in zip(
        _flat(updates["policy"]), _flat(expected), strict=True
    ):
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_gin_configures_everything():
    import gin

    with gin.unlock_config():
        gin.clear_config()
        optimizer = gin.external_configurable(optimizers.optimizer, module="test")
        gin.external_configurable(schedules.linear, module="test")
        gin.parse_config(
            """
            test.optimizer.name = 'adamw'
            test.optimizer.learning_rate = @test.linear()
            test.optimizer.weight_decay = 0.25
            test.linear.learning_rate = 1.0
            test.linear.total_steps = 10
            """
        )
        tx = optimizer()
        gin.clear_config()
    params = {"w": jnp.array([2.0])}
    updates, state = tx.update({"w": jnp.array([1.0])}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-1.5], rtol=1e-5)
    assert float(optimizers.learning_rates(state)["learning_rate"]) == 1.0


@pytest.mark.parametrize("module", [adafactor_module, optimizers, schedules])
def test_docstring_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed
