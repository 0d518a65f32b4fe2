"""What the gin files of T5X say of a network and its vocabulary.

They are parsed and never run: they import T5X, seqio or flaxformer, which need not be
installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gin import config_parser

from jaxalign.models.config import T5Shape

# T5X writes config.gin into its model directory and operative_config.gin beside it.
NAMES = ("config.gin", "model.gin", "operative_config.gin")

# Flax's names of activations that have another one here.
_ACTIVATIONS = {"swish": "silu"}
_VOCABULARIES = ("SentencePieceVocabulary", "ByteVocabulary")


class Told(NamedTuple):
    """What gin files say.

    Attributes:
      network: fields of a `T5Shape`.
      vocabulary: its class and arguments, if they name one.
      source: the file's name.
    """

    network: Mapping[str, Any]
    vocabulary: Mapping[str, Any] | None
    source: str


class _Macro(NamedTuple):
    name: str


class _Reference(NamedTuple):
    selector: str


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        return _Reference(scoped_selector.rsplit("/", 1)[-1])

    def macro(self, name: str) -> Any:
        return _Macro(name)


@dataclasses.dataclass
class _Bindings:
    macros: dict[str, Any] = dataclasses.field(default_factory=dict)
    parameters: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)

    def value(self, value: Any) -> Any:
        """A value, macros followed; None where one is not set."""
        seen: set[str] = set()
        while isinstance(value, _Macro):
            if value.name in seen:
                return None
            seen.add(value.name)
            value = self.macros.get(value.name)
        return value

    def of(self, name: str) -> dict[str, Any]:
        """The parameters of a configurable, by the last part of its name."""
        found = {}
        for (selector, parameter), value in self.parameters.items():
            settled = self.value(value)
            if selector.rsplit(".", 1)[-1] == name and settled is not None:
                found[parameter] = settled
        return found


def read(path: Path, files: Sequence[str | Path] | None = None) -> Told:
    """What the gin files of a checkpoint say.

    Args:
      path: of the checkpoint; ``config.gin`` in it, or else beside it, is read.
      files: to read in its place, later ones over earlier ones.

    Raises:
      FileNotFoundError: a file that is given is not there.
      ValueError: a file that is not gin.
    """
    if files is None:
        folders = (path, path.parent) if path.is_dir() else (path.parent,)
        beside = [folder / name for folder in folders for name in NAMES]
        files = [file for file in beside if file.is_file()][:1]
    bindings = _Bindings()
    for file in files:
        _read(Path(file), bindings)
    fields = {field.name for field in dataclasses.fields(T5Shape)}
    network = {k: v for k, v in bindings.of("T5Config").items() if k in fields}
    # Flaxformer's networks say it there.
    activations = bindings.of("MlpBlock").get("activations")
    activations = network.get("mlp_activations", activations)
    if isinstance(activations, list | tuple):
        renamed = (_ACTIVATIONS.get(name, name) for name in activations)
        network["mlp_activations"] = tuple(renamed)
    network.pop("dropout_rate", None)  # of training, and no part of what is stored
    return Told(network, _vocabulary(bindings), ", ".join(Path(f).name for f in files))


def _vocabulary(bindings: _Bindings) -> dict[str, Any] | None:
    named = bindings.value(bindings.macros.get("VOCABULARY"))
    for kind in _VOCABULARIES:
        said = bindings.of(kind)
        is_named = isinstance(named, _Reference) and named.selector.endswith(kind)
        if is_named or (named is None and said):
            return {"class": f"seqio.{kind}", **said}
    return None


def _read(file: Path, bindings: _Bindings) -> None:
    text = file.read_text("utf-8")
    try:
        for statement in config_parser.ConfigParser(text, _Delegate()):
            if isinstance(statement, config_parser.IncludeStatement):
                # T5X's packages are not here; a file of that name may lie beside.
                beside = file.parent / Path(statement.filename).name
                if beside.is_file() and beside != file:
                    _read(beside, bindings)
            elif isinstance(statement, config_parser.BindingStatement):
                if not statement.arg_name:
                    bindings.macros[statement.selector] = statement.value
                elif not statement.scope:
                    key = (statement.selector, statement.arg_name)
                    bindings.parameters[key] = statement.value
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{file} is not a gin file: {error}") from error
