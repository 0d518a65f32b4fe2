"""KTO and DRO against goldens, closed forms and numerically solved optima."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses

# The pair fixture as single trajectories: two desirable, two undesirable.
LOGPS = jnp.array([-10.0, -20.0, -12.0, -19.0])
REF = jnp.array([-11.0, -21.0, -11.5, -20.5])
LABELS = jnp.array([1, 1, 0, 0])


def kto(kl, **settings):
    kl = jnp.array(kl)
    return losses.kto(LOGPS, REF, kl, jnp.zeros_like(kl), LABELS, beta=0.1, **settings)


def test_kto_golden():  # float64, TRL 0.24.0's kto_loss
    np.testing.assert_allclose(
        kto([1.0, 2.0, 0.5, -2.0]),
        [0.4843800843, 0.4843800843, 0.4781389460, 0.5280953744],
        rtol=1e-5,
    )


def test_kto_clamps_a_negative_reference_point():
    found = kto([-1.0, -2.0, -0.5, 2.0], desirable_weight=1.33)
    expected = [0.6317776807, 0.6317776807, 0.4875026035, 0.5374298453]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_kto_at_start_is_half_the_weight_with_a_quarter_of_beta_as_slope():
    x = jnp.array([-3.0, -5.0])
    labels = jnp.array([1, 0])

    def loss(logps):
        return losses.kto(logps, x, x, x, labels, beta=0.1, undesirable_weight=2.0)

    np.testing.assert_allclose(loss(x), [0.5, 1.0], rtol=1e-6)
    slopes = jax.grad(lambda p: loss(p).sum())(x)
    np.testing.assert_allclose(slopes, [-0.025, 0.05], rtol=1e-5)


def test_kto_reference_point_carries_no_gradient():
    kl = jnp.array([1.0, 3.0])
    slopes = jax.grad(
        lambda k: losses.kto(LOGPS, REF, k, jnp.zeros(2), LABELS, beta=0.1).sum()
    )(kl)
    np.testing.assert_array_equal(slopes, [0.0, 0.0])


def test_kto_is_invariant_to_a_common_shift_of_all_log_ratios():
    kl = jnp.array([1.0, 2.0, 0.5, 0.25])
    shifted = losses.kto(LOGPS + 3.0, REF, kl + 3.0, jnp.zeros(4), LABELS, beta=0.1)
    np.testing.assert_allclose(shifted, kto(kl), rtol=1e-6)


def test_kto_with_masks_equals_kto_on_the_slice():
    nan = jnp.array([jnp.nan])
    kl, zero = jnp.array([1.0, 2.0]), jnp.zeros(2)
    mask, kl_mask = jnp.array([1.0] * 4 + [0.0]), jnp.array([1.0, 1.0, 0.0])
    found = losses.kto(
        jnp.concatenate([LOGPS, nan]),
        jnp.concatenate([REF, nan]),
        jnp.concatenate([kl, nan]),
        jnp.concatenate([zero, nan]),
        jnp.concatenate([LABELS, jnp.array([1])]),
        beta=0.1,
        where=mask,
        kl_where=kl_mask,
    )
    expected = losses.kto(LOGPS, REF, kl, zero, LABELS, beta=0.1)
    np.testing.assert_allclose(found, [*expected, 0.0], rtol=1e-6)


def test_dro_scalars():
    one = lambda x: jnp.array([x])  # noqa: E731
    args = [one(-3.0), one(-3.5), one(0.2), one(1.0)]

    def grads(rescale):
        total = lambda p, v: sum(  # noqa: E731
            x.sum()
            for x in losses.dro_v(p, args[1], v, args[3], tau=0.5, rescale=rescale)
        )
        return jax.grad(total, argnums=(0, 1))(args[0], args[2])

    np.testing.assert_allclose(
        losses.dro_v(*args, tau=0.5, rescale=False), [[0.15125], [0.15125]], rtol=1e-6
    )
    # By hand: the residual is 1 - 0.2 - 0.5 * 0.5 = 0.55.
    np.testing.assert_allclose(grads(rescale=True), [[-0.55], [-0.55]], rtol=1e-6)
    np.testing.assert_allclose(grads(rescale=False), [[-0.275], [-0.55]], rtol=1e-6)


def test_dro_where_policy_is_reference_is_half_the_squared_advantage():
    x = jnp.array([-4.0, -9.0])
    rewards, values = jnp.array([1.0, -2.0]), jnp.array([0.5, 1.0])
    policy, value = losses.dro_v(x, x, values, rewards, tau=0.5, rescale=False)
    np.testing.assert_allclose(policy, [0.125, 4.5], rtol=1e-6)
    np.testing.assert_allclose(value, [0.125, 4.5], rtol=1e-6)


# One prompt, three answers. The optima are a numerical solver's, in float64.
REWARDS = np.array([1.0, 0.0, -1.0])
PRIOR = np.array([0.5, 0.3, 0.2])
UNIFORM = np.full(3, 1 / 3)
SKEWED = np.array([0.1, 0.2, 0.7])


def solve(tau, behaviour, frozen_value=None, rescale=True):
    """Minimises the population DRO-V loss over a tabular policy, in float64."""
    with jax.enable_x64(True):
        behaviour, ref = jnp.array(behaviour), jnp.log(jnp.array(PRIOR))

        def loss(params):
            logits, value = params
            value = value if frozen_value is None else jnp.array(frozen_value)
            policy, val = _population(logits, value, ref, tau, rescale)
            return jnp.sum(behaviour * (policy + val))

        params = (jnp.zeros(3), jnp.zeros(()))
        step = jax.jit(
            lambda p: jax.tree.map(lambda x, g: x - 0.3 * g, p, jax.grad(loss)(p))
        )
        for _ in range(6000):
            params = step(params)
        return np.asarray(jax.nn.softmax(params[0])), float(params[1])


def _population(logits, value, ref, tau, rescale):
    policy, val = losses.dro_v(
        jax.nn.log_softmax(logits),
        ref,
        jnp.broadcast_to(value, 3),
        jnp.array(REWARDS),
        tau=tau,
        rescale=rescale,
    )
    return policy, val


@pytest.mark.parametrize("behaviour", [PRIOR, UNIFORM, SKEWED])
@pytest.mark.parametrize(
    ("tau", "policy", "value"),
    [
        (1.0, [0.784399, 0.173139, 0.042463], 0.549691),
        (0.5, [0.918672, 0.074597, 0.006730], 0.695839),
        (5.0, [0.568386, 0.279213, 0.152400], 0.359033),
    ],
)
def test_dro_bandit_finds_the_optimum_whatever_the_behaviour(
    tau, policy, value, behaviour
):
    found, found_value = solve(tau, behaviour)
    np.testing.assert_allclose(found, policy, atol=2e-4)
    np.testing.assert_allclose(found_value, value, atol=2e-4)


@pytest.mark.parametrize(
    ("behaviour", "policy"),
    [
        (PRIOR, [0.718619, 0.217519, 0.063863]),
        (UNIFORM, [0.693127, 0.238056, 0.068818]),
    ],
)
def test_dro_with_a_wrong_frozen_value_is_biased_by_the_behaviour(behaviour, policy):
    """What an implementation that drops V would converge to."""
    found, _ = solve(1.0, behaviour, frozen_value=0.0)
    np.testing.assert_allclose(found, policy, atol=2e-4)


def test_dro_with_the_true_value_frozen_is_unbiased():
    found, _ = solve(1.0, UNIFORM, frozen_value=0.549691)
    np.testing.assert_allclose(found, [0.784399, 0.173139, 0.042463], atol=2e-4)


def test_dro_terms_are_the_joint_loss_with_the_policy_gradient_over_tau():
    rng = np.random.default_rng(0)
    logps, ref, values, rewards = (jnp.array(x) for x in rng.normal(size=(4, 8)))
    tau = 0.7

    def joint(p, v):
        return 0.5 * jnp.sum(jnp.square(rewards - v - tau * (p - ref)))

    def terms(p, v):
        return sum(x.sum() for x in losses.dro_v(p, ref, v, rewards, tau=tau))

    expected = jax.grad(joint, argnums=(0, 1))(logps, values)
    found = jax.grad(terms, argnums=(0, 1))(logps, values)
    np.testing.assert_allclose(found[0], expected[0] / tau, atol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
