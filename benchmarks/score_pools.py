"""Scoring a pool of responses: beside one encoder row, and one prompt at a time.

    python benchmarks/score_pools.py --pool=64 --inputs=512 --targets=32

The same network and the same pass (`jaxalign.training.scoring`) over the same texts:
once with all responses to a prompt beside its encoder row, as ``reward:`` judges do,
once with a row for each response. ``--torch`` also times a loop over Hugging Face's T5,
which encodes a prompt for each response, on a network of the same size.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import jax
import numpy as np

from jaxalign import models
from jaxalign.cluster import mesh as meshes
from jaxalign.data import memory
from jaxalign.training import scoring
from jaxalign.vocabularies import ByteVocabulary


def config(width: int, layers: int) -> models.T5Config:
    return models.T5Config(
        vocab_size=384,
        emb_dim=width,
        num_heads=width // 64,
        head_dim=64,
        mlp_dim=2 * width,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
    )


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The median, after a call that compiles."""
    function()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        found.append(time.perf_counter() - began)
    return float(np.median(found))


def rows(asked: argparse.Namespace, together: bool) -> list:
    rng = np.random.default_rng(0)
    vocabulary = ByteVocabulary()
    found = []
    for p in range(asked.prompts):
        prompt = rng.integers(3, 259, asked.inputs).tolist()
        pool = [rng.integers(3, 259, asked.targets).tolist() for _ in range(asked.pool)]
        groups = [pool] if together else [[one] for one in pool]
        found += [
            memory.text_row(f"{p}.{i}", vocabulary, prompt, group)
            for i, group in enumerate(groups)
        ]
    return found


def ours(asked: argparse.Namespace) -> dict[str, float]:
    model = models.RewardModel(config(asked.width, asked.layers))
    params = models.init_params(model, jax.random.key(0))
    mesh = meshes.make_mesh(devices=jax.local_devices()[:1])

    def forward(params, batch):
        return model.apply({"params": params}, batch)

    scores, found = {}, {}
    for name, together in (("pool", True), ("separate", False)):
        cache = memory.MemoryCache(rows(asked, together), ByteVocabulary())
        size = 1 if together else asked.pool
        feed = memory.feed(cache, batch_size=size)

        def score(feed=feed):
            return scoring.score(feed, forward, params, mesh, verify=0.0)

        found[name] = seconds(score, asked.repeats)
        scores[name] = score()["response_score"]
    np.testing.assert_allclose(scores["pool"], scores["separate"], rtol=1e-3, atol=1e-4)
    return found


def hugging_face(asked: argparse.Namespace) -> float:
    import torch
    import transformers

    own = config(asked.width, asked.layers)
    network = transformers.T5Model(
        transformers.T5Config(
            vocab_size=own.vocab_size,
            d_model=own.emb_dim,
            d_kv=own.head_dim,
            d_ff=own.mlp_dim,
            num_layers=own.num_encoder_layers,
            num_decoder_layers=own.num_decoder_layers,
            num_heads=own.num_heads,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    ).eval()
    head = torch.nn.Linear(own.emb_dim, 1)
    rng = np.random.default_rng(0)
    data = []
    for _ in range(asked.prompts):
        prompt = torch.tensor(rng.integers(3, 259, (1, asked.inputs)))
        pool = torch.tensor(rng.integers(3, 259, (asked.pool, asked.targets)))
        data.append((prompt.expand(asked.pool, -1), pool))

    def score():
        with torch.inference_mode():
            for prompts, responses in data:
                start = torch.zeros((len(responses), 1), dtype=torch.long)
                inputs = torch.cat([start, responses[:, :-1]], dim=1)
                states = network(input_ids=prompts, decoder_input_ids=inputs)
                head(states.last_hidden_state[:, -1])

    return seconds(score, asked.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--torch", action="store_true")
    asked = parser.parse_args()
    found = ours(asked)
    told = {f"{name} s": round(value, 3) for name, value in found.items()}
    told["separate / pool"] = round(found["separate"] / found["pool"], 2)
    if asked.torch:
        other = hugging_face(asked)
        told["hugging face s"] = round(other, 3)
        told["hugging face / pool"] = round(other / found["pool"], 2)
    print(json.dumps({**vars(asked), **told, "device": str(jax.devices()[0])}))


if __name__ == "__main__":
    main()
