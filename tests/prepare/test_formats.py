"""Formats from a file to a cache: chats, tables, packed files, folders; identity."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
import tiny_run
import zstandard

from jaxalign import objectives, prepare
from jaxalign.data import TokenizedCache
from jaxalign.data.cache_writer import CacheWriter
from jaxalign.prepare import caches, sources
from jaxalign.training import inputs
from jaxalign.vocabularies import ByteVocabulary

VOCABULARY = ByteVocabulary()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(tmp_path, data, schema="supervised", **options):
    return prepare.prepare(
        str(data),
        schema=schema,
        vocabulary=VOCABULARY,
        cache_dir=tmp_path / "caches",
        **options,
    )


def texts(paths, split="train"):
    return [
        (VOCABULARY.decode(row.prompts[0]), *map(VOCABULARY.decode, row.responses))
        for row in TokenizedCache(paths[split])
    ]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def dialogue(i, turns=2):
    said = [f(f"{name} {i}.{t}") for t in range(turns) for f, name in PARTS]
    return {"messages": said}


PARTS = ((user, "asked"), (assistant, "said"))
PAIRS = [
    {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i * 7}"}
    | {"metadata": {"i": i}}
    for i in range(30)
]


# Identity.


@pytest.mark.parametrize(
    ("schema", "fingerprint", "content"),
    [
        ("preference", "fb6977c387b29e83", "2381e00732a6e01b"),
        ("supervised", "3be27a92fe9182e6", "5360ec6b7025cc8b"),
        ("trajectory", "293a9c1f0c964bb5", "e421da8d9c4eded0"),
    ],
)
def test_rows_of_texts_keep_the_caches_that_they_have(
    tmp_path, schema, fingerprint, content
):
    """As they were before messages, tables and templates were read."""
    data = write(tmp_path / "rows.jsonl", PAIRS)
    cache = TokenizedCache(run(tmp_path, data, schema, eval_fraction=0.2)["train"])
    assert cache.fingerprint.startswith(fingerprint)
    assert cache.content_fingerprint.startswith(content)
    assert "read_as" not in cache.summary["source"] and "formats" not in cache.source


def test_another_template_is_another_cache(tmp_path):
    data = write(tmp_path / "chats.jsonl", [dialogue(i) for i in range(3)])
    own = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    found = [
        run(tmp_path, data, chat_template=t)["train"]
        for t in (None, "turns", "chatml", own, own + "{# 2 #}")
    ]
    assert len(set(found)) == 5
    assert run(tmp_path, data, chat_template=own)["train"] == found[3]
    prompts = [next(iter(texts({"train": path})))[0] for path in found]
    assert prompts[0] == prompts[1] == "User: asked 0.0\n\nAssistant: "
    assert prompts[2].startswith("<|im_start|>user\nasked") and prompts[3] == prompts[4]
    with pytest.raises(ValueError, match="did you mean 'turns'"):
        run(tmp_path, data, chat_template="turn")
    # A prepared folder is used as it is, and not under another name.
    assert run(tmp_path, found[2]) == {"train": found[2]}
    assert run(tmp_path, found[2], chat_template="chatml") == {"train": found[2]}
    with pytest.raises(ValueError, match="prepared with another CHAT_TEMPLATE"):
        run(tmp_path, found[2], chat_template=own)


def test_a_cache_that_skipped_what_is_read_by_now_is_made_again(tmp_path, monkeypatch):
    rows = [dialogue(0), {"prompt": "p", "completion": "c"}, {"prompt": "p"}]
    data = write(tmp_path / "rows.jsonl", rows)

    class Old(CacheWriter):
        """Of a release that read texts alone."""

        def __init__(self, *args, source, **settings):
            source = {k: v for k, v in source.items() if k != "formats"}
            super().__init__(*args, source=source, **settings)

    with monkeypatch.context() as patch:
        patch.setattr("jaxalign.prepare.writing.CacheWriter", Old)
        first = run(tmp_path, data, on_bad_row="skip")["train"]
    before = (first / "cache.json").stat().st_ino
    again = run(tmp_path, data, on_bad_row="skip")["train"]
    assert again == first and (first / "cache.json").stat().st_ino != before
    assert TokenizedCache(again).source["formats"] == caches.FORMATS
    made = (first / "cache.json").stat().st_ino
    run(tmp_path, data, on_bad_row="skip")
    assert (first / "cache.json").stat().st_ino == made


# Chats.


def test_all_of_a_dialogue_goes_to_one_side(tmp_path):
    data = write(tmp_path / "chats.jsonl", [dialogue(i, 3) for i in range(60)])
    paths = run(tmp_path, data, eval_fraction=0.3)
    sides = {
        split: {prompt.split(".")[0] for prompt, _ in texts(paths, split)}
        for split in paths
    }
    assert len(sides["train"]) + len(sides["validation"]) == 60
    assert not sides["train"] & sides["validation"]
    assert 5 < len(sides["validation"]) < 35
    cache = TokenizedCache(paths["train"])
    assert cache.summary["source"]["read_as"] == {"chat": 60, "dialogue": 60}
    keys = [row.key for row in cache][:3]
    assert [key.partition("#")[2] for key in keys] == ["", "1", "2"]
    table = prepare.describe(cache, inputs=30, targets=30)
    assert "chat messages" in table and "60 rows" in table
    assert "at 30, at their start" in table


def test_a_prompt_taken_from_texts_is_told(tmp_path, caplog):
    rows = [{"chosen": f"Say {i}: yes", "rejected": f"Say {i}: no"} for i in range(4)]
    data = write(tmp_path / "pairs.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        paths = run(tmp_path, data, "preference")
    assert "4 rows" in caplog.text and "FIELD_MAP" in caplog.text
    assert texts(paths)[1] == ("Say 1:", " yes", " no")
    assert "prompt from chosen" in prepare.describe(TokenizedCache(paths["train"]))


def test_workers_of_beam_read_the_same_template(tmp_path):
    beam = pytest.importorskip("apache_beam", reason="the extra beam is not installed")
    assert beam
    data = write(tmp_path / "chats.jsonl", [dialogue(i) for i in range(5)])
    plain = texts(run(tmp_path, data, chat_template="chatml"))
    other = prepare.prepare(
        data,
        schema="supervised",
        vocabulary=VOCABULARY,
        cache_dir=tmp_path / "beam",
        chat_template="chatml",
        beam_options="",
    )
    assert texts(other) == plain


# Tables, packed files and folders.


def test_a_table_is_the_rows_of_its_json(tmp_path):
    rows = [("p, 1", 'say "no"\nagain', 0.5), ("p2", "c", -1.0)]
    (tmp_path / "t.csv").write_text(
        'prompt,completion,reward\n"p, 1","say ""no""\nagain",0.5\np2,c,-1\n'
    )
    (tmp_path / "t.tsv").write_text(
        'prompt\tcompletion\treward\np, 1\t"say ""no""\nagain"\t0.5\np2\tc\t-1\n'
    )
    names = ("prompt", "completion", "reward")
    write(tmp_path / "t.jsonl", [dict(zip(names, row, strict=True)) for row in rows])
    found = {}
    for kind in ("jsonl", "csv", "tsv"):
        paths = run(tmp_path, tmp_path / f"t.{kind}", "trajectory")
        cache = TokenizedCache(paths["train"])
        found[kind] = (texts(paths), [row.response_reward for row in cache])
        if kind != "jsonl":  # the header is line 1, and a row may have several
            assert [row.key for row in cache] == [f"t.{kind}:2", f"t.{kind}:4"]
    assert found["csv"] == found["tsv"] == found["jsonl"]


def test_bad_rows_of_a_table_are_listed_with_their_lines(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,completion\na,b\n,c\nd,e,f\n")
    with pytest.raises(
        ValueError, match=r"t\.csv:3: prompt.*got null\n.*t\.csv:4: row"
    ):
        run(tmp_path, tmp_path / "t.csv")
    paths = run(tmp_path, tmp_path / "t.csv", on_bad_row="skip")
    assert texts(paths) == [("a", "b")]
    assert TokenizedCache(paths["train"]).summary["source"]["rows_rejected"] == 2


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "csv.zst"])
def test_packed_files_are_read_like_others(tmp_path, kind):
    plain = b'{"prompt": "p", "completion": "c"}\n'
    if kind.startswith("csv"):
        plain = b"prompt,completion\np,c\n"
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}
    path = tmp_path / f"r.{kind}"
    path.write_bytes(pack[kind.rpartition(".")[2]](plain))
    assert texts(run(tmp_path, path)) == [("p", "c")]
    assert sources.find_source(str(path)).name == "r"


def test_a_folder_is_its_files_in_order(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("b", "a", "c"):
        write(folder / f"{name}.jsonl", [{"prompt": name, "completion": name}])
    for name in (".hidden.jsonl", "bad_rows.jsonl", "c.jsonl.partial", "README.md"):
        (folder / name).write_text("no rows\n")
    first = run(tmp_path, folder)
    assert texts(first) == [(n, n) for n in "abc"]
    assert run(tmp_path, f"{folder}/[abc].jsonl") == first
    write(folder / "b.jsonl", [{"prompt": "B", "completion": "b"}])
    assert run(tmp_path, folder) != first
    write(folder / "d.csv", [])
    with pytest.raises(
        ValueError, match=r"several kinds, d\.csv, a\.jsonl: .*\*\.csv'"
    ):
        run(tmp_path, folder)
    deep = tmp_path / "deep" / "er"
    deep.mkdir(parents=True)
    write(deep / "r.jsonl", [{"prompt": "p", "completion": "c"}])
    assert texts(run(tmp_path, tmp_path / "deep" / "**" / "*.jsonl")) == [("p", "c")]
    with pytest.raises(FileNotFoundError, match="no data files"):
        run(tmp_path, tmp_path / "deep")


# What a run makes of them.


def dataset(tmp_path, data, **settings):
    settings.setdefault("feature_lengths", {"inputs": 64, "targets": 16})
    return inputs.Dataset(data=str(data), cache_dir=str(tmp_path / "c"), **settings)


def build(tmp_path, data, objective="SFT", **settings):
    made = objectives.OBJECTIVES[objective](model=tiny_run.models.T5(tiny_run.CONFIG))
    vocabulary = ByteVocabulary(extra_ids=125)
    return inputs.build(dataset(tmp_path, data, **settings), made, vocabulary)


def test_a_prompt_in_both_files_is_told(tmp_path, caplog):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(10)]
    train = write(tmp_path / "train.jsonl", rows)
    held = write(
        tmp_path / "held.jsonl", [*rows[:2], {"prompt": "q", "completion": "c"}]
    )
    with caplog.at_level(logging.WARNING):
        build(tmp_path, train, eval_data=held, batch_size=2)
    assert "2 of 3 rows of the validation data have a prompt" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build(tmp_path, train, eval_fraction=0.3, batch_size=2)
    assert "validation data have a prompt" not in caplog.text


def test_rows_that_are_too_long_leave_batches_rewards_and_counts(tmp_path):
    rows = [
        {"prompt": f"p{i}", "completion": f"c{i}", "reward": float(i)} for i in range(8)
    ] + [{"prompt": "p" * 70, "completion": "c", "reward": 1000.0}]
    data = write(tmp_path / "rows.jsonl", rows)
    common = dict(batch_size=2, eval_fraction=0.0)
    kept = build(tmp_path, data, "DROV", on_too_long="skip", **common)
    alone = build(tmp_path, write(tmp_path / "few.jsonl", rows[:8]), "DROV", **common)
    assert kept.reward_stats == alone.reward_stats
    assert kept.train.plans[0].left_out == {"rows": 1, "responses": 1}
    cut = build(tmp_path, data, "DROV", **common)
    assert cut.reward_stats != alone.reward_stats
    (ours,), (theirs,) = kept.train.plans, alone.train.plans
    assert ours.fingerprint == theirs.fingerprint
    for a, b in zip(
        kept.train.evaluation_batches(), alone.train.evaluation_batches(), strict=True
    ):
        for name in a:
            assert (a[name] == b[name]).all(), name
    with pytest.raises(ValueError, match=r"rows\.jsonl:9: a prompt of 71 tokens"):
        build(tmp_path, data, "DROV", on_too_long="error", **common)


def test_rows_made_on_the_fly_cannot_be_left_out(tmp_path):
    with pytest.raises(ValueError, match="leave ON_TOO_LONG at 'truncate'"):
        build(tmp_path, "synthetic:copy", on_too_long="skip")
