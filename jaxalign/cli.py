"""The command line: ``jaxalign VERB --gin_file=... --gin.NAME=VALUE``.

Nothing but parsing; each verb calls one function.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxalign import configs

_USAGE = """\
jaxalign VERB [--gin_file=FILE ...] [--gin.NAME=VALUE ...] [flags]

  train        --gin_file=runs/sft.gin --gin.DATA="'my.jsonl'" --run_dir=DIR
  generate     --checkpoint=DIR --prompts=FILE --output=FILE
  steer        --checkpoint=DIR --prompts=FILE --output=FILE --regex=PATTERN
  serve        --checkpoint=DIR, as an OpenAI-compatible server
  score        --checkpoint=DIR --data=FILE --output=FILE
  eval         --checkpoint=DIR --data=FILE --judge=MODULE:FUNCTION
  data         check and prepare: --gin_file=runs/dpo.gin --gin.DATA="'my.jsonl'"
  tasks        list the registered data sets and the gin files
  plan         what a run needs of a pod, without the pod: --topology=v5e:4x4
  bench        how fast steps are on this machine, beside peers and its limit
  report       one HTML page about runs: RUN_DIR...
  iterate      rounds of sampling, judging and training: --prompts=FILE --judge=...
  compare      every objective on embedded data at equal compute
  quickstart   supervised fine-tuning, then DRO-V, KTO and DPO, on embedded data

`jaxalign VERB --help` lists a verb's flags. Gin files are looked up in the working
folder, then in the package. Strings need quotes: --gin.DATA="'my.jsonl'".
"""

# What a user can mend: shown as one message, without a traceback.
_MISTAKES = (ValueError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status, 2 for a mistake in what was asked."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_USAGE)
        return 0
    verb, rest = argv[0], argv[1:]
    if verb == "--version":
        import jaxalign

        print(f"jaxalign {jaxalign.__version__}")
        return 0
    if verb not in _VERBS:
        near = configs.nearest(verb, _VERBS)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        print(
            f"Unknown verb {verb!r}; known: {', '.join(_VERBS)}.{hint}", file=sys.stderr
        )
        return 2
    _set_up_logging()
    try:
        return _VERBS[verb](rest)
    except BrokenPipeError:  # `jaxalign tasks | head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _MISTAKES as error:
        if os.environ.get("JAXALIGN_TRACEBACK"):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _set_up_logging() -> None:
    # TensorFlow's own chatter says nothing a user of this program can act on.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=logging.WARNING, format="%(levelname).1s %(message)s")
    logging.getLogger("jaxalign").setLevel(logging.INFO)


def _parser(verb: str, doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"jaxalign {verb}",
        description=doc,
        epilog="Gin: --gin_file=FILE (repeatable), --gin.NAME=VALUE.",
        allow_abbrev=False,
    )
    return parser


def _distributed_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many processes")
    group.add_argument(
        "--distributed",
        default="auto",
        help="auto: join the job of SLURM, MPI, GKE or Cloud TPU, if any; or off",
    )
    group.add_argument("--coordinator_address", help="HOST:PORT of process 0")
    group.add_argument("--process_count", type=int)
    group.add_argument("--process_index", type=int)
    group.add_argument(
        "--distributed_timeout", type=int, default=1800, help="seconds to wait"
    )


def _join(args: argparse.Namespace) -> int:
    """Joins the job that the flags or the environment describe; takes the flags."""
    from jaxalign.training import distributed

    taken = vars(args)
    settings = distributed.Settings(
        taken.pop("distributed"),
        taken.pop("coordinator_address"),
        taken.pop("process_count"),
        taken.pop("process_index"),
        taken.pop("distributed_timeout"),
    )
    distributed.start(settings)
    return settings.timeout


def _read_gin(flags: configs.GinFlags, needs: str) -> None:
    """Parses gin files and bindings; a run file must be among them."""
    if not flags.gin_files:
        raise configs.ConfigError(
            f"{needs}: --gin_file=runs/sft.gin, or dpo, kto, dro_v; `jaxalign tasks` "
            "lists all."
        )
    configs.parse(flags.gin_files, flags.gin_bindings, flags.search_paths)


def _arguments(
    parser: argparse.ArgumentParser, argv: list[str], gin_file: str
) -> argparse.Namespace:
    """Parses a verb's flags and, by default from `gin_file`, its gin configuration."""
    flags = configs.parse_flags(argv)
    args = parser.parse_args(flags.rest)
    configs.parse(flags.gin_files or [gin_file], flags.gin_bindings, flags.search_paths)
    return args


def _train(argv: list[str]) -> int:
    parser = _parser("train", "Train a model, or go on where a killed run stopped.")
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
    _distributed_flags(parser)
    flags = configs.parse_flags(argv)
    args = parser.parse_args(flags.rest)
    timeout = _join(args)
    bindings = list(flags.gin_bindings)
    if args.run_dir:
        bindings.append(f"MODEL_DIR = {args.run_dir!r}")
    _read_gin(flags._replace(gin_bindings=bindings), "train needs a run")
    from jaxalign.training import dry_run, train

    config = configs.config_str()
    run = configs.configured(train.Run)()
    if args.dry_run:
        print(config)
        print(dry_run.describe(run))
        return 0
    run = dataclasses.replace(
        run, start_timeout=timeout, profile_steps=args.profile_steps
    )
    train.train(run, config)
    return 0


def _two_steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition(",")
    return int(first), int(last or first)


def _generate(argv: list[str]) -> int:
    from jaxalign.pipelines import generation

    parser = _parser("generate", "Sample responses to the prompts of a JSONL file.")
    parser.add_argument("--checkpoint", help="run directory or checkpoint")
    parser.add_argument("--prompts", help='JSONL file with {"prompt"}')
    parser.add_argument(
        "--output", help="JSONL file to write; resumes an unfinished one"
    )
    _sampling_flags(parser)
    parser.add_argument("--min_p", type=float)
    parser.add_argument("--typical_p", type=float)
    parser.add_argument("--repetition_penalty", type=float)
    parser.add_argument("--stop", action="append", help="text that ends a response")
    parser.add_argument("--regex", help="what a whole response has to match")
    parser.add_argument("--include", action="append", help="a phrase; repeatable")
    parser.add_argument("--num_beams", type=int, help="above 1: beam search")
    parser.add_argument("--length_penalty", type=float, help="of beam search")
    parser.add_argument("--num_groups", type=int, help="of diverse beam search")
    parser.add_argument("--diversity_penalty", type=float)
    parser.add_argument("--contrastive_alpha", type=float, help="contrastive search")
    parser.add_argument("--mbr", help="chrf, bleu or module:function; of each pool one")
    parser.add_argument("--min_new_tokens", type=int)
    _distributed_flags(parser)
    args = _arguments(parser, argv, "runs/generate.gin")
    _join(args)
    lines = _call(generation.generate, args, ("checkpoint", "prompts", "output"))
    print(f"{lines} responses written to {args.output}")
    return 0


def _sampling_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_samples", type=int, help="per prompt")
    parser.add_argument("--temperature", type=float, help="0: most probable tokens")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--batch_size", type=int, help="prompts at a time")
    parser.add_argument("--seed", type=int)


def _call(
    function: Callable[..., Any], args: argparse.Namespace, required: tuple[str, ...]
) -> Any:
    """Calls a function with the flags that were given, over gin's bindings."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    missing = [f"--{name}=..." for name in required if name not in given]
    if missing:
        raise configs.ConfigError(f"Missing {', '.join(missing)}.")
    return configs.configured(function)(**given)


def _steer(argv: list[str]) -> int:
    from jaxalign.pipelines import steering

    parser = _parser("steer", "Sample responses under constraints and rewards.")
    parser.add_argument("--checkpoint", help="run directory or checkpoint")
    parser.add_argument(
        "--prompts",
        help='JSONL file with {"prompt"[, "more_prompts", "regex", "include", '
        '"template"]}',
    )
    parser.add_argument("--output", help="JSONL file to write")
    parser.add_argument("--regex", help="what the whole response has to match")
    parser.add_argument("--include", action="append", help="a phrase; repeatable")
    parser.add_argument("--template", help="text with [BLANK] in it")
    parser.add_argument("--potential", help="module:function, (prompt, response)")
    parser.add_argument("--beta", type=float, help="divides the potential's scores")
    parser.add_argument("--num_particles", type=int)
    parser.add_argument("--expansion", type=int, help="children of a particle")
    parser.add_argument("--resampling", help="default: without replacement")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--batch_size", type=int, help="prompts at a time")
    parser.add_argument("--seed", type=int)
    args = _arguments(parser, argv, "runs/steer.gin")
    lines = _call(steering.steer, args, ("checkpoint", "prompts", "output"))
    print(f"{lines} responses written to {args.output}")
    return 0


def _serve(argv: list[str]) -> int:
    from jaxalign.serving import api

    parser = _parser("serve", "Serve a checkpoint by the OpenAI-compatible HTTP API.")
    parser.add_argument("--checkpoint", help="run directory or checkpoint")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", type=int)
    parser.add_argument("--model", help="its name; default: the run directory's")
    parser.add_argument("--batch_size", type=int, help="prompts at a time")
    parser.add_argument("--max_prompt_tokens", type=int)
    parser.add_argument("--max_new_tokens", type=int)
    args = _arguments(parser, argv, "runs/serve.gin")
    _call(api.serve, args, ("checkpoint",))
    return 0


def _score(argv: list[str]) -> int:
    from jaxalign.pipelines import inference

    parser = _parser("score", "Log-probabilities of a JSONL file's completions.")
    parser.add_argument("--checkpoint", help="run directory or checkpoint")
    parser.add_argument("--data", help='JSONL file with {"prompt", "completion"}')
    parser.add_argument("--output", help="JSONL file to write")
    parser.add_argument("--batch_size", type=int, help="rows at a time")
    args = _arguments(parser, argv, "runs/score.gin")
    lines = _call(inference.score, args, ("checkpoint", "data", "output"))
    print(f"{lines} scores written to {args.output}")
    return 0


def _eval(argv: list[str]) -> int:
    from jaxalign.pipelines import inference

    parser = _parser("eval", "Generate for a file of prompts and judge the result.")
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
    parser.add_argument("--output", help="JSON file to write")
    _sampling_flags(parser)
    args = _arguments(parser, argv, "runs/eval.gin")
    result = _call(inference.evaluate, args, ("checkpoint", "data"))
    print(json.dumps(result, indent=2))
    return 0


def _data(argv: list[str]) -> int:
    flags = configs.parse_flags(argv)
    _parser("data", "Check and prepare data; print a summary.").parse_args(flags.rest)
    _read_gin(flags, "data needs the run it is for")
    from jaxalign.training import dry_run, train

    print(dry_run.describe_data(configs.configured(train.Run)()))
    return 0


def _plan(argv: list[str]) -> int:
    parser = _parser(
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
    parser.add_argument("--steps", default="train,score,decode", help="comma-separated")
    parser.add_argument(
        "--largest_batch",
        action="store_true",
        help="also search the largest BATCH_SIZE of the cheapest mesh",
    )
    parser.add_argument("--output", help="FILE.json to write, with FILE.html beside it")
    flags = configs.parse_flags(argv)
    args = parser.parse_args(flags.rest)
    _read_gin(flags, "plan needs a run")
    # The machine's own accelerator, if any, is not asked.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Shapes depend on neither text nor vocabulary, and both may be out of reach here.
    needless = ["VOCABULARY = None", "MIXTURE_OR_TASK_NAME = None", "DATA = 'planned'"]
    _read_gin(
        flags._replace(gin_bindings=[*flags.gin_bindings, *needless]),
        "plan needs a run",
    )
    from jaxalign import planning
    from jaxalign.planning import hardware
    from jaxalign.training import train

    found = planning.plan(
        configs.configured(train.Run)(),
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


def _tasks(argv: list[str]) -> int:
    _parser("tasks", "List the data sets and the gin files.").parse_args(argv)
    from jaxalign import prepare

    print("Data sets, for DATA (alone, or as 'name:exported_file'):")
    for task in prepare.list_tasks():
        print(f"  {task['name']:<16}{task['doc']}")
        print(f"  {'':<16}schemas: {', '.join(task['schemas'])}")
        for option, default in task["options"].items():
            print(f"  {'':<16}TASK_OPTIONS {option!r}: {default!r}")
    print("\nGin files:")
    for name in configs.available():
        print(f"  {name}")
    return 0


def _bench(argv: list[str]) -> int:
    from jaxalign.benchmarking import suite

    parser = _parser("bench", "Time steps on this machine; see docs/performance.md.")
    parser.add_argument(
        "--cases",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="comma-separated; default: those with targets",
    )
    parser.add_argument("--all", action="store_true", help="cases without targets too")
    parser.add_argument("--steps", type=int, default=6, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=2, help="of case and peer")
    parser.add_argument("--output", default="benchmarks/results.json")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare with --output instead of writing it; status 1 if slower",
    )
    args = parser.parse_args(argv)
    found = suite.run(
        args.cases,
        everything=args.all,
        steps=args.steps,
        rounds=args.rounds,
        output=args.output,
        check=args.check,
    )
    for line in found:
        print(f"slower: {line}", file=sys.stderr)
    return 1 if found else 0


def _report(argv: list[str]) -> int:
    from jaxalign import report

    parser = _parser("report", "Write one self-contained HTML page about runs.")
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--output", help="HTML file; default: the first run's")
    args = parser.parse_args(argv)
    print(report.write_report(args.run_dirs, args.output))
    return 0


def _quickstart(argv: list[str]) -> int:
    from jaxalign.pipelines import quickstart

    parser = _parser("quickstart", "The main job on embedded data, in minutes.")
    parser.add_argument("--run_dir", default="runs/quickstart")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(quickstart.run(args.run_dir, seed=args.seed))
    return 0


def _compare(argv: list[str]) -> int:
    from jaxalign.pipelines import comparison

    parser = _parser("compare", "Every objective on embedded data at equal compute.")
    parser.add_argument("--run_dir", default="runs/compare")
    parser.add_argument(
        "--objectives",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="comma-separated gin files of runs/, e.g. dpo,kto; default: all",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--num_prompts", type=int, default=300)
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    args = parser.parse_args(argv)
    table = comparison.run(
        args.run_dir,
        names=args.objectives,
        seeds=args.seeds,
        steps=args.steps,
        num_prompts=args.num_prompts,
        split=args.split,
    )
    print(comparison.as_text(table))
    print(f"\nPage: {args.run_dir}/comparison.html")
    return 0


def _iterate(argv: list[str]) -> int:
    from jaxalign.pipelines import iteration

    parser = _parser(
        "iterate", "Train on judged samples of the policy itself, round by round."
    )
    parser.add_argument("--initial", required=True, help="checkpoint to start from")
    parser.add_argument("--prompts", required=True, help='JSONL file with {"prompt"}')
    parser.add_argument(
        "--judge", required=True, help="module:function, a score or a preference"
    )
    parser.add_argument("--run_dir", required=True, help="where all is written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--reference",
        choices=iteration.REFERENCES,
        default="fixed",
        help="the initial policy in every round, or each round's own start",
    )
    parser.add_argument(
        "--prompts_per_round", type=int, help="default: all, every round"
    )
    parser.add_argument("--num_samples", type=int, default=4, help="per prompt")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at a time")
    parser.add_argument("--seed", type=int, default=0)
    flags = configs.parse_flags(argv)
    args = parser.parse_args(flags.rest)
    table = iteration.iterate(
        gin_files=flags.gin_files or ["runs/dpo.gin"],
        bindings=flags.gin_bindings,
        search_paths=flags.search_paths,
        **vars(args),
    )
    for row in table:
        print(
            f"round {row['round']}: samples score {row['reward']:.4g}, trained on "
            f"{row['rows']} rows: {row['policy']}"
        )
    return 0


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "generate": _generate,
    "steer": _steer,
    "serve": _serve,
    "score": _score,
    "eval": _eval,
    "data": _data,
    "plan": _plan,
    "tasks": _tasks,
    "bench": _bench,
    "report": _report,
    "iterate": _iterate,
    "compare": _compare,
    "quickstart": _quickstart,
}

if __name__ == "__main__":
    sys.exit(main())
