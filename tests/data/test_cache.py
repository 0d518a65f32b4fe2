"""The tokenised cache on disk: contents, atomicity and what damage says."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxalign import batch
from jaxalign.data import cache_writer
from jaxalign.data.cache import TokenizedCache
from jaxalign.data.cache_writer import CacheWriter, private_folder, remove_stale
from jaxalign.data.rows import Row, build_index
from jaxalign.vocabularies import ByteVocabulary

NAN = float("nan")


def pair_row(key="a:1", **changes):
    row = Row(
        key=key,
        prompts=[np.array([5, 6, 1], np.int32)],
        responses=[np.array([7, 1], np.int32), np.array([8, 9, 10, 1], np.int32)],
        response_prompt=[0, 0],
        response_kind=[batch.ANSWER, batch.ANSWER],
        response_reward=[NAN, 0.25],
        response_label=[batch.NO_LABEL, batch.DESIRABLE],
        pairs=[(0, 1, 1.5)],
        metadata={"prompt": "é\n", "facts": [1, {"x": None}]},
    )
    return dataclasses.replace(row, **changes)


def write(path, rows, **kwargs):
    options = (
        dict(schema="preference", vocabulary=ByteVocabulary(), fingerprint="abc")
        | kwargs
    )
    with CacheWriter(path, **options) as writer:
        for row in rows:
            writer.write(row)
    return TokenizedCache(path)


def assert_rows_equal(a, b):
    for field in dataclasses.fields(Row):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name in ("prompts", "responses"):
            assert [v.tolist() for v in x] == [v.tolist() for v in y]
            assert all(v.dtype == np.int32 for v in y)
        elif field.name == "response_reward":
            np.testing.assert_array_equal(x, y)
        else:
            assert x == y


def test_rows_come_back(tmp_path):
    rows = [
        pair_row(),
        pair_row("a:2", prompts=[np.array([9, 1]), np.array([4, 4, 1])],
                 response_prompt=[1, 0], pairs=[], metadata={}),
    ]  # fmt: skip
    cache = write(
        tmp_path / "c", rows, summary={"kept": 2}, source={"files": ["x.jsonl"]}
    )
    assert len(cache) == 2
    for i, row in enumerate(rows):
        assert_rows_equal(row, cache[i])
    assert [row.key for row in cache] == ["a:1", "a:2"]
    assert cache.schema == "preference"
    assert cache.fingerprint == "abc"
    assert cache.summary == {"kept": 2}
    assert cache.source == {"files": ["x.jsonl"]}
    assert cache.vocabulary == ByteVocabulary()
    assert cache.vocabulary_fingerprint == ByteVocabulary().fingerprint
    with pytest.raises(IndexError, match="Row 2 of a cache of 2"):
        cache[2]


def test_index_holds_lengths_offsets_and_numbers(tmp_path):
    rows = [
        pair_row(),
        pair_row("a:2", prompts=[np.array([9, 1]), np.array([4, 4, 1])],
                 responses=[np.array([1])], response_prompt=[1],
                 response_kind=[batch.RATIONALE], response_reward=[-2.0],
                 response_label=[0], pairs=[]),
        pair_row("a:3"),
    ]  # fmt: skip
    index = write(tmp_path / "c", rows).index
    assert index.prompt_lengths.tolist() == [3, 2, 3, 3]
    assert index.prompt_offsets.tolist() == [0, 1, 3, 4]
    assert index.response_lengths.tolist() == [2, 4, 1, 2, 4]
    assert index.response_offsets.tolist() == [0, 2, 3, 5]
    assert index.response_prompt.tolist() == [0, 0, 1, 0, 0]
    assert index.response_kind.tolist() == [0, 0, 1, 0, 0]
    assert index.response_label.tolist() == [-1, 1, 0, -1, 1]
    np.testing.assert_array_equal(index.response_reward, [NAN, 0.25, -2, NAN, 0.25])
    assert index.num_pairs.tolist() == [1, 0, 1]
    assert index.num_rows == 3 and index.num_responses == 5
    # Equal prompts share a hash, and it is BLAKE2b of the little-endian ids.
    raw = np.array([5, 6, 1], "<i4").tobytes()
    expected = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
    assert index.prompt_hash[0] == index.prompt_hash[2] == expected
    assert index.prompt_hash[1] != expected
    in_memory = build_index(rows)
    for field in dataclasses.fields(index):
        np.testing.assert_array_equal(
            getattr(index, field.name), getattr(in_memory, field.name)
        )


def test_many_shards_read_at_random(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "_SHARD_BYTES", 500)
    rows = [pair_row(f"k{i}", prompts=[np.array([i % 250, 1])]) for i in range(300)]
    cache = write(tmp_path / "c", rows)
    shards = sorted(p.name for p in (tmp_path / "c").glob("rows-*"))
    assert len(shards) > 5
    assert shards[0] == f"rows-00000-of-{len(shards):05d}.array_record"
    for i in np.random.default_rng(0).permutation(300).tolist():
        assert cache[i].key == f"k{i}"


def test_reward_stats(tmp_path):
    rewards = [1.0, 2.0, 4.0]
    rows = [pair_row(f"{r}", response_reward=[NAN, r]) for r in rewards]
    mean, std = write(tmp_path / "a", rows).reward_stats()
    assert mean == pytest.approx(7 / 3, rel=1e-15)
    assert std == pytest.approx((14 / 9) ** 0.5, rel=1e-15)
    equal = write(tmp_path / "b", [pair_row(response_reward=[3.0, 3.0])])
    assert equal.reward_stats() == (3.0, 1.0)
    none = write(tmp_path / "c", [pair_row(response_reward=[NAN, NAN])])
    with pytest.raises(ValueError, match="no rewards: expected the 'trajectory'"):
        none.reward_stats()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(responses=[np.array([3]), np.array([], int)]), r"responses\[1\] must be"),
        (dict(prompts=[np.array([3.0])]), r"prompts\[0\] must be .* got float64"),
        (dict(prompts=[np.array([300])]), r"ids in \[300, 300\], outside .* 259"),
        (dict(prompts=[]), "at least one prompt"),
        (dict(response_prompt=[0, 1]), r"response_prompt must be one of \[0\], got 1"),
        (dict(response_kind=[0]), "response_kind has 1 entries for 2 responses"),
        (dict(response_label=[0, 2]), r"response_label must be one of \[0, 1, -1\]"),
        (dict(response_reward=[0.0, float("inf")]), "finite, or nan .* got inf"),
        (dict(pairs=[(0, 2, 0.0)]), r"pair \(0, 2\) must name two of 2"),
        (dict(pairs=[(0, 1, NAN)]), "margin of pair"),
        (dict(metadata={"x": object()}), "metadata must be JSON"),
    ],
)
def test_bad_rows_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"Row 'bad:7': .*{message}"):
        write(tmp_path / "c", [pair_row(), pair_row("bad:7", **changes)])
    assert list(tmp_path.iterdir()) == []


def test_duplicate_keys_and_empty_caches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'a:1': the key was written before"):
        write(tmp_path / "c", [pair_row(), pair_row()])
    with pytest.raises(ValueError, match="No rows were written"):
        write(tmp_path / "c", [])
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_older_cache(tmp_path):
    write(tmp_path / "c", [pair_row("old")])
    with pytest.raises(RuntimeError, match="stopped"):
        with CacheWriter(
            tmp_path / "c",
            schema="preference",
            vocabulary=ByteVocabulary(),
            fingerprint="new",
        ) as writer:
            writer.write(pair_row("new"))
            raise RuntimeError("stopped")
    assert TokenizedCache(tmp_path / "c")[0].key == "old"
    newer = write(tmp_path / "c", [pair_row("new")], fingerprint="new")
    assert (newer[0].key, newer.fingerprint) == ("new", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


KILLED = """
import sys, time, numpy as np
from jaxalign.data import CacheWriter, Row
from jaxalign.vocabularies import ByteVocabulary
ids = [np.array([5, 1])]
with CacheWriter(sys.argv[1], schema="supervised", vocabulary=ByteVocabulary(),
                 fingerprint="x") as writer:
    for i in range(10**9):
        writer.write(Row(f"{i}", ids, ids, [0], [0], [0.0], [-1]))
        if i == 100:
            print("writing", flush=True)
        if i > 100:
            time.sleep(0.01)
"""


def test_killed_writer_leaves_no_cache_and_is_cleaned_up(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "c")],
        stdout=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".c.tmp-")
    with pytest.raises(FileNotFoundError, match="No tokenised cache at"):
        TokenizedCache(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match=r"expected cache.json"):
        TokenizedCache(left)
    write(tmp_path / "c", [pair_row()])
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_living_writers_are_left_alone(tmp_path):
    here = tmp_path / f".c.tmp-{socket.gethostname()}-{os.getppid()}"
    elsewhere, old = tmp_path / ".c.tmp-otherhost-1", tmp_path / ".c.tmp-otherhost-2"
    for folder in (here, elsewhere, old):
        folder.mkdir()
        (folder / "0").write_bytes(b"x")
    yesterday = time.time() - 2 * 24 * 3600
    os.utime(old / "0", (yesterday, yesterday))
    write(tmp_path / "c", [pair_row()])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [here.name, elsewhere.name, "c"]
    )


def test_of_two_writers_the_first_cache_stays_for_who_reads_it(tmp_path, monkeypatch):
    options = {"vocabulary": ByteVocabulary(), "fingerprint": "abc"}
    with CacheWriter(tmp_path / "c", schema="preference", **options) as late:
        late.write(pair_row())
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", os.getppid)  # as another, living process
            reader = write(tmp_path / "c", [pair_row()])
        before = (tmp_path / "c" / "cache.json").stat().st_ino
    assert (tmp_path / "c" / "cache.json").stat().st_ino == before
    assert_rows_equal(reader[0], pair_row())
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_clock_that_is_ahead_removes_no_living_writer(tmp_path, monkeypatch):
    """What is old is a question for the disk: hosts' clocks differ."""
    elsewhere = tmp_path / ".c.tmp-otherhost-1"
    elsewhere.mkdir()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3 * 24 * 3600)
    write(tmp_path / "c", [pair_row()])
    assert elsewhere.exists()


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileExistsError, match="exists and is not a cache"):
        write(tmp_path, [pair_row()])
    with pytest.raises(FileNotFoundError, match=r"holds \['notes.txt'\]"):
        TokenizedCache(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TokenizedCache(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="local path, got gs://bucket/c"):
        write("gs://bucket/c", [pair_row()])
    (tmp_path / "cache.json").write_text('{"format": "else"}')
    with pytest.raises(ValueError, match="has format 'else', expected"):
        TokenizedCache(tmp_path)


def test_damage_is_reported(tmp_path):
    path = tmp_path / "c"

    def fresh():
        write(path, [pair_row(f"{i}") for i in range(20)])
        return next(path.glob("rows-*"))

    shard = fresh()
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged: rows-.* has \d+ bytes of \d+"):
        TokenizedCache(path)
    shard.unlink()
    with pytest.raises(ValueError, match="damaged: rows-.* has no bytes"):
        TokenizedCache(path)
    shard = fresh()
    data = bytearray(shard.read_bytes())
    data[60:-70000] = bytes(len(data) - 70060)
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="damaged: rows-.*prepare the data again"):
        list(TokenizedCache(path))
    fresh()
    (path / "index.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged: index.npz is missing or changed"):
        TokenizedCache(path)
    fresh()
    (path / "cache.json").write_text('{"format":')
    with pytest.raises(ValueError, match="damaged: cache.json is no JSON"):
        TokenizedCache(path)
    fresh()
    meta = json.loads((path / "cache.json").read_text()) | {"version": 99}
    (path / "cache.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="version 99, this release reads 1"):
        TokenizedCache(path)


def test_content_fingerprint_follows_the_rows(tmp_path):
    a = write(tmp_path / "a", [pair_row("1"), pair_row("2")])
    b = write(tmp_path / "b", [pair_row("1"), pair_row("2")])
    c = write(tmp_path / "c", [pair_row("1"), pair_row("2", response_label=[0, 0])])
    assert a.content_fingerprint == b.content_fingerprint != c.content_fingerprint


def test_damage_of_cache_json_is_told_and_never_a_traceback(tmp_path):
    write(tmp_path / "c", [pair_row()])
    file = tmp_path / "c" / "cache.json"
    whole = file.read_text()
    r = random.Random(0)
    keys = [f'"{k}"' for k in json.loads(whole)]
    damaged = [whole.replace(key, key[:-2] + '~"', 1) for key in keys]
    damaged += [whole.replace("rows-0", "../rows-0"), "[]", "{}", "{", ""]
    for _ in range(150):
        at = r.randrange(len(whole))
        damaged.append(whole[:at] + chr(33 + r.randrange(90)) + whole[at + 1 :])
    for text in damaged:
        file.write_text(text)
        with contextlib.suppress(ValueError):
            found = json.loads(text)
            if found == json.loads(whole) or found and "meta_sha256" not in found:
                continue  # whole, or of an earlier release, which had no digest
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            _ = TokenizedCache(tmp_path / "c").vocabulary
        assert str(tmp_path / "c") in str(caught.value)


def test_a_full_disk_is_told_as_one(tmp_path, monkeypatch):
    def fail(self, *_):
        raise RuntimeError("write failed\nat array_record/writer.cc")

    monkeypatch.setattr(
        cache_writer, "ArrayRecordWriter", type("W", (), {"write": fail, "close": fail})
    )
    monkeypatch.setattr(cache_writer.ArrayRecordWriter, "__init__", lambda *a: None)
    usage = shutil.disk_usage(tmp_path)
    for free, advice in ((0, "make room"), (2**40, None)):
        monkeypatch.setattr(
            cache_writer.shutil, "disk_usage", lambda _, f=free: usage._replace(free=f)
        )
        with pytest.raises(OSError, match="Writing the tokenised cache") as caught:
            write(tmp_path / "c", [pair_row()])
        text = str(caught.value)
        assert "write failed" in text and "\n" not in text
        assert ("make room" in text) == bool(advice)
        assert not list(tmp_path.iterdir())


def test_what_is_unpickled_lies_in_a_private_folder(tmp_path):
    first = private_folder(tmp_path / "c")
    second = private_folder(tmp_path / "c")
    assert first != second and first.stat().st_mode & 0o777 == 0o700
    remove_stale(tmp_path / "c")
    assert first.is_dir()  # this process's own
    gone = first.name.replace(f"-{os.getpid()}-", "-99999999-")
    dead = first.rename(first.with_name(gone))
    remove_stale(tmp_path / "c")
    assert not dead.exists() and second.is_dir()
