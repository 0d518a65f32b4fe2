"""Log-probabilities in bfloat16: as near to float32's as Hugging Face's are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hugging_face import torch_model

from jaxalign import models

CONFIG = models.T5Config(
    vocab_size=1024,
    emb_dim=128,
    num_heads=4,
    head_dim=32,
    mlp_dim=256,
    num_encoder_layers=3,
    num_decoder_layers=3,
)
ROWS, INPUTS, TARGETS = 8, 48, 32


def a_batch():
    """Prompts and responses without padding."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, CONFIG.vocab_size, (ROWS, INPUTS))
    targets = rng.integers(2, CONFIG.vocab_size, (ROWS, 1, TARGETS))
    shifted = np.pad(targets[..., :-1], ((0, 0), (0, 0), (1, 0)))
    return {
        "encoder_input_tokens": prompts,
        "encoder_segment_ids": np.ones_like(prompts),
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
        "decoder_segment_ids": np.ones_like(targets),
        "response_prompt": np.zeros((ROWS, 1)),
    }


def ours(params, batch, **execution):
    model = models.T5(dataclasses.replace(CONFIG, **execution))
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
    logps = jax.jit(lambda p: models.token_logps(model, p, batch))(params)
    return np.asarray(logps)[:, 0]


def theirs(network, batch):
    def ids(name):
        return torch.tensor(batch[name].reshape(ROWS, -1), dtype=torch.long)

    with torch.no_grad():
        logits = network(
            input_ids=ids("encoder_input_tokens"),
            decoder_input_ids=ids("decoder_input_tokens"),
        ).logits
    logps = torch.log_softmax(logits.float(), -1)
    return logps.gather(-1, ids("decoder_target_tokens")[..., None])[..., 0].numpy()


def rms(a, b):
    return float(np.sqrt(np.mean(np.square(a - b))))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_bfloat16_is_as_near_to_float32_as_hugging_faces(scale):
    """The root of the mean squared difference of a token's log-probability."""
    params = models.init_params(models.T5(CONFIG), jax.random.key(0))
    params = jax.tree.map(lambda x: scale * x, params)
    batch = a_batch()
    exact = ours(params, batch)
    network = torch_model(models.T5(CONFIG), params)
    assert rms(theirs(network, batch), exact) < 1e-4 * max(1.0, np.abs(exact).max())
    found = {
        attention: rms(
            ours(params, batch, dtype="bfloat16", attention=attention), exact
        )
        for attention in ("whole", "chunked")
    }
    half = rms(theirs(network.to(torch.bfloat16), batch), exact)
    for error in found.values():
        assert 0.0 < error <= half
