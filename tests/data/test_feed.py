"""The feed: batches are a function of (cache, seed, step) and of nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest

from jaxalign import batch as batch_lib
from jaxalign.data import CacheWriter, Feed, Row, TokenizedCache, pack
from jaxalign.data.items import Items
from jaxalign.data.memory import MemoryCache
from jaxalign.vocabularies import ByteVocabulary

NAN = float("nan")


def write_cache(path, count, *, seed=0, rewards=True, vocabulary=None, length=9):
    rng = np.random.default_rng(seed)
    options = dict(
        schema="preference",
        vocabulary=vocabulary or ByteVocabulary(),
        fingerprint=f"{path.name}-{count}-{seed}",
    )
    with CacheWriter(path, **options) as writer:
        for i in range(count):
            text = [
                np.append(rng.integers(3, 259, rng.integers(1, length)), 1)
                for _ in range(3)
            ]
            writer.write(
                Row(
                    key=f"{i}",
                    prompts=text[:1],
                    responses=text[1:],
                    response_prompt=[0, 0],
                    response_kind=[0, 0],
                    response_reward=[i + 0.5 if rewards else NAN, float(i)],
                    response_label=[1, 0],
                    pairs=[(0, 1, 0.0)],
                )
            )
    return TokenizedCache(path)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return {
        "a": write_cache(root / "a", 61),
        "b": write_cache(root / "b", 37, seed=1, length=5),
    }


def plan_of(cache, **options):
    return pack(cache.index, **(dict(inputs=8, targets=8, packing=2) | options))


@pytest.fixture
def source(caches):
    return caches["a"], plan_of(caches["a"]), 1.0


def assert_equal(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batches_depend_on_the_step_alone(source):
    feed = Feed([source], batch_size=4, seed=3)
    ahead = list(itertools.islice(feed.iterate(), 12))
    # In another order, by another object.
    again = Feed([source], batch_size=4, seed=3)
    for step in reversed(range(12)):
        assert_equal(again.batch(step), ahead[step])
    for threads in (0, 3):
        resumed = feed.iterate(start_step=7, threads=threads)
        for step in range(7, 12):
            assert_equal(next(resumed), ahead[step])


def test_processes_read_rows_of_the_same_batch(source):
    feed = Feed([source], batch_size=6, seed=0)
    for step in (0, 5):
        whole = feed.batch(step)
        parts = [feed.batch(step, slice(i, i + 2)) for i in (0, 2, 4)]
        joined = {k: np.concatenate([p[k] for p in parts]) for k in whole}
        assert_equal(joined, whole)
    assert_equal(next(feed.iterate(5, rows=slice(2, 4))), parts[1])


def epoch_of_bins(feed, plan, epoch):
    """Row sets of the bins of one epoch, read off ``prompt_id``, in feed order."""
    steps = range((epoch + 2) * len(plan) // feed.batch_size + 1)
    rows = np.concatenate([feed.batch(s)["prompt_id"] for s in steps])
    rows = rows[epoch * len(plan) : (epoch + 1) * len(plan)]
    return [tuple(r[r >= 0].tolist()) for r in rows]


def test_epochs_hold_every_bin_once_in_a_new_order(source):
    plan = source[1]
    expected = sorted(tuple(b.tolist()) for b in plan.bins)
    feed = Feed([source], batch_size=4, seed=0)
    first, second = (epoch_of_bins(feed, plan, e) for e in (0, 1))
    assert sorted(first) == sorted(second) == expected
    assert first != second
    other = epoch_of_bins(Feed([source], batch_size=4, seed=1), plan, 0)
    assert sorted(other) == expected
    assert other != first and other != second
    unshuffled = Feed([source], batch_size=4, seed=0, shuffle=False)
    for epoch in (0, 1):
        in_order = epoch_of_bins(unshuffled, plan, epoch)
        assert in_order == [tuple(b.tolist()) for b in plan.bins]
    assert feed.steps_per_epoch == -(-len(plan) // 4)


def test_batches_are_what_shapes_says(source):
    feed = Feed([source], batch_size=4)
    batch = feed.batch(0)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (s.shape, s.dtype) for k, s in feed.shapes.items()
    }
    batch_lib.check(batch)
    assert batch["encoder_input_tokens"].shape == (4, 16)
    assert batch["decoder_input_tokens"].shape == (4, 2, 16)
    assert "response_ref_logps" not in batch


@pytest.mark.parametrize("rates", [(1.0, 1.0), (3.0, 1.0), (0.1, 0.9)])
def test_mixtures_give_examples_at_their_rates(caches, rates):
    a, b = caches["a"], caches["b"]
    sources = [
        (a, plan_of(a), rates[0]),
        (b, plan_of(b, packing=4, targets=6), rates[1]),
    ]
    feed = Feed(sources, batch_size=5, seed=2)
    assert feed.shape.encoder_length == 32 and feed.shape.decoder_length == 24
    prompts = np.concatenate([feed.batch(s)["prompt_id"] for s in range(80)])
    # Rows of the second source count on from those of the first.
    from_a = ((prompts >= 0) & (prompts < 61)).sum()
    from_b = (prompts >= 61).sum()
    assert prompts.max() < 61 + 37
    share = from_a / (from_a + from_b)
    assert share == pytest.approx(rates[0] / sum(rates), abs=0.03)
    assert_equal(feed.batch(33), Feed(sources, batch_size=5, seed=2).batch(33))


def test_reference_columns_are_joined_by_response(caches):
    a, b = caches["a"], caches["b"]
    sources = [(a, plan_of(a), 1.0), (b, plan_of(b), 2.0)]
    names = ("response_ref_logps", "response_ref_kl_logps")
    bare = Feed(sources, batch_size=4)
    # The reference pass: every response once, scattered to its flat id.
    items = Items(bare, names[0])
    columns = {name: np.full(items.count, NAN, np.float32) for name in names}
    for i, batch in enumerate(bare.evaluation_batches()):
        ids = items.of(range(4 * i, min(4 * i + 4, bare.num_bins)))
        np.testing.assert_array_equal(ids >= 0, batch["response_mask"] > 0)
        real = ids >= 0
        first_tokens = np.stack(
            [
                [
                    batch["decoder_target_tokens"][i][
                        batch["decoder_segment_ids"][i] == r + 1
                    ].sum()
                    for r in range(ids.shape[1])
                ]
                for i in range(len(ids))
            ]
        ).astype(np.float32)
        assert np.isnan(columns[names[0]][ids[real]]).all()
        columns[names[0]][ids[real]] = first_tokens[real]
        columns[names[1]][ids[real]] = -first_tokens[real]
    assert not np.isnan(columns[names[0]]).any()
    assert columns[names[0]][2 * 61] == b[0].responses[0][:8].sum()
    split = {name: items.split(c) for name, c in columns.items()}
    assert [len(c) for c in split[names[0]]] == [122, 74]
    feed = Feed(sources, batch_size=4, seed=9, columns=split)
    assert set(feed.shapes) - set(bare.shapes) == set(names)
    for step in range(10):
        batch = feed.batch(step)
        sums = np.zeros_like(batch["response_ref_logps"])
        for r in range(sums.shape[1]):
            member = batch["decoder_segment_ids"] == r + 1
            sums[:, r] = (batch["decoder_target_tokens"] * member).sum((1, 2))
        np.testing.assert_array_equal(batch["response_ref_logps"], sums)
        np.testing.assert_array_equal(batch["response_ref_kl_logps"], -sums)


def test_evaluation_covers_everything_once_in_order(source):
    plan = source[1]
    batch_size = next(n for n in (4, 5, 6, 7) if len(plan) % n)
    feed = Feed([source], batch_size=batch_size, seed=5)
    batches = feed.evaluation_batches()
    listed = list(batches)
    assert len(listed) == len(batches) == feed.steps_per_epoch
    prompts = np.concatenate([batch["prompt_id"] for batch in listed])
    found = [r[r >= 0].tolist() for r in prompts]
    empty = len(batches) * batch_size - len(plan)
    assert found == [b.tolist() for b in plan.bins] + [[]] * empty
    assert empty > 0
    last = listed[-1]
    for name in ("prompt_mask", "response_mask", "pair_mask", "decoder_loss_weights"):
        assert not last[name][-empty:].any()
    assert_equal(batches[1], listed[1])
    assert_equal(
        feed.evaluation_batches(slice(0, 2))[1],
        {k: v[:2] for k, v in listed[1].items()},
    )
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_rewards_are_standardised(source):
    cache = source[0]
    stats = cache.reward_stats()
    feed = Feed([source], batch_size=4, reward_stats=stats)
    raw = Feed([source], batch_size=4)
    a, b = feed.batch(1), raw.batch(1)
    expected = (b["response_reward"].astype(np.float64) - stats[0]) / stats[1]
    real = b["response_mask"] > 0
    np.testing.assert_allclose(a["response_reward"][real], expected[real], rtol=1e-5)
    assert not a["response_reward"][~real].any()


def test_fingerprint_covers_what_batches_depend_on(caches):
    a, b = caches["a"], caches["b"]
    one, two = plan_of(a), plan_of(a, packing=3)
    options = dict(batch_size=4, seed=0)
    feeds = [
        Feed([(a, one, 1.0)], **options),
        Feed([(a, two, 1.0)], **options),
        Feed([(b, plan_of(b), 1.0)], **options),
        Feed([(a, one, 1.0)], batch_size=5, seed=0),
        Feed([(a, one, 1.0)], batch_size=4, seed=1),
        Feed([(a, one, 1.0)], **options, shuffle=False),
        Feed([(a, one, 1.0)], **options, reward_stats=(0.0, 1.0)),
        Feed([(a, one, 1.0), (b, plan_of(b), 1.0)], **options),
        Feed([(a, one, 1.0), (b, plan_of(b), 2.0)], **options),
    ]
    assert len({feed.fingerprint for feed in feeds}) == len(feeds)
    same = Feed([(TokenizedCache(a.path), plan_of(a), 1.0)], **options)
    assert same.fingerprint == feeds[0].fingerprint


def test_mistakes_are_named(caches, tmp_path):
    a, b = caches["a"], caches["b"]
    one, other = (a, plan_of(a), 1.0), (b, plan_of(b), 1.0)

    def refused(message, sources=(one,), **options):
        with pytest.raises(ValueError, match=message):
            Feed(list(sources), **(dict(batch_size=4) | options))

    refused("at least one", sources=())
    refused("batch_size must be at least 1, got 0", batch_size=0)
    refused("covers 37 rows with 74 responses, .* has 61", [(a, other[1], 1.0)])
    refused("rate of .* must be positive, got 0", [(a, one[1], 0.0)])
    refused("Unknown column 'ref_logps'; did you mean 'response_ref_logps'",
            columns={"ref_logps": [np.zeros(122)]})  # fmt: skip
    name = "response_ref_logps"
    refused(f"'{name}' has 1 arrays for 2 sources", [one, other],
            columns={name: [np.zeros(122)]})  # fmt: skip
    refused(f"'{name}' is missing for .*expected 74 values, got None", [one, other],
            columns={name: [np.zeros(122), None]})  # fmt: skip
    refused(f"'{name}' is missing .*expected 122 values, got \\(3,\\)",
            columns={name: np.zeros(3)})  # fmt: skip
    gaps = np.zeros(122)
    gaps[5] = NAN
    refused(f"'{name}' lacks 1 of 122 values", columns={name: [gaps]})
    thumbs = write_cache(tmp_path / "thumbs", 10, rewards=False)
    refused("10 of 20 answers .* no reward", [(thumbs, plan_of(thumbs), 1.0)],
            reward_stats=(0.0, 1.0))  # fmt: skip
    refused("deviation 0.0, must be positive", reward_stats=(0.0, 0.0))
    wide = write_cache(tmp_path / "wide", 5, vocabulary=ByteVocabulary(extra_ids=7))
    refused("different vocabularies", [one, (wide, plan_of(wide), 1.0)])
    feed = Feed([one], batch_size=4)
    with pytest.raises(ValueError, match="Steps count from 0, got -1"):
        feed.batch(-1)
    with pytest.raises(ValueError, match="column of 122 values, got 3"):
        Items(feed, "response_score").split(np.zeros(3))


def test_kto_bins_hold_mismatched_prompts(caches):
    cache = caches["a"]
    plan = plan_of(cache, min_prompts=2)
    feed = Feed([(cache, plan, 1.0)], batch_size=4)
    for batch in feed.evaluation_batches():
        real = batch["response_mask"] > 0
        other, own = batch["response_kl_prompt"], batch["response_prompt"]
        lonely = real & (other < 0)
        assert lonely.any(axis=1).sum() <= 1
        assert (other[real & ~lonely] != own[real & ~lonely]).all()
        # The mismatched prompts are the bin's own, each as often as its responses.
        for i in np.flatnonzero(real.any(axis=1) & ~lonely.any(axis=1)):
            assert sorted(other[i][real[i]]) == sorted(own[i][real[i]])


def test_sources_share_one_shape(caches):
    a, b = caches["a"], caches["b"]
    feed = Feed([(a, plan_of(a), 1.0), (b, plan_of(b, packing=3), 1.0)], batch_size=2)
    sizes = [dataclasses.astuple(plan_of(a).shape),
             dataclasses.astuple(plan_of(b, packing=3).shape)]  # fmt: skip
    assert dataclasses.astuple(feed.shape) == tuple(np.max(sizes, axis=0))


def test_data_imports_without_tensorflow():
    code = (
        "import sys; sys.modules.update(dict.fromkeys("
        "['tensorflow', 'seqio', 'tensorflow_datasets'])); import jaxalign.data"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("packing", [None, 3])
def test_rows_without_responses_are_fed(packing):
    """For work on the encoder alone."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 9, 30)
    rows = [
        Row(str(i), [draw.integers(3, 250, n).astype(np.int32)], [], [], [], [], [])
        for i, n in enumerate(lengths)
    ]
    cache = MemoryCache(rows, ByteVocabulary())
    plan = pack(cache.index, inputs=8, targets=4, packing=packing)
    feed = Feed([(cache, plan, 1.0)], batch_size=2)
    batches = list(feed.evaluation_batches())
    ids = np.concatenate([batch["prompt_id"].ravel() for batch in batches])
    assert sorted(ids[ids >= 0]) == list(range(30))
    tokens = np.concatenate([b["encoder_input_tokens"].ravel() for b in batches])
    assert sorted(tokens[tokens > 0]) == sorted(t for r in rows for t in r.prompts[0])
    assert not any(batch["response_mask"].any() for batch in batches)
