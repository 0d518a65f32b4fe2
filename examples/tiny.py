"""A T5 of 50,000 parameters for the examples, where no checkpoint is named.

Its weights are random and its vocabulary is bytes: it answers nothing sensible, learns
what an example shows it in seconds, and is a Hugging Face folder like any other.
"""

from pathlib import Path

import jax

from jaxalign import models, vocabularies
from jaxalign.interop import huggingface

SHAPE = models.T5Config(
    vocab_size=384,
    emb_dim=32,
    num_heads=2,
    head_dim=16,
    mlp_dim=64,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


def checkpoint(folder: str = "runs/examples/tiny") -> str:
    """The folder of a tiny network, made where it is not there yet."""
    if not Path(folder).exists():
        model = models.T5(SHAPE)
        vocabulary = vocabularies.ByteVocabulary(extra_ids=125)
        params = models.init_params(model, jax.random.key(0))
        huggingface.write(folder, params, model, vocabulary)
    return folder


# What such a network needs beside a run's own settings: short rows, large steps.
SETTINGS = {
    "batch_size": 16,
    "learning_rate": 1e-2,
    "TASK_FEATURE_LENGTHS": {"inputs": 24, "targets": 24},
    "PACKING": 1,
    "WARMUP_STEPS": 5,
}
