"""Verbs that use a trained checkpoint."""

from __future__ import annotations

import argparse

from jaxalign.cli.flags import (
    arguments,
    call,
    distributed_flags,
    join,
    sampling_flags,
    verb_parser,
)


def generate_parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "generate",
        "Sample responses to the prompts of a JSONL file.",
        "inference/generation.py:generate",
    )
    parser.add_argument("--checkpoint", help="run directory or checkpoint")
    parser.add_argument("--prompts", help='JSONL file with {"prompt"}')
    parser.add_argument(
        "--output",
        help="JSONL file to write; an unfinished one goes on, a finished one is kept",
    )
    sampling_flags(parser)
    parser.add_argument(
        "--min_p", type=float, help="least probability, relative to the best token's"
    )
    parser.add_argument(
        "--typical_p", type=float, help="keep so much probability around the entropy"
    )
    parser.add_argument(
        "--repetition_penalty", type=float, help="above 1: against a response's tokens"
    )
    parser.add_argument("--stop", action="append", help="text that ends a response")
    parser.add_argument("--regex", help="what a whole response has to match")
    parser.add_argument("--include", action="append", help="a phrase; repeatable")
    parser.add_argument("--num_beams", type=int, help="above 1: beam search")
    parser.add_argument("--length_penalty", type=float, help="of beam search")
    parser.add_argument("--num_groups", type=int, help="of diverse beam search")
    parser.add_argument(
        "--diversity_penalty", type=float, help="of diverse beam search"
    )
    parser.add_argument(
        "--contrastive_alpha", type=float, help="above 0: contrastive search"
    )
    parser.add_argument("--mbr", help="chrf, bleu or module:function; of each pool one")
    parser.add_argument(
        "--min_new_tokens", type=int, help="no end before so many tokens"
    )
    distributed_flags(parser)
    return parser


def generate(argv: list[str]) -> int:
    args = arguments(generate_parser(), argv, "runs/generate.gin")
    from jaxalign.inference import generation

    join(args)
    lines = call(generation.generate, args, ("checkpoint", "prompts", "output"))
    print(f"{lines} responses written to {args.output}")
    return 0


def steer_parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "steer",
        "Sample responses under constraints and rewards.",
        "inference/steering.py:steer",
    )
    parser.add_argument("--checkpoint", help="run directory or checkpoint")
    parser.add_argument(
        "--prompts",
        help='JSONL file with {"prompt"[, "more_prompts", "regex", "include", '
        '"template"]}',
    )
    parser.add_argument("--output", help="JSONL file to write; a finished one is kept")
    parser.add_argument("--regex", help="what the whole response has to match")
    parser.add_argument("--include", action="append", help="a phrase; repeatable")
    parser.add_argument("--template", help="text with [BLANK] in it")
    parser.add_argument("--potential", help="module:function, (prompt, response)")
    parser.add_argument("--beta", type=float, help="divides the potential's scores")
    parser.add_argument("--num_particles", type=int, help="of each prompt")
    parser.add_argument("--expansion", type=int, help="children of a particle")
    parser.add_argument("--resampling", help="how particles are chosen to go on")
    parser.add_argument("--temperature", type=float, help="of the conditioned model")
    parser.add_argument(
        "--max_new_tokens", type=int, help="tokens of a response, its end included"
    )
    parser.add_argument("--batch_size", type=int, help="prompts at a time")
    parser.add_argument("--seed", type=int, help="of the samples")
    return parser


def steer(argv: list[str]) -> int:
    args = arguments(steer_parser(), argv, "runs/steer.gin")
    from jaxalign.inference import steering

    lines = call(steering.steer, args, ("checkpoint", "prompts", "output"))
    print(f"{lines} responses written to {args.output}")
    return 0


def serve_parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "serve",
        "Serve a checkpoint by the OpenAI-compatible HTTP API.",
        "serving/api.py:serve",
    )
    parser.add_argument("--checkpoint", help="run directory or checkpoint")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", type=int, help="port to listen on")
    parser.add_argument("--model", help="its name; default: the run directory's")
    parser.add_argument("--batch_size", type=int, help="prompts at a time")
    parser.add_argument(
        "--max_prompt_tokens", type=int, help="longer prompts are refused"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, help="most tokens of a response, and the default"
    )
    parser.add_argument("--api_key", help="default: JAXALIGN_API_KEY, else none")
    parser.add_argument(
        "--allowed_hosts",
        type=lambda text: tuple(text.split(",")),
        help="comma-separated names by which clients may call the server",
    )
    return parser


def serve(argv: list[str]) -> int:
    args = arguments(serve_parser(), argv, "runs/serve.gin")
    from jaxalign.serving import api

    call(api.serve, args, ("checkpoint",))
    return 0


def score_parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "score",
        "Log-probabilities of a JSONL file's completions.",
        "inference/score.py:score",
    )
    parser.add_argument("--checkpoint", help="run directory or checkpoint")
    parser.add_argument("--data", help='JSONL file with {"prompt", "completion"}')
    parser.add_argument("--output", help="JSONL file to write; a finished one is kept")
    parser.add_argument("--batch_size", type=int, help="rows at a time")
    distributed_flags(parser)
    return parser


def score(argv: list[str]) -> int:
    args = arguments(score_parser(), argv, "runs/score.gin")
    from jaxalign.inference import score as inference

    join(args)
    lines = call(inference.score, args, ("checkpoint", "data", "output"))
    print(f"{lines} scores written to {args.output}")
    return 0


def evaluate_parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "eval",
        "Generate for a file of prompts and judge the result.",
        "inference/evaluation.py:evaluate",
    )
    parser.add_argument("--checkpoint", help="run directory or checkpoint")
    parser.add_argument("--data", help='JSONL file with {"prompt"[, "completion"]}')
    parser.add_argument("--baseline", help="another checkpoint to compare with")
    parser.add_argument("--judge", help="module:function, a score or a preference")
    parser.add_argument(
        "--metrics",
        dest="metric_fns",
        type=lambda text: tuple(text.split(",")),
        help="comma-separated: exact_match, token_accuracy, bleu, module:function ...",
    )
    parser.add_argument("--output", help="JSON file to write; a finished one is kept")
    sampling_flags(parser)
    distributed_flags(parser)
    return parser


def evaluate(argv: list[str]) -> int:
    args = arguments(evaluate_parser(), argv, "runs/eval.gin")
    import jax

    from jaxalign.data import jsonl
    from jaxalign.inference import evaluation as inference

    join(args)
    result = call(inference.evaluate, args, ("checkpoint", "data"))
    if jax.process_index() == 0:
        print(jsonl.dumps(result, indent=2))
    return 0
