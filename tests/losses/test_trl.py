"""Losses and gradients against what TRL 0.24.0's own methods returned in float64.

``goldens/record_trl.py`` recorded them on random inputs; nothing of jaxalign ran there.
"""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses

RECORD = json.loads(
    pathlib.Path(__file__).with_name("goldens").joinpath("trl_0_24_0.json").read_text()
)
BETA = RECORD["beta"]
INPUTS = {k: np.array(v) for k, v in RECORD["inputs"].items()}
RATIO = [
    INPUTS[f"{ref}{side}_logps"]
    for ref in ("", "ref_")
    for side in ("chosen", "rejected")
]
POLICY = RATIO[:2]
MEANS = [INPUTS[f"{s}_logps"] / INPUTS[f"{s}_lengths"] for s in ("chosen", "rejected")]
# Which loss, its settings beside beta, and what it is given.
PAIRS = {
    "dpo": (losses.dpo, {}, RATIO),
    "cdpo": (losses.dpo, {"label_smoothing": 0.1}, RATIO),
    "robust_dpo": (losses.robust_dpo, {"label_smoothing": 0.1}, RATIO),
    "hinge": (losses.hinge, {}, RATIO),
    "ipo": (losses.ipo, {"length_normalize": False}, RATIO),
    "exo_pair": (losses.exo_pair, {"label_smoothing": 1e-3}, RATIO),
    "nca_pair": (losses.nca_pair, {}, RATIO),
    "sppo_hard": (losses.sppo_hard, {}, RATIO),
    "apo_zero": (losses.apo_zero, {}, RATIO),
    "apo_down": (losses.apo_down, {}, RATIO),
    "cpo": (losses.cpo, {}, POLICY),
    "cpo_smoothed": (losses.cpo, {"label_smoothing": 0.1}, POLICY),
    "slic_hf": (losses.slic_hf, {}, POLICY),
    "simpo": (losses.simpo, {"beta": 2.0, "gamma": 0.7}, MEANS),
    "orpo": (losses.orpo, {}, MEANS),
}
WEIGHTS = {"desirable_weight": 1.33, "undesirable_weight": 0.9}


def assert_matches(function, inputs, expected):
    """Values within 1e-5, gradients within 1e-4, both relative.

    TRL lets gradients reach the reference; only the policy's are compared.
    """
    arrays = [jnp.asarray(x, jnp.float32) for x in inputs]
    np.testing.assert_allclose(
        function(*arrays), expected["losses"], rtol=1e-5, atol=1e-6
    )
    argnums = tuple(range(min(2, len(arrays))))
    grads = jax.grad(lambda *x: jnp.sum(function(*x)), argnums)(*arrays)
    for found, wanted in zip(grads, expected["gradients"], strict=False):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)


def test_every_recorded_case_is_compared():
    assert set(RECORD["cases"]) == {*PAIRS, "kto", "apo_zero_unpaired", "bco"}


@pytest.mark.parametrize("name", PAIRS)
def test_pair_loss(name):
    loss, settings, inputs = PAIRS[name]
    function = functools.partial(loss, **{"beta": BETA, **settings})
    assert_matches(function, inputs, RECORD["cases"][name])


def unpaired(loss, chosen, rejected, ref_chosen, ref_rejected, *rest, **settings):
    labels = jnp.repeat(jnp.array([1, 0]), len(chosen))
    return loss(
        jnp.concatenate([chosen, rejected]),
        jnp.concatenate([ref_chosen, ref_rejected]),
        *rest,
        labels,
        beta=BETA,
        **settings,
    )


def test_kto():
    kl = [jnp.asarray(INPUTS[n], jnp.float32) for n in ("kl_logps", "ref_kl_logps")]

    def function(*four):
        return unpaired(losses.kto, *four, *kl, **WEIGHTS)

    assert_matches(function, RATIO, RECORD["cases"]["kto"])


def test_apo_zero_unpaired():
    def function(*four):
        return unpaired(losses.apo_zero_unpaired, *four, **WEIGHTS)

    assert_matches(function, RATIO, RECORD["cases"]["apo_zero_unpaired"])


def test_bco_with_a_shift_that_runs_over_batches():
    total, count = 0.0, 0
    for step, expected in enumerate(RECORD["cases"]["bco"]["steps"]):
        half = [x.reshape(2, -1)[step] for x in RATIO]
        rewards = BETA * np.concatenate([half[0] - half[2], half[1] - half[3]])
        total, count = total + rewards.sum(), count + rewards.size
        np.testing.assert_allclose(total / count, expected["shift"], rtol=1e-6)

        def function(*four, shift=total / count):
            labels = jnp.repeat(jnp.array([1, 0]), len(four[0]))
            return losses.bco(
                jnp.concatenate(four[:2]),
                jnp.concatenate(four[2:]),
                labels,
                shift,
                beta=BETA,
            )

        assert_matches(function, half, expected)
