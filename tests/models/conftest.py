"""One tiny network and one bag of examples, packed and unpacked."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxalign import models

CONFIG = models.T5Config(
    vocab_size=40,
    emb_dim=24,
    num_heads=3,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
    # Small enough for the tests' distances to reach every kind of bucket.
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)


def place(rows, *, length, decoder_rows, decoder_length, prompts, responses):
    """Lays examples out by hand.

    Args:
      rows: for each row ``(prompt tokens of each prompt, responses)``, a response
        being ``(tokens, prompt index, decoder row)``.
    """
    b, k = len(rows), decoder_rows
    batch = {
        "encoder_input_tokens": np.zeros((b, length), np.int32),
        "encoder_segment_ids": np.zeros((b, length), np.int32),
        "decoder_input_tokens": np.zeros((b, k, decoder_length), np.int32),
        "decoder_target_tokens": np.zeros((b, k, decoder_length), np.int32),
        "decoder_loss_weights": np.zeros((b, k, decoder_length), np.float32),
        "decoder_segment_ids": np.zeros((b, k, decoder_length), np.int32),
        "prompt_mask": np.zeros((b, prompts), np.float32),
        "response_mask": np.zeros((b, responses), np.float32),
        "response_prompt": np.full((b, responses), -1, np.int32),
    }
    for i, (row_prompts, row_responses) in enumerate(rows):
        start = 0
        for p, tokens in enumerate(row_prompts):
            where = slice(start, start + len(tokens))
            batch["encoder_input_tokens"][i, where] = tokens
            batch["encoder_segment_ids"][i, where] = p + 1
            batch["prompt_mask"][i, p] = 1
            start = where.stop
        starts = [0] * k
        for r, (tokens, prompt, row) in enumerate(row_responses):
            where = slice(starts[row], starts[row] + len(tokens))
            at = (i, row, where)
            batch["decoder_target_tokens"][at] = tokens
            batch["decoder_input_tokens"][at] = [0, *tokens[:-1]]
            batch["decoder_loss_weights"][at] = 1
            batch["decoder_segment_ids"][at] = r + 1
            batch["response_mask"][i, r] = 1
            batch["response_prompt"][i, r] = prompt
            starts[row] = where.stop
    return batch


@pytest.fixture(scope="session")
def config():
    return CONFIG


@pytest.fixture(scope="session")
def model():
    return models.T5(CONFIG)


@pytest.fixture(scope="session")
def random_params():
    """Numpy parameters for a model; norms and biases are random, so none can hide."""

    def make(model):
        abstract = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
        rng = np.random.default_rng(1)

        def draw(x):
            # Near 1 for norms, and 1/sqrt(fan-in) elsewhere.
            centre, spread = (1.0, 0.1) if x.ndim == 1 else (0.0, x.shape[0] ** -0.5)
            return rng.normal(centre, spread, x.shape).astype(np.float32)

        return jax.tree.map(draw, abstract)

    return make


@pytest.fixture(scope="session")
def params(model, random_params):
    return random_params(model)


@pytest.fixture(scope="session")
def examples():
    """``[(prompt, [response, ...])]``: five prompts with eight responses."""
    rng = np.random.default_rng(2)

    def text(length):
        return [*rng.integers(2, CONFIG.vocab_size, length - 1).tolist(), 1]

    sizes = [(6, [4, 7]), (9, [3]), (2, [5, 1, 6]), (11, [8]), (5, [2])]
    return [(text(p), [text(r) for r in rs]) for p, rs in sizes]


@pytest.fixture(scope="session")
def packed(examples):
    """Two rows: three prompts with six responses, two prompts with two."""
    x = [prompt for prompt, _ in examples]
    y = [r for _, rs in examples for r in rs]
    rows = [
        (
            x[:3],
            # Responses of one prompt in different rows, and of three in one row.
            [(y[0], 0, 0), (y[1], 0, 1), (y[2], 1, 2), (y[3], 2, 0), (y[4], 2, 1)]
            + [(y[5], 2, 2)],
        ),
        (x[3:], [(y[6], 0, 1), (y[7], 1, 1)]),
    ]
    return place(
        rows, length=18, decoder_rows=3, decoder_length=10, prompts=3, responses=6
    )


@pytest.fixture(scope="session")
def unpacked(examples):
    """Eight rows of one prompt and one response, in the order of ``flatten``."""
    rows = [([x], [(y, 0, 0)]) for x, ys in examples for y in ys]
    return place(
        rows, length=11, decoder_rows=1, decoder_length=8, prompts=1, responses=1
    )


@pytest.fixture(scope="session")
def flatten(packed):
    """Picks the packed batch's responses ``[B, R]`` in the unpacked batch's order."""
    return lambda values: np.asarray(values)[packed["response_mask"] > 0]


@pytest.fixture(scope="session")
def variant(config):
    """A model with other fields in its configuration."""
    return lambda **fields: models.T5(dataclasses.replace(config, **fields))


@pytest.fixture(scope="session")
def value_and_gradient():
    """``(model, params, batch) -> response_logps, gradient of a mix of them``."""

    def run(model, params, batch):
        mask = batch["response_mask"]
        mix = np.zeros(mask.shape, np.float32)
        mix[mask > 0] = np.cos(np.arange(int(mask.sum())))

        def loss(p, batch):
            logps = models.response_logps(model, p, batch)
            return (logps * mix).sum(), logps

        (_, logps), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            params, batch
        )
        return np.asarray(logps), jax.device_get(grads)

    return run


@pytest.fixture(scope="session")
def packed_result(model, params, packed, value_and_gradient):
    return value_and_gradient(model, params, packed)
