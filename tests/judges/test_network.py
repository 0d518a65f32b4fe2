"""Networks of a checkpoint as judges, by a tiny one in memory."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny_run

from jaxalign import judges, models
from jaxalign.training import checkpoints
from jaxalign.vocabularies import ByteVocabulary

PROMPTS, RESPONSES = ["say 1", "a longer prompt", "p"], ["one", "", "three of them"]


def loaded(monkeypatch, kind):
    model, vocabulary = kind(tiny_run.CONFIG), ByteVocabulary(extra_ids=125)
    params = models.init_params(model, jax.random.key(0))
    found = checkpoints.Network(model, params, vocabulary, {}, None)
    monkeypatch.setattr(checkpoints, "newest", lambda path, network: found)
    monkeypatch.setattr(checkpoints, "fingerprint", lambda path, network: f"{path}'s")
    meta = {"main": "main", "networks": {"main": models.stored(model)}}
    monkeypatch.setattr(checkpoints, "newest_meta", lambda path: meta)
    return found


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (models.T5, "likelihood:runs/a"),
        (models.T5, "likelihood:runs/a#mean"),
        (models.T5, "token:runs/a#42"),
        (models.ScalarModel, "reward:runs/a"),
    ],
)
def test_a_batch_is_as_one_at_a_time(monkeypatch, kind, name):
    loaded(monkeypatch, kind)
    judge = judges.resolve(name)
    together = judge(PROMPTS, RESPONSES)
    alone = [judge([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert together.dtype == np.float32 and len({*together.tolist()}) == 3


def test_a_log_ratio_is_a_difference_and_a_mean_is_per_token(monkeypatch):
    loaded(monkeypatch, models.T5)
    ratio = judges.resolve("0.1*likelihood:runs/a - 0.1*likelihood:runs/b")
    assert (ratio(PROMPTS, RESPONSES) == 0.0).all()
    total = judges.resolve("likelihood:runs/a")(PROMPTS, RESPONSES)
    mean = judges.resolve("likelihood:runs/a#mean")(PROMPTS, RESPONSES)
    lengths = [len(r) + 1 for r in RESPONSES]
    np.testing.assert_allclose(mean, total / lengths, rtol=1e-5)
    names = ("likelihood:a", "likelihood:b", "likelihood:a#mean", "token:a#1")
    assert len({judges.resolve(n).fingerprint for n in names}) == 4


def test_the_logit_of_a_token_is_the_networks_own(monkeypatch):
    found = loaded(monkeypatch, models.T5)
    (logit,) = judges.resolve("token:runs/a#42")(["p"], ["r"])
    ids = np.array([found.vocabulary.encode("source: p candidate: r")], np.int32)
    ones = np.ones((1, 1, 1), np.int32)

    def first(module):
        encoded = module.encode(ids, np.ones_like(ids))
        start = np.zeros((1, 1, 1), np.int32)
        states = module.decode(encoded, np.ones_like(ids), start, ones, ones)
        return module.logits(states)

    logits = found.model.apply({"params": found.params}, method=first)
    np.testing.assert_allclose(logit, logits[0, 0, 0, 42], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="has 384 tokens, numbered from 0"):
        judges.resolve("token:runs/a#384")(["p"], ["r"])


def test_a_policy_is_no_reward_model(monkeypatch):
    loaded(monkeypatch, models.T5)
    with pytest.raises(ValueError, match="did you mean likelihood:runs/a"):
        judges.resolve("reward:runs/a")(["p"], ["r"])


def test_settings_of_a_token_judge_are_checked():
    for name, says in (
        ("token:runs/a?clip=25,0#1", "clip must be LOW,HIGH"),
        ("token:runs/a?clp=0,25#1", "'clp=0,25'; expected name=value of clip"),
        ("token:runs/a#1,2,3", "names no token"),
        ("token:runs/a#x", "names no token"),
    ):
        with pytest.raises(ValueError, match=says):
            judges.resolve(name)


def test_a_number_that_is_not_finite_is_named_and_never_a_score(monkeypatch):
    found = loaded(monkeypatch, models.RewardModel)
    head = found.params["reward_head"]
    head["bias"] = head["bias"] * np.nan
    with pytest.raises(ValueError, match="of response 0 is nan.*not finite"):
        judges.resolve("reward:runs/a")(["p"], ["r"])


def test_what_reads_both_responses_compares_them_in_either_order(monkeypatch):
    def pairwise(config):
        return models.RewardModel(config, read="pair_mean")

    loaded(monkeypatch, pairwise)
    judge = judges.resolve("reward:runs/a")
    assert judges.is_pairwise(judge)
    a, b = ["one", "two", "same"], ["other", "", "same"]
    found = judge.compare(["p"] * 3, a, b)
    np.testing.assert_allclose(judge.compare(["p"] * 3, b, a), 1 - found, atol=1e-6)
    assert found[2] == 0.5 and 0 < found[0] < 1 and found[0] != 0.5
    preferred, bias = judges.preferences(judge, ["p"] * 3, a, b)
    np.testing.assert_allclose(preferred, found, atol=1e-6)
    assert np.abs(bias).max() < 1e-6
