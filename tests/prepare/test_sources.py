"""Parquet, TFRecord and TFDS give the rows that JSON Lines gives.

TensorFlow is imported by the tests, not with them: collecting them is not to wait.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxalign import prepare
from jaxalign.data.cache import TokenizedCache
from jaxalign.prepare import sources
from jaxalign.prepare.tasks import as_rows
from jaxalign.vocabularies import ByteVocabulary

ROWS = [
    {"prompt": "naïve\n🎉", "completion": "c0", "reward": 0.5},
    {"prompt": "p1", "completion": "c1", "reward": -1.5},
]


def prepared(tmp_path, data, schema="trajectory", **options):
    paths = prepare.prepare(
        str(data),
        schema=schema,
        vocabulary=ByteVocabulary(),
        cache_dir=tmp_path / "caches",
        **options,
    )
    return list(TokenizedCache(paths["train"]))


def check(rows, suffix):
    decode = ByteVocabulary().decode
    assert [decode(r.prompts[0]) for r in rows] == [r["prompt"] for r in ROWS]
    assert [decode(r.responses[0]) for r in rows] == ["c0", "c1"]
    assert [r.response_reward for r in rows] == [[0.5], [-1.5]]
    assert [r.key for r in rows] == [f"{suffix}:1", f"{suffix}:2"]


def test_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "r.parquet")
    check(prepared(tmp_path, tmp_path / "r.parquet"), "r.parquet")


def test_parquet_nested_and_null(tmp_path):
    rows = [{"q": "p", "rs": [{"t": "a", "s": 1.0}, {"t": None, "s": 2.0}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    fields = {"prompt": "q", "completion": "rs[].t", "reward": "rs[].s"}
    with pytest.raises(ValueError, match=r"r.parquet:1: completion: .* got null"):
        prepared(tmp_path, tmp_path / "r.parquet", field_map=fields)


def example(row):
    import tensorflow as tf

    def feature(v):
        if isinstance(v, float):
            return tf.train.Feature(float_list=tf.train.FloatList(value=[v]))
        v = v.encode() if isinstance(v, str) else v
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[v]))

    features = tf.train.Features(feature={k: feature(v) for k, v in row.items()})
    return tf.train.Example(features=features).SerializeToString()


def test_tfrecord(tmp_path):
    import tensorflow as tf

    path = tmp_path / "r.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in ROWS:
            writer.write(example(row))
    check(prepared(tmp_path, path), "r.tfrecord")


def test_tfrecord_bad_rows(tmp_path):
    import tensorflow as tf

    path = tmp_path / "r.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(b"\xff no example")
        writer.write(example(ROWS[0] | {"completion": b"\xff"}))
        writer.write(example(ROWS[0] | {"reward": float("nan")}))
    with pytest.raises(ValueError) as caught:
        prepared(tmp_path, path)
    _, first, second, third, _ = str(caught.value).splitlines()
    assert ":1: row: expected a tf.train.Example" in first
    assert ":2: completion: expected UTF-8 text, got byte 0xff at byte 1" in second
    assert ":3: reward: expected a finite number, got nan" in third


def tiny_builder(folder):
    """A builder of made-up rows, with a list of objects in each."""
    import tensorflow_datasets as tfds

    class TinyTrajectories(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            response = {"text": tfds.features.Text(), "score": np.float32}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "prompt": tfds.features.Text(),
                        "responses": tfds.features.Sequence(response),
                    }
                ),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, row in enumerate(ROWS):
                responses = [{"text": row["completion"], "score": row["reward"]}]
                yield i, {"prompt": row["prompt"], "responses": responses}

    builder = TinyTrajectories(data_dir=folder)
    builder.download_and_prepare()
    return builder


def trajectories(raw):
    return [
        {"prompt": raw["prompt"], "completion": r["text"], "reward": r["score"]}
        for r in as_rows(raw["responses"])
    ]


def test_tfds(tmp_path, monkeypatch):
    found = {"tiny": tiny_builder(tmp_path / "tfds")}
    monkeypatch.setattr("tensorflow_datasets.builder", found.__getitem__)
    rows = prepared(tmp_path, "tfds:tiny", "supervised", field_map=FIELDS)
    assert sorted(r.key for r in rows) == ["tiny:1", "tiny:2"]
    task = prepare.add_task(
        "tiny_task",
        doc="Made up.",
        records={"trajectory": trajectories},
        source="tiny",
    )
    try:
        rows = prepared(tmp_path, "tiny_task")
        found = {ByteVocabulary().decode(r.prompts[0]): r for r in rows}
        assert found["naïve\n🎉"].response_reward == [0.5]
    finally:
        from jaxalign.prepare import tasks

        del tasks._TASKS[task.name]


FIELDS = {"prompt": "prompt", "completion": "responses.text[0]"}


def test_unavailable_builders_say_to_export(monkeypatch):
    def builder(name):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("tensorflow_datasets.builder", builder)
    with pytest.raises(FileNotFoundError, match=r"DATA='ultrafeedback:FILE.jsonl'"):
        sources.find_source("ultrafeedback")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ("ultrafedback", r"did you mean 'ultrafeedback'"),
        ("alpaca_eval", r"say DATA='alpaca_eval:FILE'"),
        ("gsm8k:missing.jsonl", r"No file 'missing.jsonl'"),
        ("{}/rowz.jsonl", r"did you mean 'rows.jsonl'"),
        ("{}/rows.txt", r"of no known kind; expected one of .*'\.jsonl'"),
    ],
)
def test_what_is_not_there(tmp_path, data, match):
    for name in ("rows.jsonl", "rows.txt"):
        (tmp_path / name).write_text(json.dumps(ROWS[0]))
    with pytest.raises((FileNotFoundError, ValueError), match=match):
        sources.find_source(data.format(tmp_path))


def test_keys_tell_files_of_one_name_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    rows = prepared(tmp_path, tmp_path / "*" / "r.jsonl")
    assert [r.key for r in rows] == [f"{tmp_path}/{n}/r.jsonl:1" for n in "ab"]


def test_a_file_that_changes_while_it_is_read_makes_no_cache(tmp_path, monkeypatch):
    data = tmp_path / "r.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    read = sources.read_jsonl

    def slowly(path):
        for line, row in read(path):
            yield line, row
            with open(path, "a") as file:  # whoever writes there is not done
                file.write(json.dumps(ROWS[0]) + "\n" if line == 1 else "")

    monkeypatch.setitem(sources._READERS, ".jsonl", slowly)
    with pytest.raises(ValueError, match=r"r\.jsonl changed while being read"):
        prepared(tmp_path, data)
    assert not list((tmp_path / "caches").rglob("cache.json"))
    monkeypatch.setitem(sources._READERS, ".jsonl", read)
    assert len(prepared(tmp_path, data)) == 3
