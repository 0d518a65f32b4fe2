"""Flags that several verbs share, and how they meet gin's configuration."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

from jaxalign import configs

_log = logging.getLogger(__name__)


def verb_parser(verb: str, doc: str) -> argparse.ArgumentParser:
    """A verb's parser, before its own flags."""
    parser = argparse.ArgumentParser(
        prog=f"jaxalign {verb}",
        description=doc,
        epilog="Gin: --gin_file=FILE (repeatable), --gin.NAME=VALUE.",
        allow_abbrev=False,
    )
    return parser


def distributed_flags(parser: argparse.ArgumentParser) -> None:
    """How processes find each other; see `jaxalign.training.distributed`."""
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
        "--distributed_timeout",
        type=int,
        default=1800,
        help="seconds to wait for the others: at the start, and for a step",
    )


def join(args: argparse.Namespace) -> int:
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
    from jaxalign import models
    from jaxalign.training import train

    make = configs.configured(train.Run)
    if make is train.Run:
        raise configs.ConfigError(
            "No --gin_file describes a run; add one, such as --gin_file=runs/sft.gin: "
            "`jaxalign tasks` lists all."
        )
    run = make()
    _log.info("Network: %s, %s", configs.network(), models.describe(run.model))
    return run


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
    parser.add_argument("--num_samples", type=int, help="per prompt")
    parser.add_argument("--temperature", type=float, help="0: most probable tokens")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--batch_size", type=int, help="prompts at a time")
    parser.add_argument("--seed", type=int)


def call(
    function: Callable[..., Any], args: argparse.Namespace, required: tuple[str, ...]
) -> Any:
    """Calls a function with the flags that were given, over gin's bindings."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    missing = [f"--{name}=..." for name in required if name not in given]
    if missing:
        raise configs.ConfigError(f"Missing {', '.join(missing)}.")
    return configs.configured(function)(**given)
