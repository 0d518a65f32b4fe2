"""The command line: ``jaxalign VERB [flags]``, with flags read from signatures.

A verb is a function: of the library (``generate``, ``score`` ...), of
`jaxalign.cli.verbs`, ``run`` of a file in ``jaxalign/pipelines/``, or a user's own,
``my.module:function``. Its parameters are the flags, its docstring is the help.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from jaxalign import configs, user_code
from jaxalign.cli import flags, signatures
from jaxalign.cli.signatures import PACKAGE, Parameter
from jaxalign.cli.table import GIN, Verb, known_verbs, parameters, takes_gin
from jaxalign.cluster import programs

_ENDING = """
`jaxalign VERB --help` lists a verb's flags; my.module:function and file.py:function are
verbs, too. Gin files are looked up in the working folder, then in the package.
"""


# What a user can mend: shown as one message, without a traceback.
_MISTAKES = (ValueError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status, 2 for a mistake in what was asked."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # `jaxalign tasks | head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(argv: list[str]) -> int:
    verbs = known_verbs()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("jaxalign VERB [--gin_file=FILE ...] [--gin.NAME=VALUE ...] [flags]\n")
        for name, verb in verbs.items():
            print(f"  {name:<12} {signatures.read(verb.function).summary}")
        print(_ENDING)
        return 0
    name, rest = argv[0], argv[1:]
    if name == "--version":
        import jaxalign

        print(f"jaxalign {jaxalign.__version__}")
        return 0
    verb = Verb(name) if ":" in name else verbs.get(name)
    if verb is None:
        near = configs.nearest(name, verbs)
        hint = f"Did you mean {' or '.join(near)}?" if near else ""
        hint = hint or f"Known: {', '.join(verbs)}."
        print(f"Unknown verb {name!r}. {hint}", file=sys.stderr)
        return 2
    _set_up_logging()
    programs.keep()
    try:
        return _run(name, verb, rest)
    except BrokenPipeError:
        raise
    except _MISTAKES as error:
        if os.environ.get("JAXALIGN_TRACEBACK"):
            raise
        told = f"{type(error).__name__}: {configs.message(error)}"
        print(told, file=sys.stderr)
        _leave(2, told)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        _leave(130, "interrupted.")
        return 130
    except Exception as error:
        _leave(1, f"{type(error).__name__}: {configs.message(error)}", trace=True)
        raise


def _leave(status: int, reason: str, trace: bool = False) -> None:
    """Ends the whole job, if there is one: the others would wait for this process."""
    if "jax" not in sys.modules:  # no process is one of several before it is there
        return
    from jaxalign.cluster import failures

    if failures.in_a_job():
        if trace:  # the traceback comes before all end
            traceback.print_exc()
        failures.leave(status, reason)


def _set_up_logging() -> None:
    # TensorFlow's own chatter says nothing a user of this program can act on.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=logging.WARNING, format="%(levelname).1s %(message)s")
    logging.getLogger("jaxalign").setLevel(logging.INFO)


def _run(name: str, verb: Verb, argv: list[str]) -> int:
    signature, groups = signatures.read(verb.function), parameters(verb)
    if "--help" in argv or "-h" in argv:
        print(flags.usage(name, signature.summary, groups, takes_gin(verb)))
        return 0
    gin = configs.parse_flags(argv)
    if not takes_gin(verb) and len(gin.rest) < len(argv):
        raise configs.ConfigError(f"jaxalign {name} takes no --gin flags.")
    known = {n: p for group in groups.values() for n, p in group.items()}
    given = flags.parse(gin.rest, known)
    parts = {t: {n: given[n] for n in g if n in given} for t, g in groups.items()}
    own = parts.pop("")

    from jaxalign.cli.verbs import Job, Settings

    macros = {n: Settings.macros()[n] for n in parts.get("settings", ())}
    if verb.macros:
        macros |= {n: flags.macro(known[n]) for n in own}
    bound = {binding.partition("=")[0].strip() for binding in gin.gin_bindings}
    for parameter, macro in macros.items():
        if macro in bound:
            raise configs.ConfigError(
                f"{flags.flag(known[parameter])} and --gin.{macro} both set {macro}: "
                "leave one of them out."
            )
    made = {"settings": Settings(**parts.get("settings", {}))}
    made["job"] = Job(**parts.get("job", {}))
    passed = (gin.gin_files, gin.gin_bindings, gin.search_paths)
    made |= {n: v for n, v in zip(GIN, (gin, *passed), strict=True) if v}
    own |= {n: made[n] for n in (*signature.groups, *signature.parameters) if n in made}
    if verb.macros:
        defaults = _defaults(verb, signature.parameters)
        configs.check(*passed, defaults)
        if verb.job:
            made["job"].join()
        configs.parse(*passed, defaults)
    function = _load(verb)
    result = configs.configured(function)(**own) if verb.macros else function(**own)
    if verb.job:
        import jax

        if jax.process_index() > 0:
            return 0
    _show(result, function, own.get("output"))
    return 0


def _defaults(verb: Verb, parameters: dict[str, Parameter]) -> str:
    """Gin's text of a function's defaults, a macro for each."""
    path, _, name = verb.function.partition(":")
    package, _, module = path.removesuffix(".py").rpartition("/")
    made = [p for p in parameters.values() if p.default is not signatures.REQUIRED]
    lines = ["from __gin__ import dynamic_registration"]
    lines.append(f"from jaxalign.{package.replace('/', '.')} import {module}")
    lines += [f"{flags.macro(p)} = {p.default!r}" for p in made]
    lines += [f"{module}.{name}.{p.name} = %{flags.macro(p)}" for p in made]
    return "\n".join(lines) + "\n"


def _load(verb: Verb) -> Any:
    source, _, name = verb.function.rpartition(":")
    if (PACKAGE / source).is_file():
        dotted = source.removesuffix(".py").replace("/", ".")
        module = importlib.import_module(f"jaxalign.{dotted}")
    else:
        module = user_code.load_module(source, asked_as=verb.function)
    return getattr(module, name)


def _show(result: Any, function: Any, output: str | None) -> None:
    """Prints what a verb returns: text, or by its module's ``as_text``, or JSON."""
    as_text = getattr(sys.modules[function.__module__], "as_text", None)
    if isinstance(result, int) and output:
        print(f"{result} lines written to {output}")
    elif isinstance(result, str):
        print(result, end="" if result.endswith("\n") else "\n")
    elif result is not None and as_text:
        print(as_text(result))
    elif result is not None:
        from jaxalign.data import jsonl

        print(jsonl.dumps(result, indent=2))
