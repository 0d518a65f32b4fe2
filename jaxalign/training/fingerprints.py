"""Fingerprints: SHA-256 of parameters and of files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.files import file_sha256

_FILES_AT_A_TIME = 8  # hashing runs without Python's lock


def leaf_names(tree: Any) -> dict[str, Any]:
    """The leaves of a nested dict by ``/``-joined name, in name order."""
    named = {
        "/".join(str(getattr(k, "key", k)) for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return dict(sorted(named.items()))


def on_host(leaf: Any) -> np.ndarray:
    """A whole array on this host; of one over several processes, all must ask."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _bytes(leaf: Any) -> np.ndarray:
    return np.ascontiguousarray(on_host(leaf)).reshape(-1).view(np.uint8)


def params_fingerprint(params: Any) -> str:
    """SHA-256 over the parameter leaves' names and bytes, in name order.

    Little-endian, C order, gathered over processes leaf by leaf: the same parameters
    give the same fingerprint however they were sharded.
    """
    digest = hashlib.sha256()
    for name, leaf in leaf_names(params).items():
        _update(digest, name, _bytes(leaf))
    return digest.hexdigest()


def fingerprints(networks: dict[str, Any], trained: Iterable[str]) -> dict[str, Any]:
    """`params_fingerprint` of each network, and of all trained ones, in one pass.

    Args:
      networks: ``{name: parameters}``.
      trained: names of those that training changes.

    Returns:
      ``{"params_fingerprint": ..., "networks": {name: ...}}``.
    """
    trained = set(trained)
    everything, own = hashlib.sha256(), {name: hashlib.sha256() for name in networks}
    with ThreadPoolExecutor(1) as beside:
        for name, leaf in leaf_names(networks).items():
            network, _, rest = name.partition("/")
            content = _bytes(leaf)
            done = beside.submit(_update, own[network], rest, content)
            if network in trained:
                _update(everything, name, content)
            done.result()
    return {
        "params_fingerprint": everything.hexdigest(),
        "networks": {name: digest.hexdigest() for name, digest in own.items()},
    }


def of_network(about: Mapping[str, Any], held: str) -> str:
    """The fingerprint of a network, of which a checkpoint may hold an adapter alone.

    Args:
      about: what the checkpoint says of it.
      held: the fingerprint of the parameters that it holds.
    """
    if "adapter" not in about:
        return held
    base = about.get("base", {}).get("fingerprint")
    told = json.dumps([about["adapter"], base, held], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _update(digest: Any, name: str, content: np.ndarray) -> None:
    digest.update(name.encode())
    digest.update(content)


def files_sha256(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of some files of a folder, by name; several at a time.

    Raises:
      OSError: where one of them cannot be read.
    """
    names = list(names)
    with ThreadPoolExecutor(min(_FILES_AT_A_TIME, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: file_sha256(folder / name), names)
        return dict(zip(names, digests, strict=True))
