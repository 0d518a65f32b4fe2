"""What objectives of reward models equal, computed apart from them, in float64."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from objectives_cases import (
    CONFIG,
    BagOfTokens,
    assert_same_gradients,
    assert_same_metrics,
    get_case,
    make_batch,
    make_rows,
)

from jaxalign import batch as batches
from jaxalign import models, objectives
from jaxalign.objectives.base import Step
from jaxalign.objectives.metrics import summarize

MODEL = BagOfTokens(CONFIG)
BATCH = make_batch(make_rows(), 2)
RNG = np.random.default_rng(5)


class Scored:
    """An objective whose network gives known numbers."""

    def __init__(self, name, monkeypatch, batch=BATCH, **settings):
        self.objective = objectives.OBJECTIVES[name](model=MODEL, **settings)
        self.net = self.objective.networks()["reward"]
        shape = (*batch["response_mask"].shape, self.net.members, len(self.net.weights))
        self.outputs = RNG.normal(size=shape).astype(np.float32)
        self.batch = batch
        monkeypatch.setattr(
            type(self.objective), "outputs", lambda *_: jax.numpy.asarray(self.outputs)
        )

    def value(self, params=None):
        out = self.objective.loss(params, Step(self.batch))
        counts = self.objective.denominators(self.batch)
        total = sum(out.sums[n] / counts[n] for n in out.sums)
        return float(total), summarize([out.metrics])

    def pairs(self):
        """``[pairs, members, attributes]`` of chosen and rejected responses."""
        found = []
        for b, q in np.argwhere(self.batch["pair_mask"] > 0):
            sides = (self.batch[f"pair_{n}"][b, q] for n in ("chosen", "rejected"))
            found.append([self.outputs[b, side] for side in sides])
        return np.array(found, np.float64).swapaxes(0, 1)


def softplus(z):
    return np.logaddexp(0.0, z)


def test_bradley_terry_is_trls_formula(monkeypatch):
    margins = RNG.random(BATCH["pair_mask"].shape).astype(np.float32)
    batch = {**BATCH, "pair_margin": margins}
    case = Scored(
        "BradleyTerry", monkeypatch, batch, centre=0.05, margin_scale=2.0, members=3
    )
    chosen, rejected = case.pairs()
    margin = 2.0 * margins[BATCH["pair_mask"] > 0].astype(np.float64)[:, None, None]
    terms = softplus(-(chosen - rejected - margin))
    expected = terms.mean() + 0.05 * ((chosen + rejected) ** 2).mean()
    found, metrics = case.value()
    assert found == pytest.approx(expected, rel=1e-5)
    assert metrics["loss"] == pytest.approx(terms.mean(), rel=1e-5)
    mean = (chosen - rejected).mean((1, 2))
    # The margin moves the loss, and no accuracy.
    assert metrics["rewards/accuracies"] == pytest.approx((mean > 0).mean())
    spread = (chosen - rejected)[..., 0].std(1)
    assert metrics["rewards/disagreement"] == pytest.approx(spread.mean(), rel=1e-5)


def test_graded_pairs_are_smoothed_and_flipped_one_by_one(monkeypatch):
    shape = BATCH["pair_mask"].shape
    batch = {
        **BATCH,
        "pair_smoothing": (RNG.random(shape) * (RNG.random(shape) < 0.5)).astype("f4"),
        "pair_flip": (RNG.random(shape) < 0.4).astype(np.float32),
        "pair_margin": RNG.normal(size=shape).astype(np.float32),
    }
    case = Scored("BradleyTerry", monkeypatch, batch, graded=True, label_smoothing=0.1)
    assert case.objective.columns == ("pair_smoothing", "pair_flip")
    real = BATCH["pair_mask"] > 0
    alpha, flip, margin = (
        batch[f"pair_{n}"][real].astype(np.float64)
        for n in ("smoothing", "flip", "margin")
    )
    chosen, rejected = (x[:, 0, 0] for x in case.pairs())
    z = (chosen - rejected - margin) * np.where(flip, -1, 1)
    alpha = np.where(alpha > 0, alpha, 0.1)
    expected = (1 - alpha) * softplus(-z) + alpha * softplus(z)
    assert case.value()[0] == pytest.approx(expected.mean(), rel=1e-5)


def test_attributes_learn_from_the_pairs_that_say_something(monkeypatch):
    shape = BATCH["pair_mask"].shape
    told = {n: RNG.integers(-2, 3, shape).astype(np.float32) for n in ("kind", "long")}
    batch = {**BATCH, **{f"pair_{n}": v for n, v in told.items()}}
    case = Scored(
        "BradleyTerry",
        monkeypatch,
        batch,
        attributes={"kind": 1.0, "long": -0.5},
        margin_scale=0.5,
    )
    assert case.objective.columns == ("pair_kind", "pair_long")
    assert batches.COLUMNS["pair_kind"].optional
    real = BATCH["pair_mask"] > 0
    chosen, rejected = (x[:, 0] for x in case.pairs())
    terms, right = [], {}
    for i, name in enumerate(told):
        value = told[name][real].astype(np.float64)
        gap = (chosen - rejected)[:, i]
        known, sign = value != 0, np.sign(value)
        terms.append(softplus(-(sign * gap - 0.5 * np.abs(value)))[known])
        right[name] = (gap * sign > 0)[known].mean()
    found, metrics = case.value()
    assert found == pytest.approx(np.concatenate(terms).mean(), rel=1e-5)
    for name, share in right.items():
        assert metrics[f"rewards/accuracies/{name}"] == pytest.approx(share)


def test_numbers_are_regressed_on_by_every_member(monkeypatch):
    case = Scored("RewardRegression", monkeypatch, members=2)
    assert case.objective.uses_rewards
    real = BATCH["response_mask"] > 0
    gap = case.outputs[real][..., 0] - BATCH["response_reward"][real][:, None]
    found, metrics = case.value()
    assert found == pytest.approx((gap.astype(np.float64) ** 2).mean() / 2, rel=1e-5)
    expected = np.corrcoef(
        case.outputs[real][..., 0].mean(1), BATCH["response_reward"][real]
    )[0, 1]
    assert metrics["rewards/correlation"] == pytest.approx(expected, abs=1e-5)


def test_levels_that_are_none_are_left_out_and_counted(monkeypatch):
    levels = RNG.integers(1, 6, BATCH["response_mask"].shape).astype(np.float32)
    levels[0, 0], levels[1, 0], levels[2, 0] = 0.0, 6.0, 2.5
    batch = {**BATCH, "response_level": levels}
    case = Scored("RewardRegression", monkeypatch, batch, levels=5)
    params = {"reward": models.init_params(case.net, jax.random.key(0))}
    cuts = np.array([-np.inf, -1.5, -0.5, 0.5, 1.5, np.inf])
    real = (BATCH["response_mask"] > 0) & np.isin(levels, [1, 2, 3, 4, 5])
    scores, own = case.outputs[real][:, 0, 0].astype(np.float64), levels[real]
    own = own.astype(int)
    p = 1 / (1 + np.exp(scores - cuts[own])) - 1 / (1 + np.exp(scores - cuts[own - 1]))
    found, metrics = case.value(params)
    assert found == pytest.approx(-np.log(p).mean(), rel=1e-4)
    assert metrics["targets/left_out"] == pytest.approx(3 / real.size, rel=1e-5)


def test_rankings_count_lists_and_leave_ties_out(monkeypatch):
    rows = make_rows(8)
    for i, row in enumerate(rows):
        row.response_reward[:] = [1.0, 1.0] if i % 4 == 0 else [0.5, -0.5]
    batch = make_batch(rows, 2)
    case = Scored("PlackettLuce", monkeypatch, batch, members=2)
    assert float(case.objective.denominators(batch)["votes"]) == 6 * 2
    terms = []
    for b in range(batch["response_mask"].shape[0]):
        for prompt in range(2):
            one, other = np.flatnonzero(batch["response_prompt"][b] == prompt)
            rewards, scores = batch["response_reward"][b], case.outputs[b, :, :, 0]
            if rewards[one] != rewards[other]:
                assert rewards[one] > rewards[other]
                terms.append(
                    softplus(-(scores[one] - scores[other]).astype(np.float64))
                )
    found, metrics = case.value()
    assert found == pytest.approx(np.mean(terms), rel=1e-5)
    assert metrics["loss"] == pytest.approx(found, rel=1e-6)
    tied = {**batch, "response_reward": np.zeros_like(batch["response_reward"])}
    case.batch = tied
    out = case.objective.loss(None, Step(tied))
    assert float(out.sums["votes"]) == 0.0
    assert float(case.objective.denominators(tied)["votes"]) == 0.0


@pytest.mark.slow  # a compiler, four times
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("BradleyTerry", {"members": 3, "member_share": 0.6, "centre": 0.1}),
        ("BradleyTerry", {"read": "joint_mean"}),
        ("BradleyTerry", {"read": "pair_label", "label": 5}),
        ("PlackettLuce", {"members": 3, "member_share": 0.6}),
    ],
    ids=["ensemble", "joint", "pairs", "rankings"],
)
def test_other_heads_are_one_step_however_it_is_cut(name, settings):
    case = get_case(name, BagOfTokens, **settings)
    whole = case.step(make_batch(case.rows, 4))
    cut = case.step(make_batch(case.rows, 2), num_microbatches=4)
    assert_same_gradients(cut[0], whole[0])
    assert_same_metrics(cut[1], whole[1])


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("BradleyTerry", {"member_share": 0.5}, "of a single member: set members"),
        ("BradleyTerry", {"member_share": 0.0}, r"member_share must lie in \(0, 1\]"),
        ("BradleyTerry", {"label_smoothing": 0.5}, r"must lie in \[0, 0.5\)"),
        ("BradleyTerry", {"read": "pair_mean", "centre": 0.1}, "nothing to centre"),
        ("BradleyTerry", {"attributes": {"mask": 1.0}}, "cannot be called 'mask'"),
        ("RewardRegression", {"read": "pair_mean"}, "compares two responses"),
        ("PlackettLuce", {"read": "pair_label"}, "compares two responses"),
    ],
)
def test_what_cannot_be_is_refused(name, settings, says):
    with pytest.raises(ValueError, match=says):
        objectives.OBJECTIVES[name](model=MODEL, **settings)


def test_at_equal_scores_the_loss_is_log_2(monkeypatch):
    case = Scored("BradleyTerry", monkeypatch)
    case.outputs = np.zeros_like(case.outputs)
    found, metrics = case.value()
    assert found == pytest.approx(math.log(2.0), rel=1e-6)
    assert metrics["rewards/accuracies"] == 0.0
