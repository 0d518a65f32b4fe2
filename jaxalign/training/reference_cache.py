"""The reference policy's log-probabilities: computed once, kept on disk, keyed.

The key names everything the numbers depend on. A cache whose key differs, or whose
bytes do, is refused with the entry that differs; training never loads the reference
while its cache is there. A pass that was killed goes on where it last saved, and
before a cache is written, a random 1 % of the rows is scored again, in other company.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign import batch as batch_lib
from jaxalign.cluster import distributed
from jaxalign.data import Feed, augment
from jaxalign.data.items import Items
from jaxalign.files import file_sha256
from jaxalign.objectives import Objective, reference_columns
from jaxalign.training import scoring

_log = logging.getLogger(__name__)


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
    if feed.augment is not None:
        key["augment"] = [augment.identity(feed.augment), feed.seed]
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


def scorer(objective: Objective) -> scoring.Function:
    """What the pass computes: ``(policy parameters, batch) -> columns``."""
    return _scorer(objective.model, objective.uses_mismatched)


@functools.lru_cache(maxsize=4)  # the same object is compiled once
def _scorer(model: Any, mismatched: bool) -> scoring.Function:
    def columns(params: Any, batch: Any) -> dict[str, jax.Array]:
        return reference_columns(model, params, batch, mismatched=mismatched)

    return columns


def compute(
    objective: Objective,
    params: Any,
    feed: Feed,
    mesh: jax.sharding.Mesh,
    unfinished: Path | None = None,
) -> dict[str, np.ndarray]:
    """Scores every response of a feed (`jaxalign.training.scoring.score`).

    Args:
      objective: says which columns it needs.
      params: the reference policy's.
      feed: the feed whose responses are scored.
      mesh: the device mesh.
      unfinished: where a pass that takes long saves; its name has to hold the key.

    Returns:
      Float32 arrays over the feed's flat response ids, one per column.
    """
    return scoring.score(
        feed,
        scorer(objective),
        params,
        mesh,
        unfinished=unfinished,
        dtype=str(objective.model.config.dtype),
        title="reference log-probabilities",
    )


def verify(
    objective: Objective,
    params: Any,
    feed: Feed,
    mesh: jax.sharding.Mesh,
    columns: dict[str, np.ndarray],
) -> None:
    """Scores a random 1 % of the rows again (`jaxalign.training.scoring.check`)."""
    dtype = str(objective.model.config.dtype)
    scoring.check(feed, scorer(objective), params, mesh, columns, dtype=dtype)


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
    return feed.with_columns({k: Items(feed, k).split(v) for k, v in columns.items()})
