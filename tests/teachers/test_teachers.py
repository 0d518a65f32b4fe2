"""Teachers answer in batches, say None where they cannot, and are paid once."""

from __future__ import annotations

import json
import threading

import fault_server
import jax
import pytest
import tiny_run

from jaxalign import models, teachers
from jaxalign.decoding.stops import Stops
from jaxalign.teachers.checkpoint import CheckpointTeacher
from jaxalign.training import checkpoints
from jaxalign.vocabularies import ByteVocabulary


@pytest.fixture
def asked():
    return []


def echo(asked, lock=threading.Lock()):  # noqa: B008 - one lock for all
    def answer(body):
        with lock:
            asked.append(body)
        prompt = body["messages"][-1]["content"]
        texts = [f"{prompt}/{body['seed']}/{i}" for i in range(body["n"])]
        return fault_server.completion(texts)

    return answer


def test_answers_come_in_the_prompts_order_and_are_paid_once(tmp_path, asked):
    prompts = [f"p{i}" for i in range(20)] + ["p3"]
    with fault_server.serving(echo(asked)) as url:
        teacher = teachers.HTTPTeacher(url, "m", answers=tmp_path / "a.jsonl")
        found = teacher.generate(prompts, n=2, temperature=0.5, stop=["\n"], seed=7)
        assert found == [[f"{p}/7/0", f"{p}/7/1"] for p in prompts]
        assert len(asked) == 20  # an equal prompt is asked once
        assert asked[0]["stop"] == ["\n"] and asked[0]["temperature"] == 0.5
        assert teacher.usage["completion_tokens"] == 100
        again = teachers.HTTPTeacher(url, "m", answers=tmp_path / "a.jsonl")
        settings = {"temperature": 0.5, "stop": ["\n"], "seed": 7}
        assert again.generate(prompts, n=2, **settings) == found
        assert len(asked) == 20
        # More samples cost only what is missing, and do not repeat those there are.
        more = again.generate(["p0"], n=3, **settings)
        assert more == [["p0/7/0", "p0/7/1", "p0/9/0"]] and asked[-1]["n"] == 1
        assert again.generate(["p0"], n=1, temperature=0.6)[0] == ["p0/0/0"]
    # What is kept is itself a teacher.
    recorded = teachers.resolve(f"recorded:{tmp_path / 'a.jsonl'}")
    assert recorded.generate(["p5"], n=2) == [["p5/7/0", "p5/7/1"]]


def test_passing_faults_are_tried_again(tmp_path, asked):
    good = echo(asked)

    def answer(body):
        status, reply = good(body)
        if len(asked) % 3:
            return (429, 503)[len(asked) % 2], {"error": {"message": "busy"}}
        return status, reply

    with fault_server.serving(answer) as url:
        teacher = teachers.HTTPTeacher(
            url, "m", answers=tmp_path / "a.jsonl", concurrency=1
        )
        assert teacher.generate(["a", "b"]) == [["a/0/0"], ["b/0/0"]]


def test_a_prompt_that_is_refused_gives_none_and_the_others_are_kept(
    tmp_path, asked, caplog
):
    good = echo(asked)

    def answer(body):
        if body["messages"][-1]["content"] == "bad":
            return 400, {"error": {"message": "too long"}}
        return good(body)

    with fault_server.serving(answer) as url:
        teacher = teachers.HTTPTeacher(url, "m", answers=tmp_path / "a.jsonl")
        assert teacher.generate(["a", "bad", "c"]) == [["a/0/0"], [None], ["c/0/0"]]
    assert "1 of 3 requests" in caplog.text and "too long" in caplog.text
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2


def test_fewer_texts_than_asked_for_end_with_none(tmp_path):
    with fault_server.serving(lambda b: fault_server.completion(["one"])) as url:
        teacher = teachers.HTTPTeacher(url, "m", answers=tmp_path / "a.jsonl")
        assert teacher.generate(["a"], n=3) == [["one", None, None]]


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_model_stops_at_once(tmp_path, status):
    with fault_server.serving(lambda b: (status, {"error": {}})) as url:
        teacher = teachers.HTTPTeacher(url, "m", answers=tmp_path / "a.jsonl")
        with pytest.raises(ConnectionError, match="refuses the model 'm' or the key"):
            teacher.generate(["a"])


def test_no_server_is_an_error_not_a_file_of_nothing(tmp_path):
    teacher = teachers.HTTPTeacher(
        "http://127.0.0.1:9/v1", "m", answers=tmp_path / "a.jsonl", max_retries=0
    )
    with pytest.raises(ConnectionError, match="2 of 2 requests"):
        teacher.generate(["a", "b"])


def test_a_torn_line_of_kept_answers_is_asked_for_again(tmp_path, asked):
    with fault_server.serving(echo(asked)) as url:
        path = tmp_path / "a.jsonl"
        teachers.HTTPTeacher(url, "m", answers=path).generate(["a"])
        path.write_bytes(path.read_bytes()[:-9])
        again = teachers.HTTPTeacher(url, "m", answers=path)
        assert again.generate(["a"]) == [["a/0/0"]]
        assert len(asked) == 2
        third = teachers.HTTPTeacher(url, "m", answers=path)
        assert third.generate(["a"]) == [["a/0/0"]] and len(asked) == 2


def test_a_recording_says_what_it_lacks(tmp_path, caplog):
    path = tmp_path / "r.jsonl"
    rows = [{"prompt": "a", "response": "x"}, {"prompt": "a", "response": "y"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = teachers.resolve(f"recorded:{path}")
    assert teacher.generate(["a", "b"], n=2) == [["x", "y"], [None, None]]
    assert "lacks 2 of 4" in caplog.text
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"r\.jsonl:1: expected a JSON object"):
        teachers.RecordedTeacher(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("http://127.0.0.1:1/v1", "names no model"),
        ("recorded:nowhere.jsonl", "No recorded answers"),
        ("runs/nowhere", "No teacher 'runs/nowhere'"),
    ],
)
def test_what_names_no_teacher_is_refused(text, told):
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        teachers.resolve(text)


def test_a_checkpoint_answers_up_to_the_first_stop(monkeypatch):
    model, vocabulary = models.T5(tiny_run.CONFIG), ByteVocabulary(extra_ids=125)
    params = models.init_params(model, jax.random.key(0))
    meta = {"networks": {"policy": {"fingerprint": "abc"}}}
    policy = checkpoints.Network(model, params, vocabulary, meta, None)
    monkeypatch.setattr(checkpoints, "resolve", lambda path: path)
    monkeypatch.setattr(checkpoints, "read_meta", lambda path: meta)
    monkeypatch.setattr(checkpoints, "load", lambda path: policy)
    teacher = CheckpointTeacher("runs/sft")

    def answers(**more):
        found = teacher.generate(["a", "b"], n=2, max_tokens=24, **more)
        return [text for samples in found for text in samples]

    whole = answers()
    stops = [whole[0][3:5], whole[1][1], whole[3][6:8]]
    cut = [(text, Stops(stops, vocabulary).find(text)) for text in whole]
    assert sum(found is not None for _, found in cut) >= 3
    assert answers(stop=stops) == [t[: f[0]] if f else t for t, f in cut]
