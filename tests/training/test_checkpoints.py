"""Fingerprints and paths of checkpoints."""

from __future__ import annotations

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.training import checkpoints


def test_fingerprint_is_sha256_over_names_and_bytes_in_name_order():
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    b = np.array([7.0], np.float32)
    digest = hashlib.sha256()
    for name, leaf in (("policy/a", a), ("policy/b/c", b)):
        digest.update(name.encode() + leaf.tobytes())
    tree = {"policy": {"b": {"c": jnp.array(b)}, "a": jnp.array(a)}}
    assert checkpoints.params_fingerprint(tree) == digest.hexdigest()
    tree["policy"]["a"] = jnp.array(a).at[0, 0].set(1e-30)
    assert checkpoints.params_fingerprint(tree) != digest.hexdigest()


def test_the_newest_checkpoint_of_a_run_is_the_largest_step(tmp_path):
    for step in ("9", "10", "10.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / step / "meta").mkdir(parents=True)
    assert checkpoints.resolve(tmp_path).name == "10"
    one = tmp_path / "checkpoints" / "9"
    assert checkpoints.resolve(one) == one


def test_a_folder_without_checkpoints_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a run directory"):
        checkpoints.resolve(tmp_path)
