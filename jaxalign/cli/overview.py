"""Verbs that list, compare and report."""

from __future__ import annotations

from jaxalign import configs
from jaxalign.cli.flags import verb_parser


def tasks(argv: list[str]) -> int:
    verb_parser("tasks", "List the data sets and the gin files.").parse_args(argv)
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


def report(argv: list[str]) -> int:
    from jaxalign import report

    parser = verb_parser("report", "Write one self-contained HTML page about runs.")
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--output", help="HTML file; default: the first run's")
    args = parser.parse_args(argv)
    print(report.write_report(args.run_dirs, args.output))
    return 0


def quickstart(argv: list[str]) -> int:
    from jaxalign.pipelines import quickstart

    parser = verb_parser("quickstart", "The main job on embedded data, in minutes.")
    parser.add_argument("--run_dir", default="runs/quickstart")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(quickstart.run(args.run_dir, seed=args.seed))
    return 0


def compare(argv: list[str]) -> int:
    from jaxalign.pipelines import comparison

    parser = verb_parser(
        "compare", "Every objective on embedded data at equal compute."
    )
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
