"""The reference cache: keyed, refused on any difference, never torn."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_run

from jaxalign.data.items import Items
from jaxalign.training import reference_cache, scoring
from jaxalign.training.run import setup


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    work = tmp_path_factory.mktemp("reference")
    data = tiny_run.write_data(work / "data.jsonl")
    return setup(tiny_run.make_run(work / "run", data, work))


def key_of(ready, fingerprint="abc"):
    return reference_cache.cache_key(ready.objective, fingerprint, ready.inputs.train)


def test_what_is_written_is_read(ready, tmp_path):
    key = key_of(ready)
    folder = reference_cache.folder_for(tmp_path, key)
    assert reference_cache.read(folder, key) is None
    columns = {"response_ref_logps": np.arange(4, dtype=np.float32)}
    reference_cache.write(folder, key, columns)
    found = reference_cache.read(folder, key)
    np.testing.assert_array_equal(found["response_ref_logps"], [0, 1, 2, 3])
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("entry", ["data", "plan", "vocabulary", "reference", "model"])
def test_a_cache_with_another_key_is_refused_by_name(ready, tmp_path, entry):
    key = key_of(ready)
    folder = reference_cache.folder_for(tmp_path, key)
    reference_cache.write(folder, key, {"response_ref_logps": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=f"{entry}: cached .*, now 'other'"):
        reference_cache.read(folder, {**key, entry: "other"})


def test_every_response_is_scored_once_as_the_policy_scores_it(ready):
    import jax

    params = ready.init_state(jax.random.key(0)).params["policy"]
    feed = ready.inputs.train
    columns = reference_cache.compute(ready.objective, params, feed, ready.mesh)
    scored, items = columns["response_ref_logps"], Items(feed, "response_ref_logps")
    assert scored.shape == (items.count,) and np.isfinite(scored).all()
    batch = feed.evaluation_batches()[1]
    ids = items.of(range(feed.batch_size, 2 * feed.batch_size))
    own = jax.jit(lambda p, b: ready.objective.response_logps({"policy": p}, b))(
        params, batch
    )
    np.testing.assert_allclose(scored[ids[ids >= 0]], own[ids >= 0], rtol=1e-5)


def test_another_reference_policy_has_another_cache(ready, tmp_path):
    folders = {
        reference_cache.folder_for(tmp_path, key_of(ready, name)) for name in "ab"
    }
    assert len(folders) == 2


def test_a_damaged_cache_is_refused(ready, tmp_path):
    key = key_of(ready)
    folder = reference_cache.folder_for(tmp_path, key)
    reference_cache.write(folder, key, {"response_ref_logps": np.ones(9, np.float32)})
    path = folder / "response_ref_logps.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="response_ref_logps.npy is not what was"):
        reference_cache.read(folder, key)


@pytest.fixture(scope="module")
def params(ready):
    import jax

    return ready.init_state(jax.random.key(0)).params["policy"]


def test_one_wrong_value_among_those_scored_again_is_found(ready, params):
    feed = ready.inputs.train
    columns = reference_cache.compute(ready.objective, params, feed, ready.mesh)
    columns["response_ref_logps"][7] *= 1.01
    function = reference_cache.scorer(ready.objective)
    with pytest.raises(RuntimeError, match="of response 7 is .* when scored again"):
        scoring.check(feed, function, params, ready.mesh, columns, share=1.0)


def test_a_cache_that_is_read_is_verified_on_demand(ready, params, tmp_path):
    feed = ready.inputs.train
    columns = reference_cache.compute(ready.objective, params, feed, ready.mesh)
    key = key_of(ready)
    wrong = {name: values + 1.0 for name, values in columns.items()}
    reference_cache.write(reference_cache.folder_for(tmp_path, key), key, wrong)
    join = {
        "objective": ready.objective,
        "policy_fingerprint": "abc",
        "load_params": lambda: params,
        "cache_dir": tmp_path,
        "mesh": ready.mesh,
    }
    reference_cache.join(feed, **join)  # trusted: its key and bytes are right
    with pytest.raises(RuntimeError, match="when scored again"):
        reference_cache.join(feed, **join, verify_cached=True)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"sha256": 3}'])
def test_a_damaged_key_is_named(ready, tmp_path, content):
    key = key_of(ready)
    folder = reference_cache.folder_for(tmp_path, key)
    reference_cache.write(folder, key, {"response_ref_logps": np.zeros(1, np.float32)})
    (folder / "key.json").write_text(content)
    with pytest.raises(ValueError, match=r"key\.json is damaged.* delete"):
        reference_cache.read(folder, key)


def test_a_column_that_is_gone_is_named(ready, tmp_path):
    key = key_of(ready)
    folder = reference_cache.folder_for(tmp_path, key)
    reference_cache.write(folder, key, {"response_ref_logps": np.zeros(1, np.float32)})
    (folder / "response_ref_logps.npy").unlink()
    with pytest.raises(ValueError, match=r"response_ref_logps\.npy is not what was"):
        reference_cache.read(folder, key)


def test_a_reference_whose_logits_are_not_finite_is_refused(ready, params):
    import jax

    broken = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(ValueError, match="response_ref_logps of response .* is nan"):
        reference_cache.compute(ready.objective, broken, ready.inputs.train, ready.mesh)
