"""The reference policy's log-probabilities: computed once, kept on disk, keyed.

The key names everything the numbers depend on. A cache whose key differs is refused
with the entry that differs; training never loads the reference while its cache is
there.
"""

from __future__ import annotations

import dataclasses
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
from tqdm import tqdm

from jaxalign.batch import REFERENCE_FIELDS
from jaxalign.data import Feed
from jaxalign.objectives import Objective, reference_columns
from jaxalign.training import distributed
from jaxalign.training import mesh as meshes

_log = logging.getLogger(__name__)


def cache_key(
    objective: Objective, policy_fingerprint: str, feed: Feed
) -> dict[str, Any]:
    """Everything that reference log-probabilities depend on, by name."""
    key = {
        "data": [cache.fingerprint for cache in feed.caches],
        # Lengths, truncation, and which prompt each response is mismatched with.
        "plan": [plan.fingerprint for plan in feed.plans],
        "vocabulary": feed.caches[0].vocabulary.fingerprint,
        "reference": policy_fingerprint,
        "model": dataclasses.asdict(objective.model.config),
        "columns": _columns(objective),
        "jax": jax.__version__,
    }
    return json.loads(json.dumps(key))  # as it comes back from disk: lists, no tuples


def _columns(objective: Objective) -> list[str]:
    return [name for name in REFERENCE_FIELDS if name in objective.columns]


def folder_for(cache_dir: str | Path, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir) / "reference" / digest[:16]


def read(folder: Path, key: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Reads a cache; None if there is none.

    Raises:
      ValueError: naming each entry of the key that differs.
    """
    if not (folder / "key.json").exists():
        return None
    saved = json.loads((folder / "key.json").read_text())
    differing = sorted(
        name for name in {*key, *saved} if key.get(name) != saved.get(name)
    )
    if differing:
        lines = [f"{n}: cached {saved.get(n)!r}, now {key.get(n)!r}" for n in differing]
        raise ValueError(
            f"The reference cache {folder} was made for something else; delete it to "
            "have it made again. " + "; ".join(lines)
        )
    return {name: np.load(folder / f"{name}.npy") for name in key["columns"]}


def write(folder: Path, key: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
    """Writes a cache whole or not at all."""
    temporary = folder.with_name(
        f"{folder.name}.tmp-{jax.process_index()}-{os.getpid()}"
    )
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, values in columns.items():
        np.save(temporary / f"{name}.npy", values)
    (temporary / "key.json").write_text(json.dumps(key, indent=2, sort_keys=True))
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


def compute(
    objective: Objective, params: Any, feed: Feed, mesh: jax.sharding.Mesh
) -> dict[str, np.ndarray]:
    """Scores every response of a feed once.

    Returns:
      Float32 arrays over the feed's flat response ids, one per column.
    """
    score = score_step(objective, mesh)
    columns = {
        name: np.full(feed.num_responses, np.nan, np.float32)
        for name in _columns(objective)
    }
    batches = feed.evaluation_batches()
    rows = meshes.process_rows(mesh, feed.batch_size)
    for batch, ids in tqdm(
        batches.with_response_ids(),
        "reference log-probabilities",
        total=len(batches),
        disable=None,
        leave=False,
    ):
        local = {name: array[rows] for name, array in batch.items()}
        placed = meshes.put_batch(mesh, local, feed.batch_size)
        scored = jax.device_get(score(params, placed))
        for name, column in columns.items():
            column[ids[ids >= 0]] = scored[name][ids >= 0]
    return columns


def join(
    feed: Feed,
    *,
    objective: Objective,
    policy_fingerprint: str,
    load_params: Callable[[], Any],
    cache_dir: str | Path,
    mesh: jax.sharding.Mesh,
) -> Feed:
    """The feed with the reference columns an objective needs, read or computed now.

    Args:
      feed: the feed whose responses are to be scored.
      objective: says which columns it needs.
      policy_fingerprint: of the reference policy's parameters.
      load_params: loads those parameters; called only if the cache is missing.
      cache_dir: where caches live.
      mesh: the device mesh.
    """
    key = cache_key(objective, policy_fingerprint, feed)
    folder = folder_for(cache_dir, key)
    columns = read(folder, key)
    # Processes read at slightly different times, perhaps from different disks; all
    # have to take the same way from here.
    if not distributed.all_agree(columns is not None):
        mine = columns is None
        columns = compute(objective, load_params(), feed, mesh)
        if mine:
            write(folder, key, columns)
    else:
        _log.info("Reference log-probabilities read from %s", folder)
    return feed.with_columns({k: feed.split_column(v) for k, v in columns.items()})
