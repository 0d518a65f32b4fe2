"""seqio tasks as sources, and data sets of ours as seqio tasks.

TensorFlow is imported by the tests, not with them: collecting them is not to wait.
"""

import json

import numpy as np
import pytest
import sentencepiece

from jaxalign import batch, prepare
from jaxalign.data.cache import TokenizedCache
from jaxalign.prepare import seqio_tasks
from jaxalign.vocabularies import ByteVocabulary, SentencePieceVocabulary

TEXT = {"inputs": ["a b", "naïve\n🎉", "a b"], "targets": ["x", "yy", "z"]}


@pytest.fixture
def registry():
    """Registrations of one test do not reach the next."""
    import seqio

    yield
    for kind in (seqio.TaskRegistry, seqio.MixtureRegistry):
        for name in list(kind.names()):
            kind.remove(name)


def add(name, columns=TEXT, vocabulary=None, **features):
    import seqio
    import tensorflow as tf

    text = seqio.Feature(vocabulary or seqio.ByteVocabulary(), add_eos=True)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
                columns
            ),
            splits=("train",),
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={k: text for k in columns if k not in features} | features,
        metric_fns=[],
    )
    return name


def prepared(tmp_path, data, schema, vocabulary=None, **options):
    paths = prepare.prepare(
        data, schema=schema, vocabulary=vocabulary, cache_dir=tmp_path / "c", **options
    )
    return TokenizedCache(paths["train"])


def number(dtype):
    import seqio
    import tensorflow as tf

    vocabulary = seqio.PassThroughVocabulary(size=0)
    kind = getattr(tf, dtype)
    return seqio.Feature(vocabulary, add_eos=False, dtype=kind, rank=0)


def test_supervised_task(tmp_path, registry):
    cache = prepared(tmp_path, add("tiny_sft"), "supervised")
    decode = cache.vocabulary.decode
    assert [decode(r.prompts[0]) for r in cache] == TEXT["inputs"]
    assert [decode(r.responses[0]) for r in cache] == TEXT["targets"]
    assert all(r.prompts[0][-1] == 1 == r.responses[0][-1] for r in cache)
    assert [r.key for r in cache] == ["tiny_sft:1", "tiny_sft:2", "tiny_sft:3"]


MODULE = """
import seqio
import tensorflow as tf

text = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
seqio.TaskRegistry.add(
    "of_a_file",
    source=seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
            {"inputs": ["a"], "targets": ["TARGET"]}
        ),
        splits=("train",),
    ),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={"inputs": text, "targets": text},
)
"""


def test_a_task_of_a_file_is_found_and_known_by_its_code(tmp_path, registry):
    import seqio

    file = tmp_path / "my_tasks.py"
    for target in ("x", "y"):
        file.write_text(MODULE.replace("TARGET", target))
        for _ in range(2):  # the file is run once
            cache = prepared(tmp_path, "of_a_file", "supervised", module=str(file))
        assert cache.vocabulary.decode(cache[0].responses[0]) == target
        seqio.TaskRegistry.remove("of_a_file")
    vocabulary = ByteVocabulary()
    with pytest.raises(FileNotFoundError, match="No file, task or seqio task"):
        prepared(tmp_path, "of_a_fill", "supervised", vocabulary, module=str(file))
    with pytest.raises(ValueError, match="no file .*my_task.py. Did you mean"):
        prepared(tmp_path, "x", "supervised", module=str(tmp_path / "my_task.py"))


def test_mixture(tmp_path, registry):
    import seqio

    columns = {"inputs": ["m"] * 3, "targets": ["n"] * 3}
    tasks = [(add("one"), 1), (add("two", columns), 1)]
    seqio.MixtureRegistry.add("both", tasks)
    cache = prepared(tmp_path, "both", "supervised", ByteVocabulary())
    assert {cache.vocabulary.decode(r.prompts[0]) for r in cache} >= {"m", "a b"}


def test_trajectories_and_bad_rows(tmp_path, registry):
    columns = TEXT | {"reward": [1.0, float("nan"), 3.0]}
    name = add("tiny_rl", columns, reward=number("float32"))
    with pytest.raises(ValueError, match="tiny_rl:2: reward: .*got nan"):
        prepared(tmp_path, name, "trajectory")
    cache = prepared(tmp_path, name, "trajectory", on_bad_row="skip")
    assert [r.response_reward for r in cache] == [[1.0], [3.0]]
    assert cache.summary["source"]["rejected_by_problem"] == {"reward: not finite": 1}


def test_labels_and_pairs(tmp_path, registry):
    columns = TEXT | {"label": [0, 1, 1]}
    cache = prepared(
        tmp_path, add("tiny_kto", columns, label=number("int32")), "trajectory"
    )
    assert [r.response_label for r in cache] == [[0], [1], [1]]
    columns = {"inputs": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "b"]}
    name = add("tiny_dpo", columns)
    with pytest.raises(ValueError, match="tiny_dpo:2: rejected: .*the same tokens"):
        prepared(tmp_path, name, "preference")
    (row,) = prepared(tmp_path, name, "preference", on_bad_row="skip")
    assert row.pairs == [(0, 1, 0.0)] and len(row.responses) == 2


def test_errors_name_features_vocabularies_and_splits(tmp_path, registry):
    import seqio

    name = add("tiny_sft")
    with pytest.raises(ValueError, match=r"also needs \['chosen', 'rejected'\]"):
        prepared(tmp_path, name, "preference")
    with pytest.raises(ValueError, match=r"also needs \['reward or label'\]"):
        prepared(tmp_path, name, "trajectory")
    with pytest.raises(
        ValueError, match=r"'rationale' also needs \['chosen', .*targets"
    ):
        prepared(tmp_path, name, "rationale")
    with pytest.raises(ValueError, match=r"has the splits \['train'\], not 'trian'"):
        prepared(tmp_path, name, "supervised", split="trian")
    with pytest.raises(ValueError, match="set VOCABULARY to the former"):
        prepared(tmp_path, name, "supervised", ByteVocabulary(125))
    with pytest.raises(FileNotFoundError, match=r"did you mean 'tiny_sft'"):
        prepared(tmp_path, "tiny_stf", "supervised", ByteVocabulary())
    other = seqio.Feature(seqio.ByteVocabulary(3), add_eos=True)
    with pytest.raises(ValueError, match="different vocabularies"):
        prepared(tmp_path, add("mixed", targets=other), "supervised")


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (
            "preference",
            {"inputs": "Human: hi\n\nAssistant:", "chosen": "a", "rejected": "b"},
        ),
        ("supervised", {"inputs": "Human: hi\n\nAssistant:", "targets": "a"}),
    ],
)
def test_our_data_sets_as_seqio_tasks(tmp_path, registry, schema, expected):
    import seqio

    head = "\n\nHuman: hi\n\nAssistant: "
    file = tmp_path / "hh.jsonl"
    file.write_text(json.dumps({"chosen": head + "a", "rejected": head + "b"}) + "\n")
    name = seqio_tasks.register("hh_rlhf", schema, ByteVocabulary(), data=str(file))
    assert name == f"hh_rlhf_{schema}"
    (found,) = (
        seqio.get_mixture_or_task(name)
        .get_dataset(sequence_length=None, split="train", shuffle=False)
        .as_numpy_iterator()
    )
    decode = ByteVocabulary().decode
    texts = {k: decode(v) for k, v in found.items() if v.ndim}
    assert texts == expected
    assert all(v[-1] == 1 for v in found.values() if v.ndim)
    # And back: the cache from seqio's tokens equals the one from the file.
    through = prepared(tmp_path, name, schema)
    straight = prepared(tmp_path, str(file), schema, ByteVocabulary(), task="hh_rlhf")
    for a, b in zip(through[0].responses, straight[0].responses, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(through[0].prompts[0], straight[0].prompts[0])


def test_trajectories_of_ours_through_seqio(tmp_path, registry):
    raw = {"question": "q", "ground_truth": "1"}
    raw["6b"] = {"solution": "s", "is_correct": True}
    raw["175b"] = {"solution": "t", "is_correct": False}
    file = tmp_path / "solutions.jsonl"
    file.write_text(json.dumps(raw) + "\n")
    name = seqio_tasks.register(
        "gsm8k", "trajectory", ByteVocabulary(), data=str(file), name="tiny"
    )
    rows = list(prepared(tmp_path, name, "trajectory"))
    assert [r.response_label for r in rows] == [[1], [0]]
    assert [r.response_reward for r in rows] == [[1.0], [0.0]]


@pytest.mark.parametrize("folder", ["here", "elsewhere"])
def test_rationales_of_ours_through_seqio(tmp_path, registry, folder):
    """Every pair has a rationale prompt of its own, and either answer may be first.

    Which is drawn from the file's name and line: the same file elsewhere, and the cache
    that is made without seqio, show the same.
    """
    samples = {f"m{i}": {"solution": f"w{i}", "is_correct": False} for i in range(12)}
    raw = {"question": "q", "ground_truth": "because", **samples}
    raw["right"] = {"solution": "s", "is_correct": True}
    file = tmp_path / folder / "solutions.jsonl"
    file.parent.mkdir()
    file.write_text(json.dumps(raw) + "\n")
    name = seqio_tasks.register(
        "gsm8k", "rationale", ByteVocabulary(), data=str(file), name="why"
    )
    rows = list(prepared(tmp_path, name, "rationale"))
    decode = ByteVocabulary().decode
    assert len(rows) == 12
    first = []
    for i, row in enumerate(rows):
        prompt, question = map(decode, row.prompts)
        assert prompt == "q" and f"w{i}" in question and "Response A: " in question
        assert list(map(decode, row.responses)) == ["s", f"w{i}", "because"]
        assert row.response_kind == [batch.ANSWER, batch.ANSWER, batch.RATIONALE]
        assert row.response_prompt == [0, 0, 1] and row.pairs == [(0, 1, 0.0)]
        first.append("Response A: s" in question)
    assert 2 < sum(first) < 10
    options = {"vocabulary": ByteVocabulary(), "task": "gsm8k"}
    (straight,) = prepared(tmp_path, str(file), "rationale", **options)
    assert [decode(p) for p in straight.prompts[1:]] == [
        decode(row.prompts[1]) for row in rows
    ]
    assert first == FIRST


# Drawn once: the same in every folder.
FIRST = [i in (1, 3, 8, 10) for i in range(12)]


def test_escapes_pass_through_seqio(tmp_path, registry):
    corpus = ["The answer is 0 1 2 3 4 5 6 7 8 9 ; x § abcdefghijklmnopqrstuvwyz"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 20),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    vocabulary = SentencePieceVocabulary(str(tmp_path / "m.model"), extra_ids=2)
    file = tmp_path / "g.jsonl"
    file.write_text(json.dumps({"question": "{q}\n", "answer": "a\n#### {2}"}) + "\n")
    seqio_tasks.register("gsm8k", "supervised", vocabulary, data=str(file), name="g")
    cache = prepared(tmp_path, "g", "supervised", vocabulary)
    assert cache.vocabulary == vocabulary
    assert cache[0].prompts[0].tolist() == [*vocabulary.encode("{q}\n"), 1]
    assert cache.vocabulary.decode(cache[0].responses[0]) == "a\n#### {2}"
