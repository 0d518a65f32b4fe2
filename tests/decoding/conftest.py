from __future__ import annotations

import jax
import pytest

from jaxalign.models import T5, T5Config, init_params


@pytest.fixture(scope="session")
def tiny():
    """A random T5 whose greedy responses end at different lengths."""
    model = T5(
        T5Config(
            vocab_size=24,
            emb_dim=16,
            num_heads=2,
            head_dim=8,
            mlp_dim=32,
            num_encoder_layers=2,
            num_decoder_layers=2,
        )
    )
    params = init_params(model, jax.random.key(3))
    # Sharper than the initialisation: the responses depend on the prompts.
    return model, jax.tree.map(lambda x: 2.0 * x if x.ndim > 1 else x, params)
