"""Which of T5X's formats a path holds, told from what is in it.

Three formats hold the same tree (``target/...`` the parameters, ``state/step`` and
``state/param_states/...`` what the optimizer keeps):

* ``legacy``: a msgpack file ``checkpoint`` that holds small arrays and, in place of
  each large one, the TensorStore specification of a zarr folder beside it. All public
  T5 checkpoints are of this kind;
* ``msgpack``: the same file with every array in it, as the oldest checkpoints are;
* ``orbax``: a folder ``state`` written by Orbax, T5X's default today.
"""

from __future__ import annotations

import dataclasses
import gzip
import os
import re
from pathlib import Path
from typing import Any

from jaxalign.interop import t5x_msgpack

LEGACY, MSGPACK, ORBAX, MESH_TF = "legacy", "msgpack", "orbax", "mesh-tensorflow"

STEP = re.compile(r"checkpoint_(\d+)")
PLACEHOLDER = "PLACEHOLDER://"  # Orbax's, before it wrote _METADATA


class T5XError(ValueError):
    """A checkpoint of T5X that cannot be read, or does not hold what is wanted."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a path turned out to be.

    Attributes:
      format: ``"legacy"``, ``"msgpack"``, ``"orbax"`` or ``"mesh-tensorflow"``, which
        T5X converts itself and nothing here reads.
      path: the checkpoint's own folder or file.
      file: what the format was told from.
    """

    format: str
    path: Path
    file: Path


def detect(path: str | os.PathLike[str]) -> Found | None:
    """What kind of T5X checkpoint a local path holds; None for anything else.

    Args:
      path: a checkpoint's folder or its msgpack file, or a model directory, of which
        the newest checkpoint is taken.

    Raises:
      ValueError: for a msgpack file of T5X's that is cut short.
    """
    path = Path(path)
    if path.is_file():
        return _of_file(path, path)
    if found := _of_folder(path):
        return found
    steps = {int(m[1]): p for p in _children(path) if (m := STEP.fullmatch(p.name))}
    for _, child in sorted(steps.items(), reverse=True):
        if found := _of_file(child, child) if child.is_file() else _of_folder(child):
            return found
    return None


def of_parameters(name: str) -> bool:
    """Whether a network needs a file of a checkpoint, by its path in it.

    Of a legacy checkpoint in a bucket, what the optimizer keeps and the position in the
    data need not be copied: ``remote.copy_folder(path, of_parameters)``.

    >>> of_parameters("target.encoder.encoder_norm.scale/.zarray")
    True
    >>> of_parameters("checkpoint_5/state.param_states.encoder.encoder_norm.scale.v/0")
    False
    """
    parts = name.split("/")
    return not any(
        part.startswith(("state.param_states.", "train_ds-")) for part in parts
    )


def _children(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else []


def contents(path: Path) -> str:
    if not path.exists():
        return "there is no such path"
    names = [child.name for child in _children(path)]
    shown = ", ".join(names[:6]) + ", ..." * (len(names) > 6)
    return f"it holds {shown or 'nothing'}" if path.is_dir() else "it is another file"


def _of_folder(path: Path) -> Found | None:
    for folder in (path / "state", path):
        file = folder / "_METADATA"
        if file.is_file() and re.search(r"\(\W*target\b", file.read_text("utf-8")):
            return Found(ORBAX, path, file)
    if (path / "state" / "manifest.ocdbt").is_file():
        return Found(ORBAX, path, path / "state" / "_METADATA")
    file = path / "checkpoint"
    return _of_file(path, file) if file.is_file() else None


def _of_file(path: Path, file: Path) -> Found | None:
    with open(file, "rb") as stream:
        start = stream.read(64)
    if start.startswith(t5x_msgpack.GZIP):
        try:
            with gzip.open(file) as stream:
                start = stream.read(64)
        except (EOFError, OSError):
            return None
    if start.startswith(b"model_checkpoint_path"):
        return Found(MESH_TF, path, file)
    is_map = start[:1] and (0x80 <= start[0] < 0x90 or start[0] in (0xDE, 0xDF))
    if not is_map or not re.search(rb"version|optimizer|target", start):
        return None
    flat = flatten(t5x_msgpack.load(file))
    apart = any(is_spec(leaf) or is_placeholder(leaf) for leaf in flat.values())
    return Found(LEGACY if apart else MSGPACK, path, file)


def is_spec(value: Any) -> bool:
    return isinstance(value, dict) and {"driver", "kvstore", "metadata"} <= value.keys()


def is_placeholder(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(PLACEHOLDER)


def flatten(tree: Any, above: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(tree, dict) or is_spec(tree):
        return {"/".join(above): tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, (*above, key))
    return flat
