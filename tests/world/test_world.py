"""The village: reproducible data, and a judge whose every mark can be derived."""

from __future__ import annotations

import json
import math
import random
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxalign import world
from jaxalign.data import records
from jaxalign.prepare import tasks

HOME = "Where does Ada live?"
FIELDS = {
    "supervised": {"prompt": str, "completion": str},
    "trajectory": {"prompt": str, "completion": str, "reward": float, "label": bool},
    "preference": {"prompt": str, "chosen": str, "rejected": str},
    "rationale": {"prompt": str, "chosen": str, "rejected": str, "rationale": str},
}


def within_interval(successes: int, trials: int, probability: float) -> bool:
    """Whether a count lies within 4 standard deviations of its binomial mean."""
    deviation = math.sqrt(trials * probability * (1 - probability))
    return abs(successes - trials * probability) < 4 * deviation


class TestPrompts:
    def test_splits_are_disjoint_and_cover_everything(self):
        splits = [set(world.prompts(split)) for split in world.SPLITS]
        every = 16 * 4 * 6 * 5 * 3  # villagers, relations, wordings, openings, closings
        assert sum(map(len, splits)) == len(set.union(*splits)) == every
        for split, share in zip(splits, (0.7, 0.1, 0.2), strict=True):
            assert within_interval(len(split), every, share)

    def test_every_fact_and_wording_is_asked_in_training(self):
        asked = {world.parse(prompt) for prompt in world.prompts("train")}
        assert len(asked) == 16 * 4
        for wordings in world.WORDINGS.values():
            for wording in wordings:
                part = wording.format(name="Ada")
                assert any(part in prompt for prompt in world.prompts("train"))

    def test_are_short_ascii(self):
        texts = [prompt for split in world.SPLITS for prompt in world.prompts(split)]
        assert all(text.isascii() for text in texts)
        assert max(map(len, texts)) <= 48

    def test_sample_repeats_no_prompt_before_the_split_is_exhausted(self):
        size = len(world.prompts("validation"))
        drawn = world.sample_prompts("validation", 2 * size + 5, seed=3)
        assert len(drawn) == 2 * size + 5
        assert set(drawn[:size]) == set(drawn[size : 2 * size])
        assert set(drawn) == set(world.prompts("validation"))
        assert drawn != world.sample_prompts("validation", 2 * size + 5, seed=4)

    def test_unknown_prompt_names_the_nearest(self):
        with pytest.raises(ValueError, match=r"did you mean 'Where does Ada live\?'"):
            world.true_reward("Where does Ada live", "Ada lives at the mill.")

    @pytest.mark.parametrize(
        ("call", "nearest"),
        [
            (lambda: world.prompts("valid"), "validation"),
            (lambda: list(world.rows("preferences", "train", 1)), "preference"),
            (lambda: world.respond(HOME, "chatti", random.Random(0)), "chatty"),
        ],
    )
    def test_unknown_names_list_the_nearest(self, call, nearest):
        with pytest.raises(ValueError, match=f"did you mean {nearest!r}"):
            call()


class TestVillage:
    def test_values_of_different_relations_never_collide(self):
        values = [v for relation in world.STATEMENTS for v in world.values_of(relation)]
        names = [name.lower() for name in world.VILLAGERS]
        assert len(values + names) == len(set(values + names)) == 4 * 8 + 16
        assert len({name[0] for name in names}) == 16

    def test_prompts_of_other_splits_cannot_be_answered_by_their_words(self):
        # The answer must be known: no prompt names a value.
        values = {v for relation in world.STATEMENTS for v in world.values_of(relation)}
        for split in world.SPLITS:
            for prompt in world.prompts(split):
                assert values.isdisjoint(re.findall("[a-z]+", prompt.lower()))


class TestJudge:
    @given(st.text(max_size=80))
    @example("")
    @example("\x00\ufffd \U0001f600 ....")
    @example("mill " * 50)
    @settings(max_examples=200, deadline=None)
    def test_any_text_has_a_reward_in_the_unit_interval(self, response):
        verdict = world.judge(HOME, response)
        for part in (*verdict, verdict.reward):
            assert 0.0 <= part <= 1.0
        assert world.true_reward(HOME, response) == verdict.reward
        assert world.explain(HOME, response).endswith(f"{verdict.reward:.2f}")

    @given(st.text(alphabet="abdehilmntu. !\u00e9", max_size=60))
    @settings(max_examples=200, deadline=None)
    def test_without_a_place_the_reward_is_zero(self, response):
        places = world.values_of("home")
        named = set(re.findall("[a-z]+", response.lower())) & set(places)
        assert (world.true_reward(HOME, response) == 0.0) or named

    @pytest.mark.parametrize(
        ("response", "reward"),
        [
            # (fact, courtesy, brevity, fluency) by hand, next to each
            ("Gladly! Ada lives at the mill.", 1.0),  # 1 1 1 1
            ("gladly ada lives at the MILL", 1.0),  # case and stops do not matter
            ("Ada lives at the mill.", 0.9),  # 1 .5 1 1
            ("The mill.", 0.9),
            ("Bah! Ada lives at the mill.", 0.8),  # 1 0 1 1
            ("Sure! Bah! The mill.", 0.8),  # rudeness outweighs
            ("Sure! Oh, let me see, um, Ada lives at the mill.", 0.8),  # 1 1 0 1
            ("Bah! Oh, let me see, um, Ada lives at the mill.", 0.6),  # 1 0 0 1
            ("Um, um, er, Ada lives at the mill.", 0.7),  # 1 .5 .5 7/8
            ("Sure! Ada lives at the farm.", 0.4),  # 0 1 1 1
            ("Ada lives at the farm.", 0.3),  # 0 .5 1 1
            ("Bah! Ada lives at the farm.", 0.2),  # 0 0 1 1
            ("Bah! Oh, let me see, um, Ada lives at the farm.", 0.0),  # 0 0 0 1
            ("The mill, the farm.", 0.3),  # hedging: 0 .5 1 1
            ("Ben lives at the mill.", 0.3),  # another villager: 0 .5 1 1
            ("Ada the baker lives at the mill.", 0.25),  # too much: 0 .5 .75 1 -> .25
            ("Ada keeps a cat.", 0.0),  # does not answer
            ("Sure!", 0.0),
            ("", 0.0),
            ("Ada livez at the mill.", 0.8 * 0.9),  # 1 .5 1 .8
            ("The mill mill.", 0.9 * 2 / 3),  # a stutter: 1 .5 1 2/3
            ("mill \U0001f600", 0.9 / 2),  # 1 .5 1 .5
        ],
    )
    def test_marks(self, response, reward):
        assert world.true_reward(HOME, response) == pytest.approx(reward, abs=1e-6)

    def test_best_response_is_perfect_everywhere(self):
        for split in world.SPLITS:
            for prompt in world.prompts(split):
                assert world.true_reward(prompt, world.best_response(prompt)) == 1.0

    def test_every_word_of_the_demonstrators_is_known(self):
        for row in world.rows("supervised", "train", 2000):
            assert world.judge(row["prompt"], row["completion"]).fluency == 1.0

    def test_explain_names_the_parts(self):
        say = world.explain
        assert say(HOME, "Sure! Ada lives at the mill.") == "right, polite, brief: 1.00"
        rambling = "Bah! Er, um, oh, so, hmm, Ada lives at the inn."
        assert say(HOME, rambling) == "wrong, rude, long: 0.00"
        assert say(HOME, "At ze mill.") == "right, plain, brief, garbled: 0.60"
        assert say(HOME, "I do not know.") == "no answer: 0.00"


class TestRows:
    @pytest.mark.parametrize("schema", world.SCHEMAS)
    def test_files_are_valid_and_repeatable(self, schema, tmp_path):
        paths = [
            world.write_dataset(
                tmp_path / folder / f"{schema}.jsonl", schema, "train", 300
            )
            for folder in ("a", "b")
        ]
        other = world.write_dataset(tmp_path / "o.jsonl", schema, "train", 300, seed=1)
        assert paths[0].read_bytes() == paths[1].read_bytes() != other.read_bytes()
        longer = [json.dumps(row) for row in world.rows(schema, "train", 310)]
        assert longer[:300] == paths[0].read_text().splitlines()
        assert [p.name for p in paths[0].parent.iterdir()] == [f"{schema}.jsonl"]
        lines = paths[0].read_text().splitlines()
        assert len(lines) == 300
        for line in lines:
            row = json.loads(line)
            assert {name: type(value) for name, value in row.items()} == FIELDS[schema]
            assert all(value for value in row.values() if isinstance(value, str))
            assert world.split_of(row["prompt"]) == "train"
            if schema == "trajectory":
                assert math.isfinite(row["reward"])

    @pytest.mark.parametrize("schema", world.SCHEMAS)
    def test_task_gives_the_same_rows_and_they_pass_the_checks(self, schema):
        task = tasks.get_task("world")
        expected = list(world.rows(schema, "validation"))
        raw = [("world", i, row) for i, row in enumerate(task.source("validation"))]
        found = records.examples(raw, schema, transform=task.transform(schema))
        got = [record for example in found for record in example.records]
        assert len(got) == len(expected) == world.SIZES["validation"]
        for record, row in zip(got, expected, strict=True):
            assert {name: record[name] for name in row} == row

    @pytest.mark.parametrize("schema", world.SCHEMAS)
    def test_responses_are_short_ascii(self, schema):
        for row in world.rows(schema, "test", 1000):
            for name in ("completion", "chosen", "rejected"):
                text = row.get(name, "x")
                assert text.isascii() and 0 < len(text) < 56

    def test_demonstrators_slip_at_their_stated_rates(self):
        trials = 3000
        for name, habits in world.DEMONSTRATORS.items():
            rng = random.Random(name)
            verdicts = np.array(
                [
                    world.judge(prompt, world.respond(prompt, name, rng))
                    for prompt in world.sample_prompts("train", trials)
                ]
            )
            assert within_interval((verdicts[:, 0] == 0).sum(), trials, habits.error)
            assert within_interval((verdicts[:, 1] == 1).sum(), trials, habits.polite)
            assert within_interval((verdicts[:, 1] == 0).sum(), trials, habits.rude)
            assert within_interval((verdicts[:, 2] < 1).sum(), trials, habits.ramble)

    def test_preferences_are_flipped_at_the_stated_rate(self):
        trials = 3000
        flips = 0
        for row in world.rows("preference", "train", trials):
            chosen, rejected = (
                world.true_reward(row["prompt"], row[name])
                for name in ("chosen", "rejected")
            )
            assert chosen != rejected
            flips += chosen < rejected
        assert within_interval(flips, trials, 0.1)

    def test_thumbs_are_flipped_at_the_stated_rate_and_balanced(self):
        trials = 3000
        rows = list(world.rows("trajectory", "train", trials))
        flips = sum(
            row["label"] != (world.true_reward(row["prompt"], row["completion"]) > 0.65)
            for row in rows
        )
        assert within_interval(flips, trials, 0.1)
        assert 0.4 < np.mean([row["label"] for row in rows]) < 0.65

    def test_scalar_rewards_are_true_rewards_with_gaussian_noise(self):
        trials = 3000
        errors = [
            row["reward"] - world.true_reward(row["prompt"], row["completion"])
            for row in world.rows("trajectory", "train", trials)
        ]
        assert abs(np.mean(errors)) < 4 * 0.1 / math.sqrt(trials)
        # The standard deviation of a Gaussian's sample deviation is s / sqrt(2n).
        assert abs(np.std(errors) - 0.1) < 4 * 0.1 / math.sqrt(2 * trials)

    def test_rationales_say_what_the_judge_says(self):
        terms = {
            "fact": ("right", "wrong"),
            "courtesy": ("kinder", "less kind"),
            "brevity": ("shorter", "longer"),
        }
        for row in world.rows("rationale", "train", 500):
            prompt, text = row["prompt"], row["rationale"]
            better = world.judge(prompt, row["chosen"])
            worse = world.judge(prompt, row["rejected"])
            assert better.reward > worse.reward  # never flipped
            gains, _, losses = text.split(".")[0].partition(", though ")
            for part, (gain, loss) in terms.items():
                gap = getattr(better, part) - getattr(worse, part)
                assert (gain in gains) == (gap > 0)
                assert (loss in losses) == (gap < 0)
            assert text.endswith(world.statement(world.parse(prompt)))
            assert len(text) < 128
