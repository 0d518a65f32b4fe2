"""Tokenising on Apache Beam: pieces of the files to parts on a shared disk.

The workers do what takes long: they read pieces of the source files, check the rows and
tokenise them. Each piece becomes one part, a file in a temporary folder beside the
cache. The process that asked then reads the parts in order through the writer that
serves without Beam, so that the cache is the same bytes for any number of workers.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
import pickle
import shlex
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence

from jaxalign.data.bad_rows import BadRow
from jaxalign.data.cache_writer import private_folder, remove_stale
from jaxalign.data.records import Example
from jaxalign.prepare import pieces
from jaxalign.prepare.rows import Encoded, Recipe

_Job = tuple[Recipe, list[pieces.Piece]]  # what every worker is told


@contextlib.contextmanager
def encoded(
    recipe: Recipe,
    files: Sequence[pathlib.Path],
    beside: pathlib.Path,
    beam_options: str,
) -> Iterator[Callable[[], Iterator[Example | Encoded | BadRow]]]:
    """Tokenises files on Apache Beam; the parts are there inside the ``with`` block.

    What it yields makes a fresh iterator over the rows, in the order of the files.

    Args:
      files: JSON Lines and Parquet, under these paths on every worker.
      beside: the cache's folder. The parts lie in a hidden folder beside it, on a
        disk that every worker sees, as the same user: nobody else may enter it.
      beam_options: Beam's pipeline options as on a command line; empty for Beam's
        defaults, which is one worker in this process.
    """
    found = list(pieces.cut(files))
    job = recipe, found
    beside = beside.absolute()
    beside.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(beside)
    # What lies there is unpickled: nobody else may put anything into it.
    folder = private_folder(beside)
    try:
        import cloudpickle

        # A new name, as workers keep what they loaded. By value what cannot be
        # imported: functions of a notebook or a script.
        stored = folder / f"job-{uuid.uuid4().hex}"
        stored.write_bytes(cloudpickle.dumps(job))
        _run(str(stored), len(found), beam_options)
        missing = [i for i in range(len(found)) if not _part(folder, i).is_file()]
        if missing:
            raise RuntimeError(
                f"The pipeline ended, but {len(missing)} of {len(found)} parts "
                f"are not in {folder}: expected every worker to see the disk of "
                "CACHE_DIR; put it on one that they share."
            )
        yield lambda: _items(folder, job)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(stored: str, count: int, beam_options: str) -> None:
    """Runs the pipeline to its end."""
    try:
        import apache_beam as beam
    except ImportError as error:
        raise ImportError(
            "beam_options need Apache Beam, which is not installed here: `pip install "
            "'jaxalign[beam]'` brings it. Without beam_options the data is prepared "
            "by this process alone, with the same result."
        ) from error
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    options = PipelineOptions(shlex.split(beam_options))
    standard = options.view_as(StandardOptions)
    if standard.runner in (None, "DirectRunner"):
        # Beam's direct runner first tries to download another runner, Prism, which
        # does not heed --direct_num_workers. This is the one that it falls back to.
        standard.runner = "FnApiRunner"
    with _noticing_dead_workers(), beam.Pipeline(options=options) as pipeline:
        numbers = pipeline | beam.Create(range(count)) | "spread" >> beam.Reshuffle()
        _ = numbers | "encode" >> beam.Map(_encode, stored)


@contextlib.contextmanager
def _noticing_dead_workers() -> Iterator[None]:
    """Raises RuntimeError when a worker process of Beam's direct runner dies.

    The direct runner would wait for it for ever. All it does is to raise in the thread
    that watches the process; from there the thread that waits is interrupted, which
    has to be the main one.
    """
    waiting = threading.current_thread()
    if waiting is not threading.main_thread():
        yield
        return
    deaths: list[BaseException | None] = []
    usual = threading.excepthook

    def hook(thrown: threading.ExceptHookArgs) -> None:
        if thrown.thread is not None and thrown.thread.name == "run_worker":
            deaths.append(thrown.exc_value)
            # A real signal: it also ends a wait for a lock.
            signal.pthread_kill(waiting.ident, signal.SIGINT)
        else:
            usual(thrown)

    threading.excepthook = hook
    try:
        yield
    except KeyboardInterrupt:
        if not deaths:
            raise
        raise RuntimeError(
            "A worker process of the pipeline died, perhaps for want of memory: use "
            "fewer with --direct_num_workers."
        ) from deaths[0]
    finally:
        threading.excepthook = usual


# One job at a time; a worker takes up many of its pieces.
@functools.lru_cache(maxsize=1)
def _load(stored: str) -> _Job:
    return pickle.loads(pathlib.Path(stored).read_bytes())


def _encode(number: int, stored: str) -> None:
    """Writes the part of a piece: its items, the text of what went wrong, then None."""
    recipe, found = _load(stored)
    part = _part(pathlib.Path(stored).parent, number)
    # A runner may try a piece again, or twice at once: each writes its own file, and
    # what gets the part's name is complete.
    own = part.with_name(f"{part.name}.{uuid.uuid4().hex}")
    with own.open("wb") as file:
        try:
            for item in recipe.encode(pieces.rows(found[number])):
                pickle.dump(item, file)
        except Exception as error:
            if isinstance(error, OSError) and error.errno:
                raise  # the machine's fault, not the row's: the runner tries again
            pickle.dump(f"{type(error).__name__}: {error}", file)
        pickle.dump(None, file)
    own.replace(part)


def _part(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"{number:08d}"


def _items(folder: pathlib.Path, job: _Job) -> Iterator[Example | Encoded | BadRow]:
    recipe, found = job
    for number, piece in enumerate(found):
        with _part(folder, number).open("rb") as file:
            # The end is told by a None: a part that was cut short raises EOFError.
            read = iter(functools.partial(pickle.load, file), None)
            for i, item in enumerate(read):
                if not isinstance(item, str):
                    yield item
                    continue
                # Read here what a worker could not, so that the error is raised where
                # and as it is without Beam: after the rows before it, or not at all
                # when max_rows ends earlier.
                rows = recipe.examples(pieces.rows(piece))
                yield from itertools.islice(rows, i, None)
                raise RuntimeError(
                    f"A worker could not prepare {piece}, and this process can. The "
                    f"worker said: {item}. Give the workers the packages and "
                    "files of this machine."
                )
