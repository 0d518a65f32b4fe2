"""Verbs that list, compare and report."""

from __future__ import annotations

import argparse

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
    parser.add_argument(
        "--redo", action="append", default=[], help="a stage to make again"
    )
    return parser


def quickstart(argv: list[str]) -> int:
    args = quickstart_parser().parse_args(argv)
    from jaxalign.pipelines import quickstart

    print(quickstart.run(**vars(args)))
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
    parser.add_argument(
        "--redo", action="append", default=[], help="a stage to make again"
    )
    return parser


def compare(argv: list[str]) -> int:
    args = compare_parser().parse_args(argv)
    from jaxalign.pipelines import compare as pipeline

    print(pipeline.run(**vars(args)))
    return 0
