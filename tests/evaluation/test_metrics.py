"""Text metrics by hand, and the rules of seqio for calling them."""

from __future__ import annotations

import functools
import math
import sys

import numpy as np
import pytest
import rouge_score.tokenizers

from jaxalign.evaluation import metrics


def test_exact_match_takes_any_reference():
    targets = ["four", ["4", "four"], "five", ["six"]]
    found = metrics.exact_match(targets, ["four\n", "4", "Five", "7"])
    assert found == {"exact_match": 50.0}


def test_sequence_accuracy_of_ids_and_texts():
    targets = [[1, 2], np.array([3]), [4, 5]]
    found = metrics.sequence_accuracy(targets, [np.array([1, 2]), [3, 3], [4, 6]])
    np.testing.assert_allclose(found["sequence_accuracy"], 100 / 3)
    assert metrics.sequence_accuracy(["a  b"], ["a b"]) == {"sequence_accuracy": 100.0}


def test_token_accuracy_counts_positions_of_the_longer():
    # 2 of 3 positions; 1 of 2 (one missing); 1 of 3 (two too many).
    targets, predictions = [[1, 2, 3], [4, 5], [6]], [[1, 9, 3], [4], [6, 6, 6]]
    found = metrics.token_accuracy(targets, predictions)
    np.testing.assert_allclose(found["token_accuracy"], 100 * 4 / 8)
    assert metrics.token_accuracy([[]], [[]]) == {"token_accuracy": 0.0}


def test_bleu_by_hand():
    # Matches of n-grams: 5/6, 3/5, 1/4, 0/3; brevity 1. The zero is smoothed by
    # halving 1/3 (sacrebleu's "exp"), as the definition of method 3 says.
    found = metrics.bleu(["the cat sat on the mat"], ["the cat sat in the mat"])
    expected = 100 * math.exp(
        (math.log(5 / 6) + math.log(3 / 5) + math.log(1 / 4) + math.log(1 / 6)) / 4
    )
    np.testing.assert_allclose(found["bleu"], expected, rtol=1e-9)


def test_bleu_with_several_references():
    targets = [["a b c d e", "v w x y z"], "k l m n"]
    assert metrics.bleu(targets, ["v w x y z", "k l m n"])["bleu"] > 99.999


def test_rouge_by_hand():
    # Unigrams: 3 of 4 predicted, 3 of 5 in the reference: F = 2/3. Bigrams: "the cat"
    # of 3 and 4: F = 2/7. Longest common subsequence "the cat mat": F = 2/3.
    found = metrics.rouge(["the cat saw a mat"], ["the cat by mat"])
    assert set(found) == {"rouge1", "rouge2", "rougeLsum"}
    np.testing.assert_allclose(found["rouge1"], 100 * 2 / 3)
    np.testing.assert_allclose(found["rouge2"], 100 * 2 / 7)
    np.testing.assert_allclose(found["rougeLsum"], 100 * 2 / 3)
    best = metrics.rouge([["x y", "the cat by mat"]], ["the cat by mat"])
    np.testing.assert_allclose(list(best.values()), 100.0)


@pytest.mark.parametrize(
    "text",
    [
        "Привет, мир", "東京へ行く", "नमस्ते दुनिया", "สวัสดีชาวโลก", "안녕 세상",
        "مرحبا بالعالم", "Γειά σου", "naïve Zoë",
    ],
)  # fmt: skip
def test_rouge_of_identical_text_is_whole_in_any_script(text, caplog):
    assert set(metrics.rouge([text], [text]).values()) == {100.0}
    assert not caplog.records
    assert metrics.rouge([text], ["0 1 2"])["rouge1"] == 0.0
    metrics.rouge([text], [text], tokenize="ascii")
    assert "letters beyond a to z" in caplog.text


def test_words_of_ascii_text_are_those_of_rouge_score():
    rng = np.random.default_rng(0)
    default = rouge_score.tokenizers.DefaultTokenizer(use_stemmer=False)
    for _ in range(500):
        text = "".join(map(chr, rng.integers(0, 128, rng.integers(0, 40))))
        assert metrics.words(text) == default.tokenize(text)
    assert metrics.words("นี้ ไป") == ["นี้", "ไ", "ป"]


def test_a_reference_without_words_is_told(caplog):
    assert metrics.rouge(["🙂", "a"], ["🙂", "a"])["rouge1"] == 50.0
    assert "1 of 2 references have no letter or digit" in caplog.text


@pytest.mark.parametrize("metric", ["exact_match", "bleu", "rouge"])
def test_an_empty_list_of_references_is_refused(metric):
    with pytest.raises(ValueError, match="empty list of references"):
        getattr(metrics, metric)(["a", []], ["a", "b"])


@pytest.mark.parametrize(
    "metric, module, package",
    [
        (metrics.bleu, "sacrebleu", "sacrebleu"),
        (metrics.rouge, "rouge_score.rouge_scorer", "rouge-score"),
    ],
)
def test_absent_packages_name_the_extra(metric, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"'{package}'.*jaxalign\[metrics\]"):
        metric(["a"], ["a"])


def test_run_metrics_passes_what_each_asks_for():
    import seqio  # here, and not by all who collect these tests

    def of_scores(targets, scores):
        return {"mean_score": float(np.mean(scores)), "n": len(targets)}

    def of_aux(targets, predictions, aux_values):
        return {"aux": seqio.metrics.Scalar(sum(aux_values["weights"]))}

    def with_option(targets, predictions, *, scale):
        return {"scaled": scale * len(predictions)}

    found = metrics.run_metrics(
        [
            metrics.exact_match,
            of_scores,
            of_aux,
            functools.partial(with_option, scale=3),
            metrics.bleu,
        ],
        ["a b c d", "e"],
        predictions=["a b c d", "e"],
        scores=[-1.0, -3.0],
        aux_values={"weights": [1, 4]},
    )
    assert found.pop("bleu") > 0
    assert found == {
        "exact_match": 100.0,
        "mean_score": -2.0,
        "n": 2,
        "aux": 5,
        "scaled": 6,
    }


def test_metrics_of_a_seqio_task_run_unchanged():
    import seqio

    task = seqio.Task(
        "jaxalign_test_metrics",
        source=seqio.FunctionDataSource(lambda split, shuffle_files: None, ["train"]),
        output_features={"targets": seqio.Feature(seqio.PassThroughVocabulary(4))},
        preprocessors=[],
        metric_fns=[metrics.exact_match, metrics.token_accuracy],
    )
    found = metrics.run_metrics(task.metric_fns, ["a"], predictions=["a"])
    assert found == {"exact_match": 100.0, "token_accuracy": 100.0}


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: metrics.run_metrics([lambda a, b: {}], ["x"], predictions=["x"]),
            r"takes the arguments \('a', 'b'\); expected one of",
        ),
        (
            lambda: metrics.run_metrics([metrics.exact_match], ["x"], scores=[1.0]),
            r"needs \['predictions'\].*pass predictions=",
        ),
        (
            lambda: metrics.run_metrics(
                [metrics.exact_match] * 2, ["x"], predictions=["x"]
            ),
            "Two metrics return 'exact_match'",
        ),
        (lambda: metrics.exact_match(["x"], []), "1 targets and 0 predictions"),
        (lambda: metrics.exact_match([], []), "at least one example"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
