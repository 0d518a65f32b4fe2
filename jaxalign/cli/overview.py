"""Verbs that list, measure, compare and report."""

from __future__ import annotations

import argparse
import sys

from jaxalign import configs
from jaxalign.cli.flags import verb_parser


def tasks_parser() -> argparse.ArgumentParser:
    return verb_parser("tasks", "List the data sets and the gin files.", gin=False)


def tasks(argv: list[str]) -> int:
    tasks_parser().parse_args(argv)
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


def bench_parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "bench", "Time steps on this machine; see docs/performance.md.", gin=False
    )
    parser.add_argument(
        "--cases",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="comma-separated; default: those with targets",
    )
    parser.add_argument("--all", action="store_true", help="cases without targets too")
    parser.add_argument("--steps", type=int, default=6, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=2, help="of case and peer")
    parser.add_argument(
        "--output", default="benchmarks/results.json", help="JSON file of the times"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare with --output instead of writing it; status 1 if slower",
    )
    return parser


def bench(argv: list[str]) -> int:
    args = bench_parser().parse_args(argv)
    from jaxalign.benchmarking import suite

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


def report_parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "report", "Write one self-contained HTML page about runs.", gin=False
    )
    parser.add_argument(
        "run_dirs",
        nargs="+",
        metavar="RUN_DIR",
        help="a run, or a folder of runs; here or in a bucket",
    )
    parser.add_argument(
        "--output",
        help="HTML file; default: report.html in RUN_DIR, or of several in the "
        "folder that holds them all",
    )
    return parser


def report(argv: list[str]) -> int:
    args = report_parser().parse_args(argv)
    from jaxalign import report

    print(report.write_report(args.run_dirs, args.output))
    return 0


def quickstart_parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "quickstart", "The main job on embedded data, in minutes.", gin=False
    )
    parser.add_argument(
        "--run_dir", default="runs/quickstart", help="where all is written"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of data, training and samples"
    )
    return parser


def quickstart(argv: list[str]) -> int:
    args = quickstart_parser().parse_args(argv)
    from jaxalign.pipelines import quickstart

    print(quickstart.run(args.run_dir, seed=args.seed))
    return 0


def compare_parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "compare", "Every objective on embedded data at equal compute.", gin=False
    )
    parser.add_argument(
        "--run_dir", default="runs/compare", help="where all is written"
    )
    parser.add_argument(
        "--objectives",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="comma-separated gin files of runs/, e.g. dpo,kto; default: all",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument(
        "--steps", type=int, default=100, help="training steps of each objective"
    )
    parser.add_argument(
        "--num_prompts", type=int, default=300, help="unseen prompts to answer"
    )
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="of the prompts; validation to choose settings by",
    )
    return parser


def compare(argv: list[str]) -> int:
    args = compare_parser().parse_args(argv)
    from jaxalign.pipelines import comparison

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
