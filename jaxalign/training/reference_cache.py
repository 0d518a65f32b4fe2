"""The reference policy's log-probabilities: computed once, kept on disk, keyed.

The key names everything the numbers depend on. A cache whose key differs, or whose
bytes do, is refused with the entry that differs; training never loads the reference
while its cache is there. A pass that was killed goes on where it last saved, and
before a cache is written, a random 1 % of the rows is scored again, in other company.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxalign import batch as batch_lib
from jaxalign.cluster import distributed
from jaxalign.cluster import mesh as meshes
from jaxalign.data import Feed
from jaxalign.files import file_sha256
from jaxalign.objectives import Objective, reference_columns

_log = logging.getLogger(__name__)

SAVE_SECONDS = 60.0  # between two saves of an unfinished pass
VERIFIED_SHARE = 0.01  # of the rows, at least one batch
# How far a value may lie from its recomputation, relative to ``1 + |value|``: rounding
# that depends on a row's place in its batch, or on how many devices share it.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def cache_key(
    objective: Objective, policy_fingerprint: str, feed: Feed
) -> dict[str, Any]:
    """Everything that reference log-probabilities depend on, by name."""
    key = {
        "format": 2,  # what `write` lays down
        # The rows themselves: how they came to be prepared changes no number.
        "data": [cache.content_fingerprint for cache in feed.caches],
        # Lengths, truncation, and which prompt each response is mismatched with.
        "plan": [plan.fingerprint for plan in feed.plans],
        "vocabulary": feed.caches[0].vocabulary.fingerprint,
        "reference": policy_fingerprint,
        "model": objective.model.config.architecture(),
        "dtype": objective.model.config.dtype,
        "columns": _columns(objective),
        "jax": jax.__version__,
    }
    return json.loads(json.dumps(key))  # as it comes back from disk: lists, no tuples


def _columns(objective: Objective) -> list[str]:
    return list(batch_lib.extra(objective.columns, "pass"))


def folder_for(cache_dir: str | Path, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir) / "reference" / digest[:16]


def read(folder: Path, key: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Reads a cache; None if there is none.

    Raises:
      ValueError: naming each entry of the key that differs, or the column whose bytes
        are not those that were written.
    """
    if not (folder / "key.json").exists():
        return None
    saved, digests = _read_key(folder)
    differing = sorted(
        name for name in {*key, *saved} if key.get(name) != saved.get(name)
    )
    if differing:
        lines = [f"{n}: cached {saved.get(n)!r}, now {key.get(n)!r}" for n in differing]
        raise ValueError(
            f"The reference cache {folder} was made for something else; delete it to "
            "have it made again. " + "; ".join(lines)
        )
    for name in key["columns"]:
        column = folder / f"{name}.npy"
        if not column.is_file() or file_sha256(column) != digests.get(name):
            raise ValueError(
                f"{column} is not what was written there (its SHA-256 differs): "
                f"delete {folder} to have it made again."
            )
    return {name: np.load(folder / f"{name}.npy") for name in key["columns"]}


def _read_key(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The key that a cache was written under, and the SHA-256 of its columns."""
    path = folder / "key.json"
    try:
        saved = json.loads(path.read_bytes())
        return saved, dict(saved.pop("sha256"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged: expected JSON with the cache's key and the SHA-256 "
            f"of its columns; delete {folder} to have it made again."
        ) from error


def write(folder: Path, key: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
    """Writes a cache whole or not at all."""
    temporary = folder.with_name(
        f"{folder.name}.tmp-{jax.process_index()}-{os.getpid()}"
    )
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, values in columns.items():
        np.save(temporary / f"{name}.npy", values)
    digests = {name: file_sha256(temporary / f"{name}.npy") for name in columns}
    saved = {**key, "sha256": digests}
    (temporary / "key.json").write_text(json.dumps(saved, indent=2, sort_keys=True))
    try:
        os.rename(temporary, folder)
    except OSError:  # another process of the same job was first
        shutil.rmtree(temporary, ignore_errors=True)


def score_step(objective: Objective, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """The compiled scoring pass: ``(policy parameters, batch) -> columns``."""

    def score(params: Any, batch: Any) -> dict[str, jax.Array]:
        return reference_columns(
            objective.model, params, batch, mismatched=objective.uses_mismatched
        )

    return jax.jit(
        meshes.with_activation_rules(mesh, score),
        out_shardings=meshes.replicated(mesh),
    )


def _scored(
    score: Callable[..., Any],
    params: Any,
    feed: Feed,
    bins: Iterable[int],
    mesh: jax.sharding.Mesh,
    title: str,
) -> Iterable[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """``(flat response ids, columns)`` of each batch of some bins."""
    batches = feed.evaluation_batches(bins=list(bins))
    rows = meshes.process_rows(mesh, feed.batch_size)
    for batch, ids in tqdm(
        batches.with_response_ids(),
        title,
        total=len(batches),
        disable=None,
        leave=False,
    ):
        local = {name: array[rows] for name, array in batch.items()}
        placed = meshes.put_batch(mesh, local, feed.batch_size)
        scored = jax.device_get(score(params, placed))
        yield ids[ids >= 0], {name: v[ids >= 0] for name, v in scored.items()}


def compute(
    objective: Objective,
    params: Any,
    feed: Feed,
    mesh: jax.sharding.Mesh,
    unfinished: Path | None = None,
) -> dict[str, np.ndarray]:
    """Scores every response of a feed once, and a random 1 % of them again.

    Args:
      objective: says which columns it needs.
      params: the reference policy's.
      feed: the feed whose responses are scored.
      mesh: the device mesh.
      unfinished: a file where a pass that takes long saves what it has, and where it
        looks for what an earlier, killed one left; its name has to hold the key.

    Returns:
      Float32 arrays over the feed's flat response ids, one per column.

    Raises:
      ValueError: when a value is not finite.
      RuntimeError: when a value differs from its recomputation.
    """
    score = score_step(objective, mesh)
    names = _columns(objective)
    done = 0
    columns = {n: np.full(feed.num_responses, np.nan, np.float32) for n in names}
    if unfinished is not None and unfinished.exists():
        columns, done = _read_unfinished(unfinished, columns, feed.num_bins)
    first = distributed.smallest(done)  # what every process has
    if first:
        _log.info("The reference pass goes on after %d of %d", first, feed.num_bins)
    rest = range(first, feed.num_bins)
    last_save = time.monotonic()
    title = "reference log-probabilities"
    for i, (ids, scored) in enumerate(
        _scored(score, params, feed, rest, mesh, title), start=1
    ):
        for name, column in columns.items():
            column[ids] = scored[name]
        if unfinished is not None and time.monotonic() - last_save > SAVE_SECONDS:
            done = min(first + i * feed.batch_size, feed.num_bins)
            _save(unfinished, columns, done)
            last_save = time.monotonic()
    for name, column in columns.items():
        if not np.isfinite(column).all():
            bad = int(np.argmin(np.isfinite(column)))
            raise ValueError(
                f"{name} of response {bad} is {column[bad]}: the reference policy's "
                "logits are not finite. Give another REFERENCE_CHECKPOINT_PATH."
            )
    verify(objective, params, feed, mesh, columns, score)
    return columns


def _read_unfinished(
    path: Path, empty: dict[str, np.ndarray], num_bins: int
) -> tuple[dict[str, np.ndarray], int]:
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
    _log.warning("%s is damaged (%s): the reference pass starts over.", path, problem)
    return empty, 0


def _save(path: Path, columns: dict[str, np.ndarray], done: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another run may be making the same cache: each writes a file of its own.
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(temporary, bins=np.int64(done), **columns)
    os.replace(temporary, path)


def verify(
    objective: Objective,
    params: Any,
    feed: Feed,
    mesh: jax.sharding.Mesh,
    columns: dict[str, np.ndarray],
    score: Callable[..., Any] | None = None,
) -> None:
    """Scores a random 1 % of the rows again, in batches of their own.

    Raises:
      RuntimeError: naming the response and both values, when one differs by more than
        rounding.
    """
    count = min(
        feed.num_bins, max(round(VERIFIED_SHARE * feed.num_bins), feed.batch_size)
    )
    bins = np.random.default_rng(feed.seed).permutation(feed.num_bins)[:count]
    allowed = _TOLERANCE[str(objective.model.config.dtype)]
    score = score or score_step(objective, mesh)  # one that is compiled, if there is
    title = "verifying 1 % of them"
    for ids, scored in _scored(score, params, feed, bins.tolist(), mesh, title):
        for name, again in scored.items():
            cached = columns[name][ids]
            off = np.abs(cached - again) > allowed * (1 + np.abs(again))
            if off.any() or not np.isfinite(cached).all():
                i = int(np.argmax(np.abs(cached - again)))
                raise RuntimeError(
                    f"{name} of response {ids[i]} is {cached[i]:.6g} in the cache and "
                    f"{again[i]:.6g} when scored again ({int(off.sum())} of {len(ids)} "
                    "differ). Delete the cache; if a new one fails too, the device or "
                    "the scoring program is not to be trusted."
                )


def join(
    feed: Feed,
    *,
    objective: Objective,
    policy_fingerprint: str,
    load_params: Callable[[], Any],
    cache_dir: str | Path,
    mesh: jax.sharding.Mesh,
    verify_cached: bool = False,
) -> Feed:
    """The feed with the reference columns an objective needs, read or computed now.

    Args:
      feed: the feed whose responses are to be scored.
      objective: says which columns it needs.
      policy_fingerprint: of the reference policy's parameters.
      load_params: loads those parameters; called only if the cache is missing.
      cache_dir: where caches live.
      mesh: the device mesh.
      verify_cached: load the reference and check 1 % of a cache that is read, too.
    """
    key = cache_key(objective, policy_fingerprint, feed)
    folder = folder_for(cache_dir, key)
    columns = read(folder, key)
    # Processes read at slightly different times, perhaps from different disks; all
    # have to take the same way from here.
    if not distributed.all_agree(columns is not None):
        mine = columns is None
        unfinished = folder.with_name(
            f"{folder.name}.unfinished-{jax.process_index()}.npz"
        )
        columns = compute(objective, load_params(), feed, mesh, unfinished)
        if mine:
            write(folder, key, columns)
        unfinished.unlink(missing_ok=True)
    else:
        _log.info("Reference log-probabilities read from %s", folder)
        if verify_cached:
            verify(objective, load_params(), feed, mesh, columns)
    return feed.with_columns({k: feed.split_column(v) for k, v in columns.items()})
