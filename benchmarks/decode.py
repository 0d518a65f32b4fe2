"""Decoding speed, each as a ratio of medians measured in one process.

    python benchmarks/decode.py samples   # against Hugging Face generate (PyTorch)
    T5X_SRC=DIR python benchmarks/decode.py samples   # and T5X's temperature_sample
    python benchmarks/decode.py ragged --prompts=FILE.jsonl   # slot refill or not

``samples``: T5 1.1 small with random weights draws N samples of T tokens for each of B
prompts, in float32 and, with ``--dtypes=float32,bfloat16``, in bfloat16, which is there
the whole of Hugging Face's network and here the activations. It gets the same weights,
prompts and threads, and
``num_return_sequences=N``; its sampling settings are ours (temperature 1, nothing
truncated). With random weights about one response in 500 draws EOS before its last
token; no side stops for it, and tokens are counted as if it had not. ``T5X_SRC`` names
a folder with checkouts of t5x, airio and jestimator; its sampler, on a network of the
same shape with weights of its own, is measured too, in float32.

``ragged``: one response to each real prompt. Rows of the file have an ``instruction``
and ``responses``, a list of ``{"generator", "text"}``: random weights never end a
response, so each is as long as that of the generator named, one token a word. The same
engine either seats waiting prompts as soon as some have ended, or waits until all have.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from jaxalign import decoding, models
from jaxalign.decoding import Engine, Sampling
from jaxalign.interop import folders
from jaxalign.interop.huggingface_config import config_of, names_of

SMALL = models.T5Config(
    vocab_size=32128,
    emb_dim=512,
    num_heads=6,
    head_dim=64,
    mlp_dim=1024,
    num_encoder_layers=8,
    num_decoder_layers=8,
)
# Nothing ends early: every response has all its tokens.
_FULL = Sampling(min_new_tokens=10**6)


def _medians(
    repeats: int, compiled: tuple[str, ...], runs: dict[str, Callable[[], None]]
) -> dict[str, float]:
    """Median seconds of each, taken in turns, so that noise falls on all alike.

    Those that are `compiled` run once before that.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name in compiled:
        runs[name]()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            print(f"  {name}: {seconds[name][-1]:.2f} s", flush=True)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _random_prompts(count: int, length: int) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(2, 32000, (count, length))
    tokens[:, -1] = 1
    return tokens.astype(np.int32)


def samples(args: argparse.Namespace) -> None:
    """B x N samples of T tokens: this library, Hugging Face, and their ratio."""
    import torch
    import transformers

    params = models.init_params(models.T5(SMALL), jax.random.key(0))
    prompts = _random_prompts(args.prompts_count, args.prompt_length)
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA takes

    def ours(dtype: str) -> Callable[[], None]:
        model = models.T5(dataclasses.replace(SMALL, dtype=dtype))
        return lambda: jax.block_until_ready(
            decoding.generate(
                model,
                params,
                prompts,
                key=jax.random.key(0),
                prompt_ids=np.arange(len(prompts)),
                num_samples=args.num_samples,
                max_new_tokens=args.tokens,
                sampling=Sampling(),
            )
        )

    def hugging_face(dtype: str) -> Callable[[], None]:
        theirs = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**config_of(SMALL), decoder_start_token_id=0)
        ).eval()
        leaves = folders.unstack(params)
        state = {
            name: torch.tensor(
                (leaves[path].transposed if transposed else leaves[path]).read()
            )
            for path, (name, transposed) in names_of(SMALL)
        }
        unknown = theirs.load_state_dict(state, strict=False).unexpected_keys
        assert not unknown, unknown
        theirs = theirs.to(getattr(torch, dtype))
        inputs = torch.tensor(prompts, dtype=torch.long)

        def run() -> None:
            with torch.no_grad():
                found = theirs.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    num_return_sequences=args.num_samples,
                    max_new_tokens=args.tokens,
                )
            assert found.shape[1] == args.tokens + 1

        return run

    dtypes = args.dtypes.split(",")
    runs = {f"jaxalign {dtype}": ours(dtype) for dtype in dtypes}
    if os.environ.get("T5X_SRC"):
        runs["t5x float32"] = _t5x_sampler(prompts, args)
    compiled = tuple(runs)
    runs |= {f"hugging_face {dtype}": hugging_face(dtype) for dtype in dtypes}
    seconds = _medians(args.repeats, compiled, runs)
    total = len(prompts) * args.num_samples * args.tokens
    print(f"{'':22}{'seconds':>8}  {'tokens/s':>8}  of ours in " + ", ".join(dtypes))
    for name, value in seconds.items():
        ratios = (f"{value / seconds[f'jaxalign {d}']:6.2f}" for d in dtypes)
        print(f"{name:22}{value:8.2f}  {total / value:8.0f}  {'  '.join(ratios)}")


def _t5x_sampler(prompts: np.ndarray, args: argparse.Namespace) -> Callable[[], None]:
    """T5X's own sampler on a network of the same shape."""
    source = os.environ["T5X_SRC"]
    sys.path[:0] = [f"{source}/{name}" for name in ("t5x", "airio", "jestimator")]
    import seqio
    from t5x import decoding as t5x_decoding
    from t5x import models as t5x_models
    from t5x.examples.t5 import network

    shape = {
        field: getattr(SMALL, field)
        for field in (
            *("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim"),
            *("num_encoder_layers", "num_decoder_layers"),
        )
    }
    config = network.T5Config(
        **shape,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
        logits_via_embedding=False,
        dtype="float32",
    )
    vocabulary = seqio.ByteVocabulary()
    model = t5x_models.EncoderDecoderModel(
        network.Transformer(config),
        vocabulary,
        vocabulary,
        optimizer_def=None,
        decode_fn=t5x_decoding.temperature_sample,
    )
    targets = np.zeros((len(prompts), args.tokens), np.int32)
    shapes = {
        "encoder_input_tokens": prompts.shape,
        "decoder_input_tokens": targets.shape,
    }
    params = model.get_initial_variables(jax.random.key(0), shapes)["params"]
    batch = {"encoder_input_tokens": prompts, "decoder_input_tokens": targets}

    @jax.jit
    def predict(params: dict, batch: dict, key: jax.Array) -> jax.Array:
        found, _ = model.predict_batch_with_aux(
            params,
            batch,
            rng=key,
            decoder_params={"temperature": 1.0, "topk": 0},
            return_all_decodes=True,
            num_decodes=args.num_samples,
        )
        return found

    def run() -> None:
        found = predict(params, batch, jax.random.key(0))
        assert found.shape == (len(prompts), args.num_samples, args.tokens)
        found.block_until_ready()

    return run


def _read(args: argparse.Namespace) -> list[tuple[np.ndarray, int]]:
    """Prompts as random ids, one a word, and the lengths of their responses."""
    rng, rows = np.random.default_rng(0), []
    with open(args.prompts, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            texts = {x["generator"]: x["text"] for x in row["responses"]}
            if args.generator not in texts:
                continue
            ids = rng.integers(2, 32000, len(row["instruction"].split()[:127]))
            length = min(len(texts[args.generator].split()) + 1, args.tokens)
            rows.append((np.append(ids, 1).astype(np.int32), length))
    return rows[: args.prompts_count]


def ragged(args: argparse.Namespace) -> None:
    """One response per real prompt, with slot refill and waiting for the longest."""
    model = models.T5(SMALL)
    params = models.init_params(model, jax.random.key(0))
    rows = _read(args)
    length = max(len(tokens) for tokens, _ in rows)
    lengths = np.array([n for _, n in rows])
    groups = np.split(lengths, range(args.groups, len(lengths), args.groups))
    longest = sum(len(g) * g.max() for g in groups)
    print(
        f"{len(rows)} prompts; responses: mean {lengths.mean():.0f}, median "
        f"{np.median(lengths):.0f}, longest {lengths.max()} tokens; "
        f"waiting takes {longest / lengths.sum():.2f} times the steps at best"
    )

    def drain(admit: int) -> None:
        engine = Engine(
            model,
            params,
            prompt_length=length,
            max_new_tokens=args.tokens,
            groups=args.groups,
            admit=admit,
            sampling=_FULL,
        )
        for i, (tokens, wanted) in enumerate(rows):
            engine.submit(tokens, prompt_id=i, max_new_tokens=wanted)
        done = 0
        while engine.pending:
            done += sum(len(f.tokens[0]) for f in engine.step())
        assert done == lengths.sum()

    seconds = _medians(
        args.repeats,
        ("refill", "wait_for_longest"),
        {
            "refill": lambda: drain(args.admit),
            "wait_for_longest": lambda: drain(args.groups),
        },
    )
    for name, value in seconds.items():
        print(f"{name:17} {value:8.2f} s  {lengths.sum() / value:8.0f} tokens/s")
    print(f"ratio             {seconds['wait_for_longest'] / seconds['refill']:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, function in {"samples": samples, "ragged": ragged}.items():
        verb = verbs.add_parser(name, help=function.__doc__)
        verb.set_defaults(function=function)
        verb.add_argument("--repeats", type=int, default=3)
    verb = verbs.choices["samples"]
    verb.add_argument("--prompts_count", type=int, default=16)
    verb.add_argument("--prompt_length", type=int, default=64)
    verb.add_argument("--num_samples", type=int, default=64)
    verb.add_argument("--tokens", type=int, default=64)
    verb.add_argument("--dtypes", default="float32", help="comma-separated")
    verb = verbs.choices["ragged"]
    verb.add_argument("--prompts", required=True, help="JSON Lines")
    verb.add_argument("--generator", default="alpaca-7b", help="whose lengths to take")
    verb.add_argument("--prompts_count", type=int, default=256)
    verb.add_argument("--tokens", type=int, default=256, help="at most")
    verb.add_argument("--groups", type=int, default=32)
    verb.add_argument("--admit", type=int, default=4)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
