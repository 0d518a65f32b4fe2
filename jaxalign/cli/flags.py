"""Flags that several verbs share, and how they meet gin's configuration."""

from __future__ import annotations

import argparse
import ast
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxalign import configs


class _Help(argparse.HelpFormatter):
    """Shows defaults: the parser's own, else those of the function that is called."""

    function = ""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None:
            default = signature(self.function).get(action.dest)
        nothing = default is None or default is False or default in ("", (), [])
        if (
            nothing
            or not action.option_strings
            or default is argparse.SUPPRESS
            or "default:" in action.help
        ):
            return action.help
        text = str(default).replace("%", "%%")
        return f"{action.help} (default: {text})"


def verb_parser(
    verb: str, doc: str, function: str = "", gin: bool = True
) -> argparse.ArgumentParser:
    """A verb's parser, before its own flags.

    Args:
      verb: its name.
      doc: what it does, a sentence.
      function: what it calls, ``"inference/generation.py:generate"``, whose defaults
        ``--help`` shows. It is read, not imported: help and completion need no JAX.
      gin: whether it takes gin's flags.
    """
    formatter = type("Help", (_Help,), {"function": function})
    return argparse.ArgumentParser(
        prog=f"jaxalign {verb}",
        description=doc,
        epilog="Gin: --gin_file=FILE (repeatable), --gin.NAME=VALUE." if gin else None,
        allow_abbrev=False,
        formatter_class=formatter,
    )


@functools.cache
def signature(function: str) -> dict[str, Any]:
    """The constant defaults of a function's keyword-only parameters, from its source.

    >>> signature("inference/score.py:score")["batch_size"]
    16
    """
    if not function:
        return {}
    path, _, name = function.partition(":")
    source = (Path(__file__).parents[1] / path).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            return {
                argument.arg: default.value
                for argument, default in pairs
                if isinstance(default, ast.Constant)
            }
    raise LookupError(function)


def distributed_flags(parser: argparse.ArgumentParser) -> None:
    """How processes find each other; see `jaxalign.cluster.distributed`."""
    group = parser.add_argument_group("many processes")
    group.add_argument(
        "--distributed",
        default="auto",
        help="auto: join the job of SLURM, MPI, GKE or Cloud TPU, if any; or off",
    )
    group.add_argument("--coordinator_address", help="HOST:PORT of process 0")
    group.add_argument("--process_count", type=int, help="how many there are")
    group.add_argument("--process_index", type=int, help="which one this is, from 0")
    group.add_argument(
        "--distributed_timeout",
        type=int,
        default=1800,
        help="seconds to wait for the others: at the start, and for a step",
    )


def join(args: argparse.Namespace) -> int:
    """Joins the job that the flags or the environment describe; takes the flags."""
    from jaxalign.cluster import distributed

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


def read_gin(flags: configs.GinFlags, needs: str) -> None:
    """Parses gin files and bindings; a run file must be among them."""
    if not flags.gin_files:
        raise configs.ConfigError(
            f"{needs}: --gin_file=runs/sft.gin, or dpo, kto, dro_v; `jaxalign tasks` "
            "lists all."
        )
    configs.parse(flags.gin_files, flags.gin_bindings, flags.search_paths)


def configured_run() -> Any:
    """The run that the parsed gin files describe; says which network it took."""
    from jaxalign.training import run

    return run.from_gin()


def arguments(
    parser: argparse.ArgumentParser, argv: list[str], gin_file: str
) -> argparse.Namespace:
    """Parses a verb's flags and its gin configuration, with `gin_file`'s defaults."""
    flags = configs.parse_flags(argv)
    args = parser.parse_args(flags.rest)
    # A packaged file is weaker than the user's: theirs may change a number or two.
    files = [gin_file, *(f for f in flags.gin_files if f != gin_file)]
    configs.parse(files, flags.gin_bindings, flags.search_paths)
    return args


def sampling_flags(parser: argparse.ArgumentParser) -> None:
    """How responses are drawn."""
    parser.add_argument("--num_samples", type=int, help="responses per prompt")
    parser.add_argument("--temperature", type=float, help="0: most probable tokens")
    parser.add_argument("--top_k", type=int, help="keep so many tokens; 0: all")
    parser.add_argument("--top_p", type=float, help="keep so much probability")
    parser.add_argument(
        "--max_new_tokens", type=int, help="tokens of a response, its end included"
    )
    parser.add_argument("--batch_size", type=int, help="prompts at a time")
    parser.add_argument("--seed", type=int, help="of the samples")


def call(
    function: Callable[..., Any], args: argparse.Namespace, required: tuple[str, ...]
) -> Any:
    """Calls a function with the flags that were given, over gin's bindings."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    missing = [f"--{name}=..." for name in required if name not in given]
    if missing:
        raise configs.ConfigError(f"Missing {', '.join(missing)}.")
    return configs.configured(function)(**given)
