"""One pass over a feed with any function: ``(params, batch) -> {column: array}``.

The prefix of a column's name says what one of its values belongs to, as in
`jaxalign.batch`: ``prompt_`` a prompt, ``response_`` a response, ``pair_`` a pair,
``encoder_`` a token of a prompt, ``decoder_`` one of a response. Whatever axes follow
those of the batch are kept, so that an embedding is a value too.

A pass that was killed goes on where it last saved, and a random part of the feed is
scored again, in other company, before anything is believed.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxalign.cluster import distributed
from jaxalign.cluster import mesh as meshes
from jaxalign.data import Feed, memory
from jaxalign.data.items import Items, item_name

_log = logging.getLogger(__name__)

Columns = dict[str, np.ndarray]
# What is computed of a batch: columns, or one array ``[B, R]`` alone.
Function = Callable[[Any, Mapping[str, Any]], Any]

SAVE_SECONDS = 60.0  # between two saves of an unfinished pass
VERIFIED_SHARE = 0.01  # of the bins, at least one batch
# How far a value may lie from its recomputation, relative to ``1 + |value|``: rounding
# that depends on a row's place in its batch, or on how many devices share it.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}

# The column of a function that gives one array without a name.
_ALONE = "response_score"


def score(
    feed: Feed,
    function: Function,
    params: Any,
    mesh: jax.sharding.Mesh,
    *,
    unfinished: Path | None = None,
    verify: float = VERIFIED_SHARE,
    dtype: str = "float32",
    title: str = "scores",
) -> Columns:
    """Scores everything in a feed once, and a random part of it again.

    Every process feeds its own rows and gets all results.

    Args:
      feed: what is scored, each of its bins once.
      function: ``(params, batch) -> columns``, pure; compiled once for each function,
        mesh and shape, also over several calls.
      params: given to it.
      mesh: the device mesh.
      unfinished: a file where a pass that takes long saves what it has, and looks for
        what an earlier, killed one left. Its name has to hold all that the numbers
        depend on; whoever keeps the result removes it.
      verify: share of the bins that are scored again; 0 for none.
      dtype: that the function computes in, which says how far rounding goes.
      title: of the progress bar and in the log.

    Returns:
      ``{name: [n, ...]}`` over the feed's `Items` of that name; float32 where the
      function gives any floating-point numbers.

    Raises:
      ValueError: before compilation for a column of another shape than its name says;
        when a value is not finite.
      RuntimeError: when a value differs from its recomputation.
    """
    meshes.check_batch(mesh, feed.batch_size, 1)
    items, columns = _empty(feed, function, params, mesh)
    done = 0
    if unfinished is not None and unfinished.exists():
        columns, done = _read_unfinished(unfinished, columns, feed.num_bins, title)
    first = distributed.smallest(done)  # what every process has
    if first:
        _log.info("%s: going on after %d of %d rows", title, first, feed.num_bins)
    last_save = time.monotonic()
    rest = range(first, feed.num_bins)
    scored = _scored(feed, function, params, mesh, items, rest, title)
    for i, found in enumerate(scored, start=1):
        for name, (ids, values) in found.items():
            _check_finite(title, name, ids, values)
            columns[name][ids] = values
        if time.monotonic() - last_save > SAVE_SECONDS:
            done = min(first + i * feed.batch_size, feed.num_bins)
            if unfinished is not None:
                _save(unfinished, columns, done)
            if jax.process_index() == 0:
                _log.info("%s: %d of %d rows", title, done, feed.num_bins)
            last_save = time.monotonic()
    if verify:
        check(feed, function, params, mesh, columns, share=verify, dtype=dtype)
    return columns


def check(
    feed: Feed,
    function: Function,
    params: Any,
    mesh: jax.sharding.Mesh,
    columns: Columns,
    *,
    share: float = VERIFIED_SHARE,
    dtype: str = "float32",
) -> None:
    """Scores a random part of the bins again, in batches of their own.

    Whole numbers, such as the ids of the most probable tokens, are not compared: where
    two values are nearly equal, rounding decides.

    Raises:
      RuntimeError: naming the item and both values, when one differs by more than
        rounding.
    """
    count = min(feed.num_bins, max(round(share * feed.num_bins), feed.batch_size))
    bins = np.random.default_rng(feed.seed).permutation(feed.num_bins)[:count]
    items = {name: Items(feed, name) for name in columns}
    title = f"scoring {count} of {feed.num_bins} rows again"
    for found in _scored(feed, function, params, mesh, items, bins.tolist(), title):
        for name, (ids, again) in found.items():
            if again.dtype.kind != "f":
                continue
            kept = columns[name][ids]
            error = np.abs(kept - again)
            off = ~(error <= TOLERANCE[dtype] * (1 + np.abs(again)))
            if off.any():
                where = np.unravel_index(np.argmax(np.where(off, error, -1)), off.shape)
                wrong = np.unique(np.nonzero(off)[0]).size
                raise RuntimeError(
                    f"{name} of {item_name(name)} {ids[where[0]]} is "
                    f"{kept[where]:.6g}, and {again[where]:.6g} when scored again "
                    f"({wrong} of {len(ids)} differ). Delete the file that holds it; "
                    "if a new pass fails too, the device or the scoring program is "
                    "not to be trusted."
                )


def score_texts(
    function: Function,
    params: Any,
    vocabulary: Any,
    prompts: Sequence[memory.Text],
    responses: Sequence[memory.Text],
    *,
    lengths: Mapping[str, int] | None = None,
    batch_size: int = 16,
    mesh: jax.sharding.Mesh | None = None,
    verify: float = 0.0,
    **settings: Any,
) -> Any:
    """Scores responses to prompts that are lists of texts.

    Args:
      function: as of `score`; its columns are of responses.
      params: given to it.
      vocabulary: makes ids of the texts.
      prompts: one for each response; lists of ids are taken as they are.
      responses: to them, likewise.
      lengths: ``{"inputs": n, "targets": m}``, the most tokens of a prompt and of a
        response; longer ones are cut, with a warning. None: nothing is cut. Calls with
        the same lengths share a compilation.
      batch_size: encoder rows at a time.
      mesh: the device mesh; None: the first device.
      verify: as of `score`.
      **settings: of `score`.

    Returns:
      ``[n, ...]`` of a function that gives an array, columns of one that gives columns;
      ``[0]`` of no texts.

    Example::

        def logps(params, batch):
            return models.response_logps(model, params, batch)

        score_texts(logps, params, vocabulary, ["2 + 2"], ["4"])  # [1] float32
    """
    if not len(prompts):
        return np.zeros(0, np.float32)
    cache = memory.from_texts(vocabulary, prompts, responses)
    mesh = mesh or meshes.make_mesh(devices=jax.local_devices()[:1])
    feed = memory.feed(cache, lengths=lengths, batch_size=batch_size)
    for what, cut in feed.plans[0].truncated.items():
        if cut:
            _log.warning("%d of %d %s were cut to score them.", cut, len(cache), what)
    columns = score(feed, function, params, mesh, verify=verify, **settings)
    return columns[_ALONE] if list(columns) == [_ALONE] else columns


@functools.lru_cache(maxsize=8)
def compiled(function: Function, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """The function jitted for a mesh: ``(params, batch) -> columns``, replicated."""

    def columns(params: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        found = function(params, batch)
        return dict(found) if isinstance(found, Mapping) else {_ALONE: found}

    return jax.jit(
        meshes.with_activation_rules(mesh, columns),
        out_shardings=meshes.replicated(mesh),
    )


def _empty(
    feed: Feed, function: Function, params: Any, mesh: jax.sharding.Mesh
) -> tuple[dict[str, Items], Columns]:
    """What each column has values for, and arrays to fill."""
    sharding = meshes.batch_sharding(mesh)  # as in the pass, which traces once
    shapes = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        for name, a in feed.shapes.items()
    }
    found = jax.eval_shape(compiled(function, mesh), params, shapes)
    items, columns = {}, {}
    for name, value in found.items():
        items[name] = Items(feed, name)
        expected = (feed.batch_size, *items[name].shape)
        if value.shape[: len(expected)] != expected:
            raise ValueError(
                f"Column {name!r} has shape {value.shape}: expected {expected}, and "
                "whatever axes a value has after these."
            )
        floats = jax.numpy.issubdtype(value.dtype, jax.numpy.floating)
        columns[name] = np.zeros(
            (items[name].count, *value.shape[len(expected) :]),
            np.float32 if floats else value.dtype,
        )
    return items, columns


def _scored(
    feed: Feed,
    function: Function,
    params: Any,
    mesh: jax.sharding.Mesh,
    items: Mapping[str, Items],
    bins: Sequence[int],
    title: str,
) -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """``{column: (items, values)}`` of each batch of some bins."""
    step = compiled(function, mesh)
    rows = meshes.process_rows(mesh, feed.batch_size)
    batches = feed.evaluation_batches(rows, list(bins))
    for i, batch in enumerate(tqdm(batches, title, disable=None, leave=False)):
        placed = meshes.put_batch(mesh, batch, feed.batch_size)
        in_batch = bins[i * feed.batch_size : (i + 1) * feed.batch_size]
        found = {}
        for name, values in jax.device_get(step(params, placed)).items():
            ids = items[name].of(in_batch)
            if jax.numpy.issubdtype(values.dtype, jax.numpy.floating):
                values = values.astype(np.float32)
            found[name] = ids[ids >= 0], values[ids >= 0]
        yield found


def _check_finite(title: str, name: str, ids: np.ndarray, values: np.ndarray) -> None:
    finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    if not finite.all():
        bad = int(np.argmin(finite))
        raise ValueError(
            f"{title}: {name} of {item_name(name)} {ids[bad]} is {values[bad]}: the "
            "network's logits are not finite. The parameters of its checkpoint are "
            "damaged, or overflow in this dtype: give another one."
        )


def _read_unfinished(
    path: Path, empty: Columns, num_bins: int, title: str
) -> tuple[Columns, int]:
    """What a killed pass left; nothing, with a warning, if that is damaged.

    Raises:
      OSError: when it cannot be read.
    """
    try:
        with open(path, "rb") as file, np.load(file) as saved:
            columns = {name: saved[name] for name in empty}
            done = int(saved["bins"])
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - zipfile, zlib and NumPy have their own
        problem = str(error)
    else:
        if 0 <= done <= num_bins and all(
            columns[name].shape == values.shape and columns[name].dtype == values.dtype
            for name, values in empty.items()
        ):
            return columns, done
        problem = "its arrays do not have the shapes of this pass"
    _log.warning("%s is damaged (%s): %s start over.", path, problem, title)
    return empty, 0


def _save(path: Path, columns: Columns, done: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another run may be making the same scores: each writes a file of its own.
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(temporary, bins=np.int64(done), **columns)
    os.replace(temporary, path)
