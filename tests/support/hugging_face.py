"""Hugging Face's T5 with our parameters, for comparisons."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from jaxalign.interop import folders
from jaxalign.interop.huggingface_config import config_of, names_of

IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


def state_of(model, params) -> dict[str, np.ndarray]:
    """Parameters under the names of a state dict."""
    leaves, state = folders.unstack(params), {}
    for path, (name, transposed) in names_of(model.config):
        leaf = leaves[path].transposed if transposed else leaves[path]
        state[name] = leaf.read()
    return state


def torch_model(model, params):
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**config_of(model.config), **IDS)
    ).eval()
    # A head of its own, which some versions of transformers tie whatever they are told.
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
    state = state_of(model, params)
    if model.config.logits_via_embedding:
        state["lm_head.weight"] = state["shared.weight"]
    result = theirs.load_state_dict(
        {name: torch.tensor(value) for name, value in state.items()}, strict=False
    )
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {
        "encoder.embed_tokens.weight",  # aliases of shared.weight
        "decoder.embed_tokens.weight",
    }
    return theirs


def ragged_prompts(rows: int, length: int, seed: int) -> np.ndarray:
    """Right-padded prompts of different lengths that end in EOS."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 24, (rows, length)).astype(np.int32)
    for row, size in enumerate(rng.integers(1, length + 1, rows)):
        tokens[row, size - 1] = 1
        tokens[row, size:] = 0
    return tokens


def decoder_pass(theirs, prompt: np.ndarray, sequences):
    """A pass without a cache over sequences ``[n, t]`` that begin with the start 0.

    Returns:
      Log-probabilities ``[n, V]`` of the next token and final states ``[n, t, E]``.
    """
    kept = torch.tensor(prompt[prompt != 0][None], dtype=torch.long)
    sequences = torch.tensor(np.array(sequences), dtype=torch.long)
    with torch.no_grad():
        found = theirs(
            input_ids=kept.expand(len(sequences), -1),
            decoder_input_ids=sequences,
            output_hidden_states=True,
            use_cache=False,
        )
    logps = torch.log_softmax(found.logits[:, -1], -1).numpy()
    return logps, found.decoder_hidden_states[-1]
