"""From DATA to a tokenised cache on disk, made once and found again.

The folder's name ends in a fingerprint of everything that decides its rows: the
source's content, schema, field map, chat template, task code, vocabulary and split.
Whoever asks for the same gets the folder that is there; a change makes another one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxalign import batch, remote, user_code
from jaxalign.data import chat_template as chat_templates
from jaxalign.data import records as records_lib
from jaxalign.data import too_long
from jaxalign.data.cache import TokenizedCache
from jaxalign.data.field_map import FieldMap
from jaxalign.files import json_sha256
from jaxalign.prepare import beam, sources, writing
from jaxalign.prepare import rows as rows_lib
from jaxalign.vocabularies import Vocabulary

# Part of every fingerprint: raise it when the same source must give other rows.
VERSION = 2
SPLITS = ("train", "validation")
# A cache without the rows that were skipped tells how many formats its maker knew: 1,
# those of TRL. An older one is made again if it skipped what may be one of them.
FORMATS = 1
_FIELDS = ("prompt", "completion", "chosen", "rejected")
_READ_BY_NOW = {f"{f}: {problem}" for f in _FIELDS for problem in ("missing", "type")}


def prepare(
    data: str,
    *,
    schema: str,
    vocabulary: Vocabulary | None,
    cache_dir: str | os.PathLike[str],
    split: str = "train",
    task: str | None = None,
    task_options: Mapping[str, Any] | None = None,
    module: str | None = None,
    field_map: Mapping[str, str] | None = None,
    on_bad_row: str = "error",
    require: Sequence[str] = (),
    desirable_above: float | None = None,
    columns: Sequence[str] = (),
    eval_fraction: float = 0.0,
    seed: int = 0,
    max_rows: int | None = None,
    beam_options: str | None = None,
    chat_template: str | None = None,
) -> dict[str, pathlib.Path]:
    """Prepares DATA for the feed, or finds what an earlier call prepared.

    Args:
      data: a file, a glob of files or a folder of them (``.jsonl``, ``.csv``, ``.tsv``,
        each also ``.gz`` and ``.zst``; ``.parquet``, ``.tfrecord``); the name of a data
        set in ``jaxalign.tasks``, alone or as ``name:file`` for an exported file of it;
        ``tfds:builder``; a registered seqio task or mixture; or a prepared folder,
        which is used as it is. Files and prepared folders may be in a bucket.
      schema: ``supervised``, ``trajectory``, ``preference`` or ``rationale``.
      vocabulary: turns text into ids. None is allowed for a prepared folder and for a
        seqio task, which bring their own.
      cache_dir: where prepared folders live.
      split: of a builder or task; files have none.
      task: the data set that the file ``data`` is an export of, as in ``name:file``.
      task_options: options of that data set's record functions.
      module: a Python module, or a file ``path/to/tasks.py``, to import first; it
        registers seqio tasks.
      field_map: our field names to the file's, see ``data.field_map.FieldMap``.
      on_bad_row: ``error`` (no cache is written) or ``skip`` (counted in the summary).
        Both list every bad row in ``bad_rows.jsonl`` in the folder of the splits.
      require: of ``reward`` and ``label``, what trajectories must have.
      desirable_above: rewards above it make a missing label desirable.
      columns: names of ``batch.COLUMNS`` that the rows hold, under their own names or
        mapped by ``field_map``.
      eval_fraction: share of *prompts* set aside as ``validation``; all rows with one
        prompt go to one side.
      seed: decides that split, and the order of answers in rationale prompts. Leave it
        alone from run to run, or what one holds out another trains on.
      max_rows: reads only the first so many rows.
      beam_options: tokenises JSONL and Parquet files on Apache Beam with these pipeline
        options, such as ``"--direct_num_workers=4
        --direct_running_mode=multi_processing"``; the cache is the same bytes. None:
        in this process.
      chat_template: what makes texts of chat messages: a name, a file or the text of
        a Jinja2 template (``data.chat_template``). None: the default one.

    Returns:
      ``{"train": folder}``, with ``"validation"`` when ``eval_fraction`` is positive.

    Raises:
      DataError: listing bad rows by file, line and field.
      FileNotFoundError, ValueError: for DATA or options that make no sense.
      ImportError: for ``beam_options`` where Apache Beam is not installed.
    """
    if schema not in records_lib.SCHEMAS or schema == "prompts":
        # ``convert`` words the message for unknown names.
        records_lib.convert({"prompt": "-"}, schema)
        raise ValueError("The schema 'prompts' has no responses to prepare.")
    records_lib.check_on_bad_row(on_bad_row)
    if not 0.0 <= eval_fraction < 1.0:
        raise ValueError(f"EVAL_FRACTION must be in [0, 1), got {eval_fraction}.")
    if not isinstance(data, str):
        raise ValueError(
            f"DATA must be one text, got a {type(data).__name__}: name several files "
            "with a glob, 'part-*.jsonl', or as a mixture, {'a.jsonl': 1.0, 'b.jsonl': "
            "1.0}."
        )
    template = chat_templates.resolve(chat_template)
    prepared = _already_prepared(data, schema, vocabulary, template)
    if prepared:
        return prepared
    code = user_code.fingerprint(user_code.load_module(module)) if module else None
    source = sources.find_source(data, split=split, task=task)
    if code and source.seqio_name:
        # A task is its code: an edited module is not served from an old cache.
        source.identity["code"] = code
    if field_map and (source.task or source.seqio_name):
        raise ValueError(
            f"FIELD_MAP is for plain files, but {source.name!r} is a data set whose "
            "fields are known; leave one of them out."
        )
    if task_options and not source.task:
        raise ValueError(
            f"TASK_OPTIONS {dict(task_options)} need a data set of jaxalign.tasks, "
            f"and {data!r} is none."
        )
    if columns and source.seqio_name:
        raise ValueError(f"seqio tasks have no columns, got {list(columns)}.")
    for name in columns:
        owner = batch.COLUMNS[name].owner
        single = schema in ("supervised", "trajectory")
        if owner not in ("PR" if single else "PQ"):
            raise ValueError(
                f"Rows of the schema {schema!r} hold columns of prompts and of "
                f"{'responses' if single else 'pairs'}; {name!r} has the axes "
                f"{batch.COLUMNS[name].axes!r}."
            )
    FieldMap(field_map, columns)  # says what is wrong with it before any file is read
    transform = source.task.transform(schema, task_options) if source.task else None
    if source.seqio_name:
        from jaxalign.prepare import seqio_tasks

        vocabulary = seqio_tasks.vocabulary_of(source.seqio_name, vocabulary)
    elif vocabulary is None:
        raise ValueError(f"Preparing {data!r} needs a vocabulary, got None.")
    parts = dict(
        version=VERSION,
        source=source.identity,
        schema=schema,
        vocabulary=vocabulary.fingerprint,
        task_options=dict(task_options or {}),
        field_map=dict(field_map or {}),
        on_bad_row=on_bad_row,
        require=list(require),
        desirable_above=desirable_above,
        eval_fraction=eval_fraction,
        seed=seed,
        max_rows=max_rows,
        sequence_length={},  # folders keep the names that they had with it
    )
    if source.seqio_name:
        template = None  # its rows are ids
    if template is not None:
        parts["chat_template"] = template
    if columns:
        parts["columns"] = {n: repr(batch.COLUMNS[n]) for n in columns}
    fingerprint = json_sha256(parts)
    folder = pathlib.Path(cache_dir).expanduser()
    folder = folder / f"{source.name}-{schema}-{fingerprint[:16]}"
    splits = SPLITS if eval_fraction else SPLITS[:1]
    targets = {name: folder / name for name in splits}
    if all(_is_current(path, fingerprint) for path in targets.values()):
        return targets
    told: dict[str, Any] = {"formats": FORMATS} if on_bad_row == "skip" else {}
    if template is not None:
        told["chat_template"] = template

    recipe = rows_lib.Recipe(
        schema,
        vocabulary,
        {
            "field_map": field_map,
            "transform": transform,
            "require": require,
            "desirable_above": desirable_above,
            "columns": columns,
            "chat_template": template,
        },
        frozenset(source.identity.get("names", ())),
        seed,
    )
    with contextlib.ExitStack() as stack:
        if beam_options is not None:
            if not source.files:
                raise ValueError(
                    f"beam_options prepare JSONL and Parquet files, and {data!r} is "
                    "none: leave them out, or export it to files."
                )
            what = "DATA with beam_options"
            files = [remote.local_only(file, what) for file in source.files]
            encoded = beam.encoded(recipe, files, folder, beam_options)
            make_items = stack.enter_context(encoded)
        elif source.seqio_name:
            make_items = functools.partial(
                seqio_tasks.token_rows, source.seqio_name, schema, split
            )
        else:

            def make_items() -> Iterator[writing.Item]:
                return recipe.examples(source.rows())

        writing.write_splits(
            lambda: source.guarded(make_items()),
            recipe.build,
            targets,
            cache={
                "schema": schema,
                "vocabulary": vocabulary,
                "fingerprint": fingerprint,
                "source": {
                    "data": data,
                    **source.identity,
                    **told,
                    "split": {"eval_fraction": eval_fraction, "seed": seed},
                },
            },
            on_bad_row=on_bad_row,
            eval_fraction=eval_fraction,
            seed=seed,
            max_rows=max_rows,
            listing=folder / "bad_rows.jsonl",
        )
    return targets


def _is_current(path: pathlib.Path, fingerprint: str) -> bool:
    """Whether an undamaged cache with that fingerprint stands at ``path``."""
    try:
        cache = TokenizedCache(path)
    except (FileNotFoundError, ValueError):
        return False
    return cache.fingerprint == fingerprint and not _lacks_formats(cache)


def _lacks_formats(cache: TokenizedCache) -> bool:
    """Whether rows were skipped that are read by now: messages, implicit prompts."""
    skipped = cache.summary.get("source", {}).get("rejected_by_problem", {})
    known = dict(cache.source or {}).get("formats", 0)
    return known < FORMATS and not _READ_BY_NOW.isdisjoint(skipped)


def _already_prepared(
    data: str, schema: str, vocabulary: Vocabulary | None, template: str | None
) -> dict[str, pathlib.Path]:
    """The caches in the folder ``data``; empty when it is no prepared folder.

    One in a bucket is copied here: rows are read in any order, over and over.
    """
    folder = pathlib.Path(data).expanduser()
    if remote.is_remote(data) and remote.holds(data, "cache.json", "train/cache.json"):
        folder = remote.copy_folder(data)
    found = {n: folder / n for n in SPLITS if (folder / n / "cache.json").is_file()}
    if (folder / "cache.json").is_file():
        found = {"train": folder}
    if folder.is_dir() and not found and not sources.in_folder(folder):
        raise FileNotFoundError(
            f"The folder {data} holds no cache.json (nor train/cache.json) and no data "
            "files: name one that does, or a data file."
        )
    for path in found.values():
        cache = TokenizedCache(path)
        if cache.schema != schema:
            raise ValueError(
                f"{path} was prepared for the schema {cache.schema!r}, and {schema!r} "
                "is asked for: prepare its source again."
            )
        theirs = cache.vocabulary_fingerprint
        if vocabulary is not None and vocabulary.fingerprint != theirs:
            raise ValueError(
                f"{path} was prepared with {cache.vocabulary!r}, and {vocabulary!r} "
                "is asked for: set VOCABULARY to the former or prepare its source "
                "again."
            )
        source = dict(cache.source or {})
        if too_long.is_chat(cache) and template not in (
            None,
            source.get("chat_template"),
        ):
            raise ValueError(
                f"{path} was prepared with another CHAT_TEMPLATE: leave it out, or "
                "prepare its source again."
            )
    return found
