"""Data, reports and messages where the user names a bucket."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
from pathlib import Path

import buckets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign import cli, prepare, remote, report, vocabularies
from jaxalign.data import bad_rows
from jaxalign.data.cache import TokenizedCache
from jaxalign.pipelines import quickstart
from jaxalign.training import inputs, remote_checkpoints

ROWS = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(20)]


@pytest.fixture(scope="module")
def new_bucket():
    with buckets.server() as make:
        yield make


@pytest.fixture
def bucket(new_bucket, tmp_path, monkeypatch) -> str:
    """An empty bucket, on a machine without copies."""
    monkeypatch.setenv(remote.FOLDER_VARIABLE, str(tmp_path / "copies"))
    return new_bucket()


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def prepared(data: str | Path, cache_dir: Path, **changes) -> dict[str, bytes]:
    """The files of the caches that DATA gives, but for where it was."""
    settings = {"schema": "supervised", "vocabulary": vocabularies.ByteVocabulary()}
    folders = prepare.prepare(str(data), cache_dir=cache_dir, **settings, **changes)
    files = {}
    for split, folder in folders.items():
        for path in folder.iterdir():
            if not path.name.startswith("."):
                files[f"{folder.parent.name}/{split}/{path.name}"] = path.read_bytes()
    return {k: v for k, v in files.items() if not k.endswith("cache.json")}


def write_parts(write) -> None:
    write("part-0.jsonl", lines(ROWS[:9]))
    write("part-1.jsonl.gz", gzip.compress(lines(ROWS[9:]), mtime=0))
    write("other.txt", b"not data")


@pytest.mark.parametrize("pattern", ["part-*", "part-[01].jsonl*", "part-0.jsonl"])
def test_data_in_a_bucket_gives_the_cache_of_local_files(bucket, tmp_path, pattern):
    write_parts(lambda name, content: (tmp_path / name).write_bytes(content))
    write_parts(lambda name, content: buckets.put(f"{bucket}/in/{name}", content))
    ours = prepared(f"{bucket}/in/{pattern}", tmp_path / "a", eval_fraction=0.2)
    theirs = prepared(tmp_path / pattern, tmp_path / "b", eval_fraction=0.2)
    assert ours == theirs and len(ours) > 3


def test_parquet_in_a_bucket(bucket, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    buckets.put(f"{bucket}/rows.parquet", (tmp_path / "rows.parquet").read_bytes())
    ours = prepared(f"{bucket}/rows.parquet", tmp_path / "a")
    assert ours == prepared(tmp_path / "rows.parquet", tmp_path / "b")


def test_files_of_one_name_are_told_apart_by_their_addresses(bucket, tmp_path):
    for part in "ab":
        buckets.put(f"{bucket}/{part}/rows.jsonl", lines(ROWS))
    folder = prepare.prepare(
        f"{bucket}/*/rows.jsonl",
        schema="supervised",
        vocabulary=vocabularies.ByteVocabulary(),
        cache_dir=tmp_path,
    )["train"]
    source = json.loads((folder / "cache.json").read_text())["source"]
    assert source["names"] == [f"{bucket}/a/rows.jsonl", f"{bucket}/b/rows.jsonl"]


def test_a_prepared_folder_in_a_bucket(bucket, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
    made = prepared(tmp_path / "rows.jsonl", tmp_path / "cache", eval_fraction=0.2)
    (folder,) = (tmp_path / "cache").iterdir()
    buckets.put_folder(folder, f"{bucket}/{folder.name}")
    assert prepared(f"{bucket}/{folder.name}", tmp_path / "none") == made
    assert not (tmp_path / "none").exists()


def test_bad_rows_are_named_by_address_and_line(bucket, tmp_path):
    buckets.put(f"{bucket}/x.jsonl", lines([*ROWS, {"prompt": 3}]) + b'{"prom')
    with pytest.raises(bad_rows.DataError) as error:
        prepared(f"{bucket}/x.jsonl", tmp_path)
    assert f"{bucket}/x.jsonl:21" in str(error.value)
    assert f"{bucket}/x.jsonl:22" in str(error.value)


def test_a_file_that_changed_is_copied_again(bucket):
    url = f"{bucket}/a.jsonl"
    buckets.put(url, b"1")
    copied = remote.copy(url)
    first = copied.stat().st_ino
    assert remote.copy(url).stat().st_ino == first
    buckets.put(url, b"2")
    assert remote.copy(url).read_bytes() == b"2"
    assert remote.copy("a.jsonl") == Path("a.jsonl")
    # A folder's copy loses what the folder lost.
    buckets.put(f"{bucket}/b.jsonl", b"3")
    assert remote.copy_folder(bucket) == copied.parent
    fs, path = remote.connect(url)
    fs.rm_file(path)
    remote.copy_folder(bucket)
    assert not copied.exists() and (copied.parent / "b.jsonl").exists()


def test_the_report_of_runs_in_a_bucket(bucket, tmp_path, capsys):
    for name in ("sft", "dpo"):
        run = f"{bucket}/runs/{name}"
        buckets.put(f"{run}/config.gin", b"TRAIN_STEPS = 10\n")
        line = {"step": 1, "time": 1.0, "train/loss": 2.5}
        buckets.put(f"{run}/metrics.jsonl", lines([line]))
        buckets.put(f"{run}/samples/7.jsonl", lines([{"prompt": "a", "response": "b"}]))
        buckets.put(f"{run}/checkpoints/9/policy/data", b"large")
    assert cli.main(["report", f"{bucket}/runs/sft"]) == 0
    assert capsys.readouterr().out.strip() == f"{bucket}/runs/sft/report.html"
    page = buckets.get(f"{bucket}/runs/sft/report.html").decode()
    assert "2.5" in page and "TRAIN_STEPS" in page
    assert not (remote.copy_path(f"{bucket}/runs/sft") / "checkpoints").exists()
    both = [f"{bucket}/runs/sft", f"{bucket}/runs/dpo"]
    with pytest.raises(ValueError, match="--output=FILE.html"):
        report.write_report(both)
    page = report.write_report(both, tmp_path / "both.html").read_text()
    assert "sft" in page and "dpo" in page
    assert report.write_report([f"{bucket}/runs"]) == f"{bucket}/runs/report.html"
    assert cli.main(["report", f"{bucket}/nothing"]) == 2
    assert f"{bucket}/nothing: expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{bucket}/none.jsonl", "No file '{bucket}/none.jsonl'"),
        ("s3://nobody-has-this/*.jsonl", "No file 's3://nobody-has-this/"),
        ("{bucket}/a.xlsx", "{bucket}/a.xlsx is a spreadsheet, which is not read"),
        ("gs://bucket/a.jsonl", "pip install 'jaxalign[remote]'"),
        ("gss://bucket/a.jsonl", "gss://bucket/a.jsonl: Protocol not known"),
        ("{bucket}/../a.jsonl", "'..' has no meaning in a bucket"),
    ],
)
def test_mistakes_are_one_message(bucket, tmp_path, capsys, monkeypatch, data, message):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    buckets.put(f"{bucket}/a.xlsx", b"PK")
    buckets.put(f"{bucket}/../a.jsonl", b"{}")
    binding = f"--gin.DATA='{data.format(bucket=bucket)}'"
    cache = f"--gin.CACHE_DIR='{tmp_path}'"
    assert cli.main(["data", "--gin_file=runs/sft.gin", binding, cache]) == 2
    assert message.format(bucket=bucket) in capsys.readouterr().err


def test_missing_credentials_are_an_os_error(bucket, tmp_path, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(OSError, match=f"{bucket}/a.jsonl: .*[cC]redentials"):
        remote.copy(f"{bucket}/a.jsonl")
    s3fs.S3FileSystem.clear_instance_cache()


def test_what_needs_a_local_folder_says_so(tmp_path):
    dataset = inputs.Dataset(data="x.jsonl", cache_dir="gs://bucket/cache")
    with pytest.raises(ValueError, match="CACHE_DIR needs a local path, got gs://"):
        _ = dataset.cache_folder
    with pytest.raises(ValueError, match="--run_dir of several runs needs a local"):
        quickstart.run(run_dir="s3://bucket/quickstart")


# Names that others wrote.

NAME_PARTS = st.sampled_from(
    ["..", ".", "", "a", "policy", "...", "~", "c:", "\\", "\0", "\n", "..a", "é", " "]
)


@given(st.lists(NAME_PARTS, min_size=1, max_size=6).map("/".join))
def test_a_name_from_outside_stays_below_its_folder_or_is_refused(name):
    try:
        path = remote.below("/home/copy", name)
    except ValueError as error:
        assert "below /home/copy, got" in str(error) and "\n" not in str(error)
    else:
        assert os.path.normpath(path) == str(path) == f"/home/copy/{name}"


@pytest.mark.parametrize("name", [None, 3, ["a"], {}, "", "/etc/passwd", "a/" * 999])
def test_what_names_no_file_below_is_refused_in_a_short_line(name):
    with pytest.raises(ValueError, match="Expected the name of a file") as error:
        remote.below("copy", name)
    assert len(str(error.value)) < 400


HOSTILE = "policy/../../../../outside"


def test_a_checkpoints_list_of_files_cannot_lead_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv(remote.FOLDER_VARIABLE, str(tmp_path / "copies"))
    folder = tmp_path / "bucket" / "run" / "checkpoints"
    (folder / "5" / "policy").mkdir(parents=True)
    files = {"policy/a": folder / "5" / "policy" / "a"}
    files[HOSTILE] = tmp_path / "bucket" / "outside"
    for file in files.values():
        file.write_bytes(b"x")
    digests = {name: hashlib.sha256(b"x").hexdigest() for name in files}
    (folder / "5.json").write_text(json.dumps({"sha256": digests}))
    with pytest.raises(ValueError, match="damaged: its list of files leads elsewhere"):
        remote_checkpoints.copy_networks(f"file://{tmp_path}/bucket/run")
    copied = [p.name for p in (tmp_path / "copies").rglob("*") if p.is_file()]
    assert copied == [".5.lock"]


def test_a_listing_cannot_lead_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv(remote.FOLDER_VARIABLE, str(tmp_path / "copies"))
    monkeypatch.setattr(remote, "listing", lambda url: ["rows", HOSTILE])
    with pytest.raises(ValueError, match="Expected the name of a file"):
        remote.copy_folder(f"file://{tmp_path}/bucket")
    assert not (tmp_path / "copies").exists()


def test_a_steps_name_is_a_number(tmp_path):
    for name in ("5", "5.json", "²", "².json"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
    assert remote_checkpoints.complete(f"file://{tmp_path}") == [5]


def test_a_caches_index_and_vocabulary_cannot_lead_elsewhere(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
    folder = prepare.prepare(
        str(tmp_path / "rows.jsonl"),
        schema="supervised",
        vocabulary=vocabularies.ByteVocabulary(),
        cache_dir=tmp_path / "cache",
    )["train"]
    meta = json.loads((folder / "cache.json").read_text())
    del meta["meta_sha256"]  # whoever writes such an index can write any digest
    meta["shards"][0]["name"] = f"../train/{meta['shards'][0]['name']}"
    (folder / "cache.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="is damaged: .* names shards that no writer"):
        TokenizedCache(folder)
    spec = {"kind": "sentencepiece", "extra_ids": 0, "escape": True}
    with pytest.raises(ValueError, match="Expected the name of a file below"):
        vocabularies.from_json({**spec, "model": "/etc/passwd"}, tmp_path)
