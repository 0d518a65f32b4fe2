"""Rows derived at feed time: other ones each epoch, the same after a resume."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import tiny_run

from jaxalign.data import Feed, augment, memory, pack
from jaxalign.training import identity, reference_cache, run
from jaxalign.vocabularies import ByteVocabulary

VOCABULARY = ByteVocabulary(extra_ids=125)
MASK = 383


def masked(row, rng, share=0.5):
    prompts = [np.where(rng.random(len(p)) < share, MASK, p) for p in row.prompts]
    return dataclasses.replace(row, prompts=prompts)


@dataclasses.dataclass
class Masked:
    share: float

    def __call__(self, row, rng):
        return masked(row, rng, self.share)


def feed_of(function, *, sources=1, seed=0, **settings):
    made = []
    for i in range(sources):
        texts = [f"{i}: this is number {n}" for n in range(10 + i)]
        cache = memory.from_texts(VOCABULARY, texts, texts)
        plan = pack(cache.index, inputs=32, targets=32, packing=None)
        made.append((cache, plan, 1.0 + i))
    return Feed(made, batch_size=5, seed=seed, augment=function, **settings)


def by_row(batch):
    return {
        int(number): tokens.tobytes()
        for (number,), tokens in zip(
            batch["prompt_id"], batch["encoder_input_tokens"], strict=True
        )
    }


def test_a_row_has_another_mask_in_each_epoch_and_seed():
    feed = feed_of(masked)
    epochs = [by_row(feed.batch(2 * e)) | by_row(feed.batch(2 * e + 1)) for e in (0, 1)]
    assert epochs[0].keys() == epochs[1].keys() == set(range(10))
    assert all(epochs[0][i] != epochs[1][i] for i in range(10))
    other = feed_of(masked, seed=1)
    other = by_row(other.batch(0)) | by_row(other.batch(1))
    assert all(epochs[0][i] != other[i] for i in range(10))
    # The whole of every row is the same text with masks.
    plain = by_row(feed_of(None).batch(0))
    for number, tokens in plain.items():
        was, now = (np.frombuffer(t, np.int32) for t in (tokens, epochs[0][number]))
        assert set(now[now != was]) == {MASK}


def test_epochs_of_a_mixture_are_those_of_each_source():
    feed, seen = feed_of(masked, sources=2), {}
    for step in range(30):
        for number, tokens in by_row(feed.batch(step)).items():
            seen.setdefault(number, []).append(tokens)
    assert len(seen) == 21
    assert all(len(set(masks)) == len(masks) > 3 for masks in seen.values())


def test_a_resumed_run_and_any_cut_get_the_same_rows():
    feed = feed_of(masked)
    whole = [feed.batch(step) for step in range(6)]
    resumed = feed_of(masked).iterate(4)
    parts = [feed_of(masked).iterate(4, slice(*cut)) for cut in ((0, 2), (2, 5))]
    for step in (4, 5):
        of_all, of_parts = next(resumed), [next(part) for part in parts]
        for name, array in whole[step].items():
            np.testing.assert_array_equal(of_all[name], array)
            joined = np.concatenate([part[name] for part in of_parts])
            np.testing.assert_array_equal(joined, array)


def test_evaluation_sees_the_same_masks_always():
    feed = feed_of(masked)
    first, again = (list(feed.evaluation_batches()) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one["prompt_id"], other["prompt_id"])
        np.testing.assert_array_equal(
            one["encoder_input_tokens"], other["encoder_input_tokens"]
        )
    assert (first[0]["encoder_input_tokens"] == MASK).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"prompts": [r.prompts[0][1:]]}, "prompts had .* tokens, now"),
        (lambda r: {"responses": r.responses * 2}, "1 responses|2 responses"),
        (lambda r: {"prompts": [r.prompts[0] + 400]}, "outside the vocabulary"),
    ],
)
def test_a_row_of_another_shape_is_refused(change, message):
    def changed(row, rng):
        return dataclasses.replace(row, **change(row))

    with pytest.raises(ValueError, match=message):
        feed_of(changed).batch(0)


def test_what_is_no_row_is_refused():
    with pytest.raises(ValueError, match="made a dict of row '.*': expected a Row"):
        feed_of(lambda row, rng: {}).batch(0)


def test_the_function_is_part_of_what_the_data_is():
    found = {
        feed_of(function).fingerprint
        for function in (None, masked, functools.partial(masked, share=0.1))
    }
    assert len(found) == 3
    assert feed_of(masked).fingerprint in found
    assert augment.identity(masked).startswith("masked() of ")
    assert augment.identity(Masked(0.1)).startswith("Masked(share=0.1) of ")


def test_a_run_says_what_its_rows_are_made_with(tmp_path):
    data = tiny_run.write_data(tmp_path / "data.jsonl")

    def ready(function, **settings):
        dataset = {"augment": function}
        return run.setup(
            tiny_run.make_run(
                tmp_path / "run", data, tmp_path, dataset=dataset, **settings
            )
        )

    online = {"reference": "online"}
    with pytest.raises(ValueError, match="set REFERENCE='online'"):
        ready(masked)
    plain, other = ready(None, **online), ready(masked, **online)
    assert "augment" not in identity.of(plain, {})
    assert identity.of(other, {})["augment"] == augment.identity(masked)
    keys = [
        reference_cache.cache_key(r.objective, "abc", r.inputs.evaluation)
        for r in (plain, other)
    ]
    assert {k for k in keys[1] if keys[1].get(k) != keys[0].get(k)} == {"augment"}
