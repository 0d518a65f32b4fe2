"""One pass: every axis, to the bit after a kill, in any company, over any cut."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from jaxalign import batch as batches
from jaxalign import models
from jaxalign.cluster import mesh as meshes
from jaxalign.data import Feed, Row, memory, pack
from jaxalign.data.items import Items, item_name
from jaxalign.training import scoring
from jaxalign.vocabularies import ByteVocabulary

VOCABULARY = ByteVocabulary(extra_ids=125)
MODEL = models.T5(tiny_run.CONFIG)


def rows(count: int, seed: int) -> list[Row]:
    """Of one or two prompts, one to three responses, and pairs."""
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        length = rng.integers(1, 12)
        return np.append(rng.integers(3, 200, length), 1).astype(np.int32)

    made = []
    for i in range(count):
        prompts, responses = int(rng.integers(1, 3)), int(rng.integers(1, 4))
        made.append(
            Row(
                key=str(i),
                prompts=[ids() for _ in range(prompts)],
                responses=[ids() for _ in range(responses)],
                response_prompt=rng.integers(0, prompts, responses).tolist(),
                response_kind=[0] * responses,
                response_reward=[0.0] * responses,
                response_label=[-1] * responses,
                pairs=[(0, r, 0.0) for r in range(1, responses)],
            )
        )
    return made


@pytest.fixture(scope="module")
def caches():
    counts = ((23, 0), (9, 1))
    return [memory.MemoryCache(rows(n, seed), VOCABULARY) for n, seed in counts]


@pytest.fixture(scope="module")
def feed(caches):
    """Two sources, packed, some texts cut."""
    sources = [
        (c, pack(c.index, inputs=10, targets=10, packing=3, decoder_rows=3), 1.0)
        for c in caches
    ]
    return Feed(sources, batch_size=4)


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def params():
    return models.init_params(MODEL, jax.random.key(0))


def every_axis(params, batch):
    """What can be known without a network."""
    del params
    tokens = batch["decoder_target_tokens"]
    counts = jnp.arange(3, dtype=jnp.float32)
    lengths = batches.response_lengths(batch)
    of_prompt = jnp.sum(
        batch["encoder_segment_ids"][:, :, None]
        == jnp.arange(1, batch["prompt_mask"].shape[1] + 1),
        axis=1,
    )
    return {
        "prompt_length": of_prompt,
        "response_length": lengths,
        "response_vector": lengths[..., None] + counts,
        "pair_difference": jnp.subtract(*batches.select_pairs(lengths, batch)),
        "encoder_token": batch["encoder_input_tokens"],
        "decoder_token": tokens,
        "decoder_vector": tokens[..., None] + counts.astype(jnp.bfloat16),
    }


def test_each_axis_is_numbered_as_its_items_are(feed, caches, mesh):
    found = scoring.score(feed, every_axis, None, mesh)
    every = [row for cache in caches for row in cache]
    prompts = [min(len(p), 10) for row in every for p in row.prompts]
    lengths = [min(len(r), 10) for row in every for r in row.responses]
    assert found["prompt_length"].tolist() == prompts
    assert found["prompt_length"].dtype == np.int32
    assert found["response_length"].tolist() == lengths
    vectors = np.array(lengths)[:, None] + np.arange(3)
    np.testing.assert_array_equal(found["response_vector"], vectors)
    of_row = [[min(len(r), 10) for r in row.responses] for row in every]
    pairs = [
        n[a] - n[b]
        for row, n in zip(every, of_row, strict=True)
        for a, b, _ in row.pairs
    ]
    assert found["pair_difference"].tolist() == pairs
    cut = [[*p[:9], p[-1]] if len(p) > 10 else p for r in every for p in r.prompts]
    assert found["encoder_token"].tolist() == np.concatenate(cut).tolist()
    tokens = np.concatenate([r[:10] for row in every for r in row.responses])
    assert found["decoder_token"].tolist() == tokens.tolist()
    assert found["decoder_vector"].shape == (len(tokens), 3)
    assert found["decoder_vector"].dtype == np.float32


def test_values_are_split_by_source_and_tokens_by_text(feed, caches):
    for name, of_row in (
        ("prompt_x", lambda row: len(row.prompts)),
        ("response_x", lambda row: len(row.responses)),
        ("pair_x", lambda row: len(row.pairs)),
    ):
        items = Items(feed, name)
        parts = items.split(np.arange(items.count))
        assert [len(p) for p in parts] == [sum(map(of_row, c)) for c in caches]
        assert np.concatenate(parts).tolist() == list(range(items.count))
    items = Items(feed, "decoder_x")
    parts = items.split(np.arange(items.count))
    lengths = [[min(len(r), 10) for row in c for r in row.responses] for c in caches]
    assert [[len(v) for v in part] for part in parts] == lengths
    with pytest.raises(ValueError, match=f"{items.count} values, got 3"):
        items.split(np.zeros(3))


@pytest.mark.parametrize(
    ("name", "message"),
    [("responses_x", r"one of \['prompt_'.*Did you mean 'response_'"), ("x", "'x'")],
)
def test_a_name_without_an_axis_is_refused(feed, mesh, name, message):
    with pytest.raises(ValueError, match=message):
        scoring.score(feed, lambda p, b: {name: b["response_mask"]}, None, mesh)


def test_a_column_of_another_shape_is_refused(feed, mesh):
    with pytest.raises(ValueError, match=r"'prompt_x' has shape .*: expected \(4, "):
        scoring.score(feed, lambda p, b: {"prompt_x": b["pair_mask"]}, None, mesh)


def test_a_batch_that_does_not_divide_is_refused(feed):
    with pytest.raises(ValueError, match="BATCH_SIZE=4 rows"):
        scoring.score(feed, every_axis, None, meshes.make_mesh())


def logps(params, batch):
    return models.response_logps(MODEL, params, batch)


def test_a_killed_pass_goes_on_to_the_bit(
    feed, mesh, params, tmp_path, monkeypatch, caplog
):
    """Killed in the third batch; the second pass scores only what is missing."""
    caplog.set_level("INFO", "jaxalign")
    path = tmp_path / "new" / "key.unfinished-0.npz"
    whole = scoring.score(feed, logps, params, mesh)
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0.0)
    real, scored = scoring.meshes.put_batch, []

    def put(*args):
        scored.append(1)
        if len(scored) == 3 and kill:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(scoring.meshes, "put_batch", put)
    kill = True
    with pytest.raises(KeyboardInterrupt):
        scoring.score(feed, logps, params, mesh, unfinished=path, verify=0)
    scored.clear()
    kill = False
    resumed = scoring.score(feed, logps, params, mesh, unfinished=path, verify=0)
    assert len(scored) == len(feed.evaluation_batches()) - 2 > 0
    assert f"going on after 8 of {feed.num_bins} rows" in caplog.text
    assert f"scores: 4 of {feed.num_bins} rows" in caplog.text
    np.testing.assert_array_equal(resumed["response_score"], whole["response_score"])


@pytest.mark.parametrize("damage", ["cut", "flip", "other", "npy", "bins"])
def test_a_damaged_unfinished_pass_starts_over(tmp_path, caplog, damage):
    path = tmp_path / "key.unfinished-0.npz"
    empty = {"response_score": np.zeros(40, np.float32)}
    done = {"response_score": np.arange(40, dtype=np.float32)}
    scoring._save(path, done, 3)
    found, bins = scoring._read_unfinished(path, empty, 5, "scores")
    assert bins == 3
    np.testing.assert_array_equal(found["response_score"], np.arange(40))
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        at = content.index(np.float32(20).tobytes())
        path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    elif damage == "other":
        scoring._save(path, {"response_score": np.zeros(7)}, 3)
    elif damage == "bins":
        scoring._save(path, done, 6)
    else:
        path.write_bytes(b"\x93NUMPY\x01\x00")
    assert scoring._read_unfinished(path, empty, 5, "scores") == (empty, 0)
    assert f"{path} is damaged" in caplog.text and "scores start over" in caplog.text


def test_a_function_is_compiled_once(feed, mesh):
    traced = []

    def function(params, batch):
        traced.append(1)
        return batch["response_mask"] + params

    for value in (1.0, 2.0):
        found = scoring.score(feed, function, value, mesh, verify=1.0)
        np.testing.assert_array_equal(found["response_score"], value + 1)
    assert len(traced) == 1


def test_a_value_that_depends_on_its_company_is_found(feed, mesh):
    def function(params, batch):
        rest = jnp.sum(batch["decoder_target_tokens"], axis=(1, 2))
        return {"prompt_x": batch["prompt_mask"] * jnp.roll(rest, 1)[:, None] / 1e3}

    with pytest.raises(RuntimeError, match="prompt_x of prompt .* when scored again"):
        scoring.score(feed, function, None, mesh, verify=1.0)


def test_a_value_that_is_not_finite_is_named(feed, mesh):
    def function(params, batch):
        tokens = batch["decoder_target_tokens"]
        return {"decoder_x": jnp.where(tokens == 1, jnp.nan, 0.0)[..., None]}

    with pytest.raises(ValueError, match="decoder_x of response token .* is .nan"):
        scoring.score(feed, function, None, mesh)


def test_eight_devices_score_what_one_does(caches, params, mesh):
    source = (caches[0], pack(caches[0].index, inputs=12, targets=12, packing=2), 1.0)
    feed = Feed([source], batch_size=8)
    one = scoring.score(feed, logps, params, mesh)["response_score"]
    eight = scoring.score(feed, logps, params, meshes.make_mesh())["response_score"]
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_texts_are_scored_like_rows(params):
    prompts = [f"say {i}" for i in range(20)]
    responses = ["ab" * (i % 7) for i in range(20)]
    found = scoring.score_texts(
        logps, params, VOCABULARY, prompts, responses, batch_size=4, verify=1.0
    )
    assert found.shape == (20,) and found.dtype == np.float32
    alone = [
        scoring.score_texts(logps, params, VOCABULARY, [p], [r], batch_size=1)[0]
        for p, r in zip(prompts, responses, strict=True)
    ]
    np.testing.assert_allclose(found, alone, rtol=1e-5)


def test_columns_of_texts_lengths_and_nothing(params, caplog):
    def function(params, batch):
        return {
            "response_n": batches.response_lengths(batch),
            "response_v": batch["response_mask"][..., None] * jnp.ones(5),
        }

    arguments = (function, params, VOCABULARY)
    found = scoring.score_texts(
        *arguments, ["a", "b"], ["c" * 9, "d"], lengths={"inputs": 4, "targets": 4}
    )
    assert found["response_n"].tolist() == [4.0, 2.0]
    assert found["response_v"].shape == (2, 5)
    assert "1 of 2 responses were cut" in caplog.text
    assert scoring.score_texts(*arguments, [], []).shape == (0,)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        scoring.score_texts(*arguments, ["a", "b"], ["c"])


def test_a_cache_in_memory_has_what_a_feed_asks_for(caches):
    cache = caches[0]
    assert len(cache) == 23 and cache[3].key == "3" and len(list(cache)) == 23
    same = memory.MemoryCache(rows(23, 0), VOCABULARY)
    assert same.content_fingerprint == cache.content_fingerprint
    assert caches[1].content_fingerprint != cache.content_fingerprint
    with pytest.raises(ValueError, match="No rows"):
        memory.MemoryCache([], VOCABULARY)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        memory.MemoryCache(rows(2, 0), ByteVocabulary.__new__(_Small))
    assert item_name("pair_margin") == "pair"


class _Small(ByteVocabulary):
    vocab_size = 100
