"""Raw rows from files and builders, as ``(file, line, dict or BadRow)``.

JSON Lines, CSV, TSV and Parquet are read without TensorFlow; TFRecord and TFDS import
it when they are asked for.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxalign import remote
from jaxalign.data import packed
from jaxalign.data.bad_rows import BadRow, FieldError, nearest
from jaxalign.data.jsonl import TABLES, check_format, read_jsonl
from jaxalign.data.tables import read_table
from jaxalign.files import file_sha256
from jaxalign.prepare import late_imports
from jaxalign.prepare import tasks as tasks_lib

RawRow = tuple[str, int, Mapping[str, Any] | BadRow]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
      name: short, for folder names and messages.
      identity: JSON-ready; equal only when the rows are equal.
      rows: makes a fresh iterator over the rows.
      task: the data set whose record functions read the rows, if any.
      seqio_name: the registered seqio task or mixture, whose rows are token ids.
      files: what ``rows`` reads, in order; empty where that is no files.
    """

    name: str
    identity: dict[str, Any]
    rows: Callable[[], Iterable[RawRow]] | None = None
    task: tasks_lib.Task | None = None
    seqio_name: str | None = None
    files: Sequence[str] = ()

    def guarded(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items; a ValueError behind the last if the source's files have changed.

        A cache's name says what they held when they were looked up.
        """
        yield from items
        found = zip(self.files, self.identity.get("files", ()), strict=True)
        if changed := [file for file, digest in found if digest != _digest(file)]:
            raise ValueError(
                f"{', '.join(changed)} changed while being read, and nothing was "
                "written. Start again when whoever writes there is done."
            )


def find_source(data: str, split: str = "train", task: str | None = None) -> Source:
    """Finds what DATA names, as ``prepare`` says.

    Args:
      task: the data set that ``data`` is a file of; the same as ``task:file``.

    Raises:
      FileNotFoundError: when nothing has that name, with the nearest names.
    """
    if task is None:
        if data.startswith("tfds:"):
            return _tfds(data.removeprefix("tfds:"), split, None)
        if files := _expand(data):
            return _files(files, None)
        name, _, rest = data.partition(":")
        if rest and name.isidentifier() and name in tasks_lib.known_tasks():
            task, data = name, rest
    exported = None if task is None else tasks_lib.get_task(task)
    if exported and (files := _expand(data)):
        return _files(files, exported)
    suffix = packed.kind(data)
    if exported or "/" in data or suffix in _READERS or suffix.lower() in TABLES:
        raise FileNotFoundError(_no_file(data))
    known = tasks_lib.known_tasks()
    if data in known:
        return _task(known[data], split)
    registered = []
    # Whoever registered a task has imported seqio to do so. Importing it here would
    # take half a minute, TensorFlow with it, to find nothing.
    if seqio := sys.modules.get("seqio"):
        registered += [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if data in registered:
        return Source(data, {"seqio": data, "split": split}, seqio_name=data)
    hint = nearest(data, [*known, *registered]) or f"; tasks: {', '.join(known)}"
    raise FileNotFoundError(
        f"No file, task or seqio task is called {data!r}{hint}. A seqio task of your "
        "own needs its module or file in MIXTURE_OR_TASK_MODULE."
    )


def _task(task: tasks_lib.Task, split: str) -> Source:
    if isinstance(task.source, str):
        return _tfds(task.source, split, task)
    if task.source is None:
        raise FileNotFoundError(
            f"Task {task.name!r} reads an exported file: say DATA='{task.name}:FILE'."
        )
    make = task.source

    def rows() -> Iterator[RawRow]:
        for i, raw in enumerate(make(split), start=1):
            yield task.name, i, raw

    return Source(task.name, {"split": split} | _code(task), rows, task)


def _code(task: tasks_lib.Task | None) -> dict[str, str]:
    return {"task": task.name, "code": task.fingerprint} if task else {}


def _files(files: list[str], task: tasks_lib.Task | None) -> Source:
    for file in files:
        if reader(file) is read_jsonl:
            check_format(file)
        elif reader(file) is read_table:
            packed.check(file)
    # Row keys carry the short name where it tells the files apart.
    names = [pathlib.PurePath(file).name for file in files]
    short = len(set(names)) == len(names)

    def rows() -> Iterator[RawRow]:
        for file in files:
            for line, row in reader(file)(file):
                yield file, line, row

    identity = {
        "files": [_digest(f) for f in files],
        "names": names if short else files,
    }
    identity |= _code(task)
    return Source(names[0].split(".")[0], identity, rows, task, files=files)


def _digest(file: str) -> str:
    return file_sha256(remote.copy(file))


def _expand(pattern: str) -> list[str]:
    path = pathlib.Path(pattern).expanduser()
    found: list[str] = []
    if remote.is_remote(pattern):
        found = remote.expand(pattern)
    elif path.is_file():
        found = [pattern]
    elif path.is_dir():
        return in_folder(path)
    elif glob.has_magic(pattern):
        paths = sorted(map(pathlib.Path, glob.glob(str(path), recursive=True)))
        found = [str(path) for path in paths if path.is_file()]
    if found == [pattern]:  # asked for by its name
        return [pattern if remote.is_remote(pattern) else str(path)]
    return [file for file in found if not file.endswith(_BESIDE)]


def in_folder(folder: pathlib.Path) -> list[str]:
    """The data files that lie in a folder, by name; empty if there are none.

    Raises:
      ValueError: when they are of several kinds, which may be the same rows twice.
    """
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and packed.kind(path).lower() in _READERS
        and not path.name.startswith(".")
        and not f".{path.name}".endswith(_BESIDE)
    ]
    kinds = sorted({packed.kind(path).lower() for path in found})
    if len(kinds) > 1:
        names = [next(p.name for p in found if p.suffix and k in p.name) for k in kinds]
        raise ValueError(
            f"The folder {folder} holds data files of several kinds, {', '.join(names)}"
            f": name those that are meant with a glob, '{folder}/*{kinds[0]}'."
        )
    return [str(path) for path in found]


# What `generate` and others leave beside a file of rows: no rows, whatever a glob says.
_BESIDE = (".settings.json", ".bad_rows.jsonl", ".partial", ".partial.json")


def _no_file(data: str) -> str:
    if remote.is_remote(data):
        return (
            f"No file {data!r}. Check the address; files in a folder of a bucket are "
            "named by a glob, with *, ? and [...]."
        )
    path = pathlib.Path(data).expanduser()
    beside = sorted(
        p.name for p in path.parent.glob("*") if packed.kind(p).lower() in _READERS
    )
    if hint := nearest(path.name, beside):
        return f"No file {data!r}{hint}."
    return f"No file {data!r}; data files in that folder: {beside[:8] or 'none'}."


def reader(file: str) -> Callable[[str], Iterator[Any]]:
    """What reads a file, by its name.

    Raises:
      ValueError: for a file of no known kind.
    """
    suffix = packed.kind(file)
    if suffix.lower() in TABLES:
        check_format(file)  # says what to do with a spreadsheet
    found = _READERS.get(suffix) or _TABLES.get(suffix.lower())
    if found is None or (file.endswith(packed.PACKED) and found not in _UNPACKING):
        raise ValueError(
            f"{file} is of no known kind; expected one of {sorted(_READERS)}"
            f"{nearest(suffix, _READERS)}."
        )
    return found


def read_parquet(
    path: str, groups: Sequence[int] | None = None, before: int = 0
) -> Iterator[tuple[int, Any]]:
    """``(row number, row or BadRow)`` of a Parquet file, or of some row groups of it.

    Args:
      before: how many rows stand before the first of the row groups.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(remote.copy(path)) as file:
        batches = file.iter_batches(batch_size=1024, row_groups=groups)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for line, row in enumerate(rows, start=before + 1):
            yield line, plain_row(row, path, line)


def _read_tfrecord(path: str) -> Iterator[tuple[int, Any]]:
    tf = late_imports.tensorflow()

    records = tf.data.TFRecordDataset(str(remote.copy(path))).as_numpy_iterator()
    for line, record in enumerate(records, start=1):
        try:
            example = tf.train.Example.FromString(record)
        except Exception as error:  # protobuf's DecodeError has no stable home
            expected = "a tf.train.Example"
            yield line, BadRow(path, line, "row", "type", expected, str(error))
            continue
        row = {}
        for name, feature in example.features.feature.items():
            kind = feature.WhichOneof("kind")
            values = list(getattr(feature, kind).value) if kind else []
            row[name] = values[0] if len(values) == 1 else values
        yield line, plain_row(row, path, line)


_TABLES = {".csv": read_table, ".tsv": read_table}
_READERS = _TABLES | {
    ".jsonl": read_jsonl,
    ".json": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
    ".tfrecord": _read_tfrecord,
    ".tfrecords": _read_tfrecord,
}
_UNPACKING = (read_jsonl, read_table)


def _tfds(name: str, split: str, task: tasks_lib.Task | None) -> Source:
    late_imports.tensorflow()
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name)
    except Exception as error:  # network, namespace and import errors of many kinds
        hint = nearest(name, tfds.list_builders(with_community_datasets=False))
        file = f"'{task.name}:FILE.jsonl'" if task else "a file"
        raise FileNotFoundError(
            f"TFDS has no builder {name!r} here{hint}. Export the data set to JSON "
            f"Lines and say DATA={file}. TFDS said: {str(error).splitlines()[0]}"
        ) from error

    def rows() -> Iterator[RawRow]:
        builder.download_and_prepare()
        dataset = tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))
        for line, row in enumerate(dataset, start=1):
            yield name, line, plain_row(row, name, line)

    identity = {"tfds": builder.info.full_name, "split": split} | _code(task)
    label = task.name if task else name.replace("/", "_").replace(":", "_")
    return Source(label, identity, rows, task)


def plain_row(row: Mapping[str, Any], file: str, line: int) -> Any:
    """A row of Python values, or the BadRow when its bytes are no UTF-8."""
    try:
        return {key: _plain(value, key) for key, value in row.items()}
    except FieldError as error:
        return error.at(file, line)


def _plain(value: Any, field: str) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v, field) for k, v in value.items()}
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        value = value.tolist()
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            got = f"byte 0x{value[error.start]:02x} at byte {error.start + 1}"
            raise FieldError(field, "invalid UTF-8", "UTF-8 text", got) from None
    if isinstance(value, list | tuple):
        return [_plain(v, field) for v in value]
    return value
