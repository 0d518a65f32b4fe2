"""Prepared on Apache Beam, a cache is the same bytes, whatever the number of workers.

Every test runs on a stand-in that calls what workers call, in another order and twice
over, and on Beam itself where the environment has it (``make test-beam``).
"""

import gzip
import json
import os
import pathlib
import pickle
import random
import signal
import socket
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxalign import cli, prepare
from jaxalign.data.bad_rows import DataError, OptionError
from jaxalign.data.cache import TokenizedCache
from jaxalign.prepare import beam, pieces
from jaxalign.vocabularies import ByteVocabulary, SentencePieceVocabulary

STAND_IN = "--stand_in"
PROCESSES = "--direct_running_mode=multi_processing --direct_num_workers="


@pytest.fixture(
    params=[
        STAND_IN,
        pytest.param("", marks=pytest.mark.beam),
        pytest.param(
            "--runner=DirectRunner --direct_running_mode=multi_threading "
            "--direct_num_workers=3",
            marks=pytest.mark.beam,
        ),
    ],
    ids=["stand_in", "one_worker", "three_threads"],
)
def options(request, monkeypatch):
    """Beam's options; files are cut into pieces of a few rows."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 200)
    if request.param == STAND_IN:
        monkeypatch.setattr(beam, "_run", stand_in)
    return request.param


def stand_in(stored, count, beam_options):
    """What a runner does, which may try a piece more than once."""
    numbers = random.Random(count).sample(range(count), count)
    for i in [*reversed(numbers), *numbers[:2]]:
        beam._encode(i, stored)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def preferences(count, start=0):
    return [
        {
            "prompt": f"question\n{i % 7} é🎉",
            "chosen": "yes " * (i % 5 + 1),
            "rejected": f"no {i}",
            "rationale": "[chosen] is better than [rejected].",
            "metadata": {"i": i},
        }
        for i in range(start, start + count)
    ]


def trajectories(count):
    return [
        {"prompt": f"p{i % 9}", "completion": "c" * (i % 4 + 1), "reward": i / 3}
        for i in range(count)
    ]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_same(tmp_path, data, options, schema="preference", **arguments):
    """Prepares with and without Beam; every file has to have the same bytes."""
    arguments = {"vocabulary": ByteVocabulary(), "schema": schema} | arguments
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    paths = prepare.prepare(str(data), cache_dir=alone, **arguments)
    prepare.prepare(str(data), cache_dir=spread, beam_options=options, **arguments)
    expected, found = contents(alone), contents(spread)
    assert sorted(found) == sorted(expected) and "cache.json" in str(found)
    assert [name for name in found if found[name] != expected[name]] == []
    assert not [p for p in spread.iterdir() if p.name.startswith(".")]
    return paths


def check_same_error(tmp_path, data, options, error, **arguments):
    arguments = {"vocabulary": ByteVocabulary(), "schema": "preference"} | arguments
    said = []
    for beam_options in (None, options):
        with pytest.raises(error) as caught:
            prepare.prepare(
                str(data), cache_dir=tmp_path, beam_options=beam_options, **arguments
            )
        assert type(caught.value) is error
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert not list(tmp_path.rglob("cache.json"))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    return said[0]


@pytest.mark.parametrize("schema", ["supervised", "preference", "rationale"])
def test_files_of_every_kind(tmp_path, options, schema):
    rows = preferences(60)
    write(tmp_path / "a.jsonl", rows[:23])
    write(tmp_path / "b.jsonl", rows[23:24])
    write(tmp_path / "c.jsonl", [])
    text = "".join(json.dumps(row) + "\n" for row in rows[24:40])
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    table = pa.Table.from_pylist(rows[40:])
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=6)
    paths = check_same(
        tmp_path, tmp_path / "[a-e].*", options, schema, eval_fraction=0.3, seed=5
    )
    caches = [TokenizedCache(path) for path in paths.values()]
    assert sum(map(len, caches)) == 60 and all(map(len, caches))


@pytest.mark.parametrize("max_rows", [None, 17])
def test_several_rows_of_one_line(tmp_path, options, max_rows):
    raws = [
        {"turns": [{"q": f"{i % 3}", "a": f"{i}"}, {"q": "b", "a": "y"}]}
        for i in range(30)
    ]
    fields = {"prompt": "turns[].q", "completion": "turns[].a"}
    data = write(tmp_path / "r.jsonl", raws)
    check_same(
        tmp_path, data, options, "supervised", field_map=fields, max_rows=max_rows
    )


def test_trajectories_of_files_of_one_name(tmp_path, options):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "r.jsonl", trajectories(20))
    paths = check_same(
        tmp_path,
        tmp_path / "[xy]" / "r.jsonl",
        options,
        "trajectory",
        require=("reward", "label"),
        desirable_above=2.0,
    )
    assert TokenizedCache(paths["train"])[20].key == f"{tmp_path}/y/r.jsonl:1"


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_split_that_has_to_be_moved(tmp_path, options, fraction):
    data = write(tmp_path / "r.jsonl", preferences(20))
    paths = check_same(tmp_path, data, options, eval_fraction=fraction)
    assert all(len(TokenizedCache(path)) for path in paths.values())


def test_bad_rows(tmp_path, options):
    rows = preferences(40)
    rows[3]["chosen"] = ""
    rows[31] |= {"rejected": rows[31]["chosen"]}
    lines = [json.dumps(row) for row in rows]
    # Two blank lines that something follows, two at the end, and what is no JSON.
    lines[20:20] = ["", " ", '{"prompt": "\ud800", "\\ud800": 1, "\\ud800": 2}', "["]
    lines += ["", ""]
    data = tmp_path / "r.jsonl"
    data.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + b"\n")
    paths = check_same(tmp_path, data, options, on_bad_row="skip", eval_fraction=0.2)
    source = TokenizedCache(paths["train"]).summary["source"]
    assert (source["rows_read"], source["rows_rejected"]) == (44, 6)
    said = check_same_error(tmp_path / "error", data, options, DataError)
    assert "r.jsonl:4: chosen" in said and "r.jsonl:21: row" in said
    assert "r.jsonl:22: row" in said and "r.jsonl:36: rejected" in said
    # Only the rows read count.
    said = check_same_error(tmp_path / "few", data, options, DataError, max_rows=10)
    assert said.startswith("1 bad row:")


def test_a_data_set_with_options(tmp_path, options):
    rows = [
        {"question": f"{i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>.\n#### {i + 1}"}
        for i in range(30)
    ]
    data = write(tmp_path / "r.jsonl", rows)
    given = {"task": "gsm8k", "schema": "supervised"}
    check_same(tmp_path, data, options, **given)
    check_same_error(
        tmp_path / "error",
        data,
        options,
        OptionError,
        task_options={"calculator": "no"},
        **given,
    )


def test_a_data_set_of_a_script(tmp_path, options):
    def records(raw, *, times=1):
        if raw["i"] % 5 == 0:
            return []
        return [None, {"prompt": raw["q"], "completion": f"{raw['i']} " * times}]

    from jaxalign.prepare import tasks

    prepare.add_task("of_a_script", doc="Made up.", records={"supervised": records})
    try:
        rows = [{"i": i, "q": f"q{i % 6}"} for i in range(30)] + [{"i": 1}, {"q": "x"}]
        data = write(tmp_path / "r.jsonl", rows)
        paths = check_same(
            tmp_path,
            f"of_a_script:{data}",
            options,
            "supervised",
            task_options={"times": 3},
            on_bad_row="skip",
        )
    finally:
        del tasks._TASKS["of_a_script"]
    source = TokenizedCache(paths["train"]).summary["source"]
    assert (source["rows_left_out"], source["responses_left_out"]) == (6, 24)
    assert source["rejected_by_problem"] == {"q: missing": 1, "i: missing": 1}


def test_a_row_that_the_cache_refuses(tmp_path, options):
    rows = preferences(30)
    rows[17]["metadata"] = {"i": 2**70}
    data = write(tmp_path / "r.jsonl", rows)
    said = check_same_error(tmp_path / "error", data, options, DataError)
    assert "r.jsonl:18: metadata: expected JSON values" in said
    check_same(tmp_path, data, options, on_bad_row="skip")


def test_an_error_of_a_row_is_raised_at_its_place(tmp_path, options):
    def records(raw):
        return [{"prompt": raw["q"], "completion": str(1 // raw["i"])}]

    from jaxalign.prepare import tasks

    prepare.add_task("divides", doc="Made up.", records={"supervised": records})
    given = {"schema": "supervised", "task": "divides"}
    try:
        rows = [{"i": 20 - i, "q": "q"} for i in range(40)]
        data = write(tmp_path / "r.jsonl", rows)
        check_same_error(tmp_path / "error", data, options, ZeroDivisionError, **given)
        check_same(tmp_path, data, options, max_rows=19, **given)
    finally:
        del tasks._TASKS["divides"]


def test_nothing_left(tmp_path, options):
    data = write(tmp_path / "r.jsonl", [])
    check_same_error(tmp_path / "error", data, options, ValueError)


def test_a_sentencepiece_model_travels(tmp_path, options, sentencepiece_model):
    vocabulary = SentencePieceVocabulary(str(sentencepiece_model), extra_ids=3)
    data = write(tmp_path / "r.jsonl", preferences(20))
    check_same(tmp_path, data, options, vocabulary=vocabulary)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("model")
    text = folder / "text.txt"
    text.write_text("the question is yes or no and better\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "m"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "m.model"


def test_a_failing_disk_fails_the_pipeline_and_leaves_nothing(tmp_path, options):
    def records(raw):
        raise OSError(28, "No space left on device")

    from jaxalign.prepare import tasks

    prepare.add_task("disk", doc="Made up.", records={"supervised": records})
    data = write(tmp_path / "r.jsonl", trajectories(20))
    try:
        with pytest.raises(Exception, match="No space left on device"):
            prepare.prepare(
                data,
                schema="supervised",
                vocabulary=ByteVocabulary(),
                cache_dir=tmp_path / "caches",
                task="disk",
                beam_options=options,
            )
    finally:
        del tasks._TASKS["disk"]
    assert not list((tmp_path / "caches").iterdir())


def run_stand_in(monkeypatch, run=stand_in):
    monkeypatch.setattr(beam, "_run", run)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 200)


def prepare_rows(tmp_path, data=None, **arguments):
    return prepare.prepare(
        data or write(tmp_path / "r.jsonl", preferences(20)),
        schema="preference",
        vocabulary=ByteVocabulary(),
        cache_dir=tmp_path / "caches",
        beam_options="",
        **arguments,
    )


def test_parts_that_are_not_there(tmp_path, monkeypatch):
    def elsewhere(stored, count, beam_options):
        stand_in(stored, count, beam_options)
        (pathlib.Path(stored).parent / "00000002").unlink()

    run_stand_in(monkeypatch, elsewhere)
    with pytest.raises(RuntimeError, match="1 of .* expected every worker to see the"):
        prepare_rows(tmp_path)
    assert not list((tmp_path / "caches").iterdir())


def test_parts_that_were_cut_short(tmp_path, monkeypatch):
    def cut(stored, count, beam_options):
        stand_in(stored, count, beam_options)
        part = pathlib.Path(stored).parent / "00000002"
        part.write_bytes(part.read_bytes()[:-10])

    run_stand_in(monkeypatch, cut)
    with pytest.raises((EOFError, pickle.UnpicklingError)):
        prepare_rows(tmp_path)
    assert not list((tmp_path / "caches").rglob("cache.json"))


def test_workers_that_lack_something(tmp_path, monkeypatch):
    def lacking(stored, count, beam_options):
        with monkeypatch.context() as patch:
            patch.setattr(beam.Recipe, "build", None)
            stand_in(stored, count, beam_options)

    run_stand_in(monkeypatch, lacking)
    with pytest.raises(RuntimeError, match="this process can. The worker said: TypeE"):
        prepare_rows(tmp_path)


def test_what_a_killed_process_left_is_removed(tmp_path, monkeypatch):
    run_stand_in(monkeypatch)
    command = [sys.executable, "-c", "import os; print(os.getpid())"]
    gone = subprocess.run(command, capture_output=True, text=True, check=True)
    folder = prepare_rows(tmp_path)["train"].parent
    (folder / "train" / "index.npz").unlink()
    name = f".{folder.name}.tmp-{socket.gethostname()}-{gone.stdout.strip()}"
    left = folder.with_name(name)
    left.mkdir()
    prepare_rows(tmp_path)
    assert not left.exists() and len(TokenizedCache(folder / "train")) == 20


def test_a_cache_that_is_there_needs_no_beam(tmp_path, monkeypatch):
    data = write(tmp_path / "r.jsonl", preferences(20))
    arguments = {"schema": "preference", "vocabulary": ByteVocabulary()}
    arguments["cache_dir"] = tmp_path / "caches"
    first = prepare.prepare(data, **arguments)
    monkeypatch.setattr(beam, "_run", None)
    assert prepare.prepare(data, beam_options="", **arguments) == first


def test_without_apache_beam(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxalign\[beam\]'"):
        prepare_rows(tmp_path)
    assert not list((tmp_path / "caches").iterdir())


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ("r.tfrecord", r"r\.tfrecord cannot be prepared in pieces"),
        ("world", "beam_options prepare JSONL and Parquet files, and 'world' is none"),
    ],
)
def test_sources_that_are_no_such_files(tmp_path, data, match):
    if data.endswith("tfrecord"):
        (tmp_path / data).write_bytes(b"")
        data = str(tmp_path / data)
    with pytest.raises(ValueError, match=match):
        prepare_rows(tmp_path, data)


def test_the_verb_data_hands_the_options_on(tmp_path, monkeypatch, capsys):
    given = []

    def run(stored, count, beam_options):
        given.append(beam_options)
        stand_in(stored, count, beam_options)

    run_stand_in(monkeypatch, run)
    data = write(tmp_path / "r.jsonl", preferences(20))
    text = "--runner=DirectRunner --direct_num_workers=2"
    arguments = [
        "data",
        "--gin_file=runs/dpo.gin",
        f"--gin.DATA='{data}'",
    ]
    cli.main([*arguments, f"--gin.CACHE_DIR='{tmp_path}/a'", f"--beam_options={text}"])
    spread = capsys.readouterr().out
    cli.main([*arguments, f"--gin.CACHE_DIR='{tmp_path}/b'"])
    assert given == [text]
    alone = capsys.readouterr().out
    assert alone.replace(f"{tmp_path}/b", f"{tmp_path}/a") == spread
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.beam
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_are_processes(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 5000)
    rows = preferences(200)
    rows[150]["chosen"] = ""
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", preferences(50, 200))
    check_same(
        tmp_path,
        tmp_path / "*.jsonl",
        f"{PROCESSES}{workers}",
        "rationale",
        on_bad_row="skip",
        eval_fraction=0.2,
    )


# Beam's threads that served the worker die with it; their names depend on the moment.
@pytest.mark.filterwarnings("ignore:Exception in thread")
@pytest.mark.beam
def test_a_killed_worker_fails_the_pipeline_and_leaves_nothing(tmp_path):
    alive = os.getpid()

    def records(raw):
        if os.getpid() != alive:
            os.kill(os.getpid(), signal.SIGKILL)
        return []

    from jaxalign.prepare import tasks

    prepare.add_task("kills", doc="Made up.", records={"supervised": records})
    try:
        with pytest.raises(RuntimeError, match="worker process of the pipeline died"):
            prepare.prepare(
                write(tmp_path / "r.jsonl", trajectories(20)),
                schema="supervised",
                vocabulary=ByteVocabulary(),
                cache_dir=tmp_path / "caches",
                task="kills",
                beam_options=f"{PROCESSES}2",
            )
    finally:
        del tasks._TASKS["kills"]
    assert not list((tmp_path / "caches").iterdir())
