"""The rationale's term against closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses

# log-probs of chosen and rejected: policy -10, -12, reference -11, -11.5.
PAIR = [jnp.array([x]) for x in (-10.0, -12.0, -11.0, -11.5)]


@pytest.mark.parametrize(
    ("term", "rdpo"), [("nll", 0.9209570), ("logsigmoid", 1.4753123)]
)
def test_rdpo_in_the_papers_and_in_the_codes_form(term, rdpo):
    rationale = losses.rationale(jnp.array([-30.0]), gamma=0.01, term=term)
    found = losses.dpo(*PAIR, beta=0.1) + rationale
    np.testing.assert_allclose(found, [rdpo], rtol=1e-6)


def test_rorpo():
    # Means: chosen -0.5, rejected -1.2, rationale -0.8; the likelihood's loss is 0.5.
    odds = losses.orpo(jnp.array([-0.5]), jnp.array([-1.2]), beta=0.1)
    rationale = losses.rationale(jnp.array([-0.8]), gamma=1.0)
    np.testing.assert_allclose(0.5 + odds + rationale, [1.3246553], rtol=1e-6)


def test_the_codes_gradient_is_the_papers_times_a_sigmoid():
    def grad(term):
        return jax.grad(lambda x: losses.rationale(x, gamma=0.001, term=term))(
            jnp.array(-300.0)
        )

    np.testing.assert_allclose(grad("logsigmoid") / grad("nll"), 0.57444252, rtol=1e-5)


def test_another_term_is_refused():
    with pytest.raises(ValueError, match="'nll', 'logsigmoid'"):
        losses.rationale(jnp.zeros(1), gamma=1.0, term="sigmoid")
