"""Verbs that train or say what training would take."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

from jaxalign import configs
from jaxalign.cli.flags import (
    configured_run,
    distributed_flags,
    join,
    read_gin,
    verb_parser,
)


def train_parser() -> argparse.ArgumentParser:
    parser = verb_parser("train", "Train a model, or go on where a killed run stopped.")
    parser.add_argument("--run_dir", help="where everything is written (MODEL_DIR)")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the resolved configuration, parameters, batch and memory; stop",
    )
    parser.add_argument(
        "--profile_steps",
        type=_two_steps,
        metavar="FIRST,LAST",
        help="trace these steps for xprof, and for `jaxalign report`",
    )
    distributed_flags(parser)
    return parser


def train(argv: list[str]) -> int:
    flags = configs.parse_flags(argv)
    args = train_parser().parse_args(flags.rest)
    timeout = join(args)
    bindings = list(flags.gin_bindings)
    if args.run_dir:
        bindings.append(f"MODEL_DIR = {args.run_dir!r}")
    read_gin(flags._replace(gin_bindings=bindings), "train needs a run")
    from jaxalign.training import dry_run, train

    config = configs.config_str()
    run = configured_run()
    if args.dry_run:
        print(config)
        print(dry_run.describe(run))
        return 0
    run = dataclasses.replace(run, timeout=timeout, profile_steps=args.profile_steps)
    train.train(run, config)
    return 0


def _two_steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition(",")
    return int(first), int(last or first)


def data_parser() -> argparse.ArgumentParser:
    parser = verb_parser("data", "Check and prepare data; print a summary.")
    parser.add_argument(
        "--beam_options",
        metavar="TEXT",
        help="tokenise JSONL and Parquet files on Apache Beam (jaxalign[beam]) with "
        "these pipeline options: --beam_options='--direct_num_workers=4 "
        "--direct_running_mode=multi_processing'",
    )
    return parser


def data(argv: list[str]) -> int:
    flags = configs.parse_flags(argv)
    args = data_parser().parse_args(flags.rest)
    read_gin(flags, "data needs the run it is for")
    from jaxalign.training import dry_run

    run = configured_run()
    if args.beam_options is not None:
        dataset = dataclasses.replace(run.dataset, beam_options=args.beam_options)
        run = dataclasses.replace(run, dataset=dataset)
    print(dry_run.describe_data(run))
    return 0


def plan_parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "plan", "Compile a run for TPU topologies on any machine; report what it needs."
    )
    parser.add_argument(
        "--topology",
        action="append",
        required=True,
        help="v5e:4x4, v5p:4x4x8, v5e:4x4:2 (two slices), gpu-h100:8 ...; repeatable",
    )
    parser.add_argument(
        "--mesh",
        action="append",
        default=[],
        help="DATA,FSDP,TENSOR sizes to compare; repeatable; default: MESH, or a few",
    )
    parser.add_argument(
        "--steps", default="train,score,decode", help="what to compile, comma-separated"
    )
    parser.add_argument(
        "--largest_batch",
        action="store_true",
        help="also search the largest BATCH_SIZE of the cheapest mesh",
    )
    parser.add_argument("--output", help="FILE.json to write, with FILE.html beside it")
    return parser


def plan(argv: list[str]) -> int:
    flags = configs.parse_flags(argv)
    args = plan_parser().parse_args(flags.rest)
    read_gin(flags, "plan needs a run")
    # The machine's own accelerator, if any, is not asked.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Shapes depend on neither text nor vocabulary, and both may be out of reach here.
    needless = ["VOCABULARY = None", "MIXTURE_OR_TASK_NAME = None", "DATA = 'planned'"]
    read_gin(
        flags._replace(gin_bindings=[*flags.gin_bindings, *needless]),
        "plan needs a run",
    )
    from jaxalign import planning
    from jaxalign.planning import hardware

    found = planning.plan(
        configured_run(),
        args.topology,
        meshes=[hardware.parse_mesh(text) for text in args.mesh],
        steps=args.steps.split(","),
        find_largest_batch=args.largest_batch,
    )
    print(planning.table(found))
    if args.output:
        output = Path(args.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=2) + "\n")
        output.with_suffix(".html").write_text(planning.html(found, "jaxalign plan"))
    return 0


def iterate_parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "iterate",
        "Train on judged samples of the policy itself, round by round.",
        "pipelines/iterate.py:run",
    )
    parser.add_argument("--initial", required=True, help="checkpoint to start from")
    parser.add_argument("--prompts", required=True, help='JSONL file with {"prompt"}')
    parser.add_argument(
        "--judge", required=True, help="module:function, a score or a preference"
    )
    parser.add_argument("--run_dir", required=True, help="where all is written")
    parser.add_argument("--rounds", type=int, default=3, help="how many")
    parser.add_argument(
        "--reference",
        choices=("fixed", "refreshed"),
        default="fixed",
        help="the initial policy in every round, or each round's own start",
    )
    parser.add_argument(
        "--prompts_per_round", type=int, help="default: all, every round"
    )
    parser.add_argument(
        "--num_samples", type=int, default=4, help="responses per prompt"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="keep so much probability"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=128, help="tokens of a sample"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at a time")
    parser.add_argument("--seed", type=int, default=0, help="of samples and training")
    parser.add_argument(
        "--redo", action="append", default=[], help="a stage to make again"
    )
    return parser


def iterate(argv: list[str]) -> int:
    flags = configs.parse_flags(argv)
    args = iterate_parser().parse_args(flags.rest)
    from jaxalign.pipelines import iterate as pipeline

    print(
        pipeline.run(
            gin_files=flags.gin_files or ["runs/dpo.gin"],
            bindings=flags.gin_bindings,
            search_paths=flags.search_paths,
            **vars(args),
        )
    )
    return 0
