"""Hugging Face's T5 with our parameters, for comparisons."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from jaxalign.interop import huggingface


def torch_model(model, params):
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**huggingface.config_to_huggingface(model.config))
    ).eval()
    # A head of its own, which some versions of transformers tie whatever they are told.
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
    state = huggingface.params_to_huggingface(params, model.config)
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
