"""Which rows are trained on, which are held out, and which an evaluation sees."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny_run

from jaxalign import models, objectives
from jaxalign import vocabularies as vocabs
from jaxalign.data import TokenizedCache
from jaxalign.training import inputs, reference_cache

VOCABULARY = vocabs.ByteVocabulary(extra_ids=125)
OBJECTIVE = objectives.DPO(model=models.T5(tiny_run.CONFIG))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny_run.write_data(folder / "data.jsonl", count=100)
    tiny_run.write_data(folder / "other.jsonl", count=30)
    return folder


@pytest.fixture(scope="module")
def prepared(work):
    """A prepared folder with both splits."""
    return inputs.prepare(dataset(work), OBJECTIVE, VOCABULARY)["train"][0].path.parent


def dataset(work, **changes):
    settings = {
        "data": str(work / "data.jsonl"),
        "eval_fraction": 0.2,
        "cache_dir": str(work),
        "feature_lengths": {"inputs": 12, "targets": 12},
        **changes,
    }
    return inputs.Dataset(**settings)


def opened(work, **changes):
    found = inputs.prepare(dataset(work, **changes), OBJECTIVE, VOCABULARY)
    return {split: [c.path for c in caches] for split, caches in found.items()}


def prompts(path):
    return {VOCABULARY.decode(row.prompts[0]) for row in TokenizedCache(path)}


def test_no_prompt_held_out_by_one_seed_is_trained_on_by_another(work):
    splits = [opened(work, seed=seed) for seed in (0, 1, 17)]
    assert splits[0] == splits[1] == splits[2]
    train, held = (splits[0][name][0] for name in ("train", "validation"))
    assert not prompts(train) & prompts(held)
    split = TokenizedCache(held).source["split"]
    assert split == {"eval_fraction": 0.2, "seed": 0}
    assert opened(work, split_seed=1)["validation"] != splits[0]["validation"]


def test_the_reference_cache_is_the_same_for_every_seed_and_way_to_the_rows(work):
    """Keyed by the rows: a prepared folder and its source have one cache."""
    keys = []
    for changes in ({}, {"seed": 1}, {"on_bad_row": "skip"}):
        made = inputs.build(dataset(work, **changes), OBJECTIVE, VOCABULARY)
        keys.append(reference_cache.cache_key(OBJECTIVE, "policy", made.train))
    assert keys[0] == keys[1] == keys[2]
    fast = dataclasses.replace(tiny_run.CONFIG, attention="chunked", logits_chunk=4)
    other = dataclasses.replace(OBJECTIVE, model=models.T5(fast))
    assert reference_cache.cache_key(other, "policy", made.train) == keys[0]
    half = dataclasses.replace(tiny_run.CONFIG, dtype="bfloat16")
    other = dataclasses.replace(OBJECTIVE, model=models.T5(half))
    assert reference_cache.cache_key(other, "policy", made.train) != keys[0]


def test_of_a_prepared_folder_an_evaluation_takes_the_held_out_split(work, prepared):
    found = opened(work, data=str(prepared), eval_data=str(prepared))
    assert found == {
        "train": [prepared / "train"],
        "validation": [prepared / "validation"],
    }
    found = opened(work, eval_data=str(prepared / "validation"), data=str(prepared))
    assert found["validation"] == [prepared / "validation"]


def test_other_evaluation_data_replaces_a_prepared_folders_own(work, prepared):
    found = opened(work, data=str(prepared), eval_data=str(work / "other.jsonl"))
    assert found["train"] == [prepared / "train"]
    (held,) = found["validation"]
    assert len(TokenizedCache(held)) == 30
    assert opened(work, data=str(prepared))["validation"] == [prepared / "validation"]


def test_evaluation_on_the_training_rows_is_told(work, prepared, caplog):
    opened(work, data=str(prepared), eval_data=str(prepared / "train"))
    assert "EVAL_DATA is the data that is trained on" in caplog.text


@pytest.mark.parametrize("packing", [None, 2])
def test_a_short_evaluation_sees_all_of_the_data(work, packing):
    """Not the head of the file: its prompts are numbered in order."""
    data = dataset(work, eval_data=str(work / "data.jsonl"), packing=packing)
    made = inputs.build(dataclasses.replace(data, batch_size=5), OBJECTIVE, VOCABULARY)
    feed = made.evaluation
    bins = made.evaluation_bins(4)
    assert len(bins) == 20 == len(set(bins))
    plan = feed.plans[0]
    seen = np.concatenate([plan[i].row_ids for i in bins])
    assert 30 < seen.mean() < 70 and seen.max() > 80
    assert bins == made.evaluation_bins(4)
    assert len(feed.evaluation_batches(bins=bins)) == 4
    assert made.evaluation_bins(None) is None
    assert made.evaluation_bins(1000) is None


def test_a_short_evaluation_of_a_mixture_sees_every_source(work):
    names = {str(work / "data.jsonl"): 1.0, str(work / "other.jsonl"): 1.0}
    data = dataset(work, data=names, eval_fraction=0.5, batch_size=2, packing=None)
    made = inputs.build(data, OBJECTIVE, VOCABULARY)
    first = len(made.evaluation.plans[0])
    bins = made.evaluation_bins(12)
    assert min(bins) < first <= max(bins)


def test_a_mixture_takes_no_validation_of_its_folders_beside_evaluation_data(
    work, prepared
):
    names = {str(prepared): 1.0, str(work / "other.jsonl"): 2.0}
    found = opened(work, data=names, eval_data=str(work / "data.jsonl"))
    assert len(found["train"]) == 2 and len(found["validation"]) == 1
