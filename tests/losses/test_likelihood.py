"""Cross-entropy against PyTorch and closed forms."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxalign import losses

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 5, 11)).astype(np.float32)
TARGETS = RNG.integers(0, 11, size=(2, 5))
LOG_Z = np.log(np.exp(LOGITS.astype(np.float64)).sum(-1))
# What the loss takes of the logits.
HEAD = (np.take_along_axis(LOGITS, TARGETS[..., None], -1)[..., 0], LOG_Z)


def loss(**settings):
    return losses.cross_entropy(*map(jnp.float32, HEAD), **settings)


def test_matches_pytorch():
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(LOGITS).reshape(-1, 11),
        torch.tensor(TARGETS).reshape(-1),
        reduction="none",
    ).reshape(2, 5)
    np.testing.assert_allclose(loss(), expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_label_smoothing_is_the_kl_divergence_to_the_smoothed_target(smoothing):
    q = np.full(LOGITS.shape, smoothing / 10)
    np.put_along_axis(q, TARGETS[..., None], 1 - smoothing, axis=-1)
    logp = LOGITS - LOG_Z[..., None]
    found = loss(label_smoothing=smoothing, mean_logits=LOGITS.mean(-1), vocab_size=11)
    np.testing.assert_allclose(found, (q * (np.log(q) - logp)).sum(-1), rtol=1e-5)


def test_label_smoothing_says_what_it_needs():
    with pytest.raises(ValueError, match="needs mean_logits and vocab_size"):
        loss(label_smoothing=0.1)


def test_z_loss_adds_the_squared_log_normaliser():
    np.testing.assert_allclose(loss(z_loss=0.5) - loss(), 0.5 * LOG_Z**2, rtol=1e-4)
