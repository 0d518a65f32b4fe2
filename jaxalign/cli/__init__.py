"""The command line: ``jaxalign VERB --gin_file=... --gin.NAME=VALUE``.

Nothing but parsing; each verb calls one function.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from jaxalign import configs
from jaxalign.cli import inference, overview, training

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
        told = configs.message(error)
        print(f"{type(error).__name__}: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _set_up_logging() -> None:
    # TensorFlow's own chatter says nothing a user of this program can act on.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=logging.WARNING, format="%(levelname).1s %(message)s")
    logging.getLogger("jaxalign").setLevel(logging.INFO)


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": training.train,
    "generate": inference.generate,
    "steer": inference.steer,
    "serve": inference.serve,
    "score": inference.score,
    "eval": inference.evaluate,
    "data": training.data,
    "plan": training.plan,
    "tasks": overview.tasks,
    "bench": overview.bench,
    "report": overview.report,
    "iterate": training.iterate,
    "compare": overview.compare,
    "quickstart": overview.quickstart,
}
