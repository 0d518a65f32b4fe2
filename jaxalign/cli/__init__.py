"""The command line: ``jaxalign VERB --gin_file=... --gin.NAME=VALUE``.

Nothing but parsing; each verb calls one function.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from jaxalign import configs
from jaxalign.cli import completion, inference, overview, training

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
  report       one HTML page about runs: RUN_DIR...
  iterate      rounds of sampling, judging and training: --prompts=FILE --judge=...
  compare      every objective on embedded data at equal compute
  quickstart   supervised fine-tuning, then DRO-V, KTO and DPO, on embedded data
  completion   for the shell: source <(jaxalign completion bash), or zsh

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
        hint = f"Did you mean {' or '.join(near)}?" if near else ""
        hint = hint or f"Known: {', '.join(_VERBS)}."
        print(f"Unknown verb {verb!r}. {hint}", file=sys.stderr)
        return 2
    _set_up_logging()
    try:
        return _VERBS[verb][0](rest)
    except BrokenPipeError:  # `jaxalign tasks | head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _MISTAKES as error:
        if os.environ.get("JAXALIGN_TRACEBACK"):
            raise
        told = configs.message(error)
        print(f"{type(error).__name__}: {told}", file=sys.stderr)
        _leave(2, f"{type(error).__name__}: {told}")
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        _leave(130, "interrupted.")
        return 130
    except Exception as error:
        if _in_a_job():  # the traceback comes before all end
            traceback.print_exc()
            _leave(1, f"{type(error).__name__}: {configs.message(error)}")
        raise


def _in_a_job() -> bool:
    """Whether this process is one of several; none is before JAX is there."""
    if "jax" not in sys.modules:
        return False
    from jaxalign.cluster import failures

    return failures.in_a_job()


def _leave(status: int, reason: str) -> None:
    """Ends the whole job, if there is one: the others would wait for this process."""
    if _in_a_job():
        from jaxalign.cluster import failures

        failures.leave(status, reason)


def _set_up_logging() -> None:
    # TensorFlow's own chatter says nothing a user of this program can act on.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=logging.WARNING, format="%(levelname).1s %(message)s")
    logging.getLogger("jaxalign").setLevel(logging.INFO)


def _completion(argv: list[str]) -> int:
    args = completion.completion_parser().parse_args(argv)
    parsers = {verb: parser for verb, (_, parser) in _VERBS.items()}
    print(completion.script(args.shell, parsers), end="")
    return 0


# What each verb runs, and what makes its parser.
_VERBS: dict[
    str, tuple[Callable[[list[str]], int], Callable[[], argparse.ArgumentParser]]
] = {
    "train": (training.train, training.train_parser),
    "generate": (inference.generate, inference.generate_parser),
    "steer": (inference.steer, inference.steer_parser),
    "serve": (inference.serve, inference.serve_parser),
    "score": (inference.score, inference.score_parser),
    "eval": (inference.evaluate, inference.evaluate_parser),
    "data": (training.data, training.data_parser),
    "plan": (training.plan, training.plan_parser),
    "tasks": (overview.tasks, overview.tasks_parser),
    "report": (overview.report, overview.report_parser),
    "iterate": (training.iterate, training.iterate_parser),
    "compare": (overview.compare, overview.compare_parser),
    "quickstart": (overview.quickstart, overview.quickstart_parser),
    "completion": (_completion, completion.completion_parser),
}
