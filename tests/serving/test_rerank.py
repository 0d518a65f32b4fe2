"""The score endpoints: as their clients expect them, and what they refuse."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import re
import threading
import time
import urllib.error
import urllib.request
from json import dumps

import numpy as np
import pytest
import uvicorn

from jaxalign.serving import rerank
from jaxalign.serving import server as serving
from jaxalign.serving.requests import Limits
from jaxalign.vocabularies import ByteVocabulary

LIMITS = Limits(body_bytes=20_000, prompt_tokens=12, new_tokens=8, samples=5)


class Length:
    """Longer is better; says when it is asked, and waits to be let go."""

    fingerprint = "length"

    def __init__(self):
        self.asked, self.open = [], threading.Event()
        self.open.set()

    def __call__(self, prompts, responses, metadata=None):
        self.asked.append((list(prompts), list(responses)))
        self.open.wait(10.0)
        if "boom" in responses:
            return np.array([np.nan] * len(responses), np.float32)
        return np.array([len(r) + 0.1 for r in responses], np.float32)


class Longer:
    """Prefers the longer one."""

    fingerprint = "longer"

    def compare(self, prompts, a, b, metadata=None):
        return np.array(
            [0.5 + 0.5 * np.sign(len(x) - len(y)) for x, y in zip(a, b, strict=True)],
            np.float32,
        )


class Answer:
    """What came back."""

    def __init__(self, response):
        self.status_code, self.text = response.status, response.read().decode()
        self.is_success = self.status_code == 200

    def json(self):
        return json.loads(self.text)


@dataclasses.dataclass
class Client:
    """Asks a server on loopback."""

    port: int
    judge: object

    def _ask(self, path, body=None, headers=None):
        url = f"http://127.0.0.1:{self.port}{path}"
        asked = urllib.request.Request(url, body, headers or {})
        try:
            with urllib.request.urlopen(asked) as response:
                return Answer(response)
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error)

    def get(self, path, headers=None):
        return self._ask(path, headers=headers)

    def post(self, path, json=None, content=None, headers=None):
        body = dumps(json) if content is None else content
        own = {"Content-Type": "application/json", **(headers or {})}
        return self._ask(path, body.encode(), own)


@contextlib.contextmanager
def client(judge, **settings):
    app = rerank.application(
        judge, ByteVocabulary(), model="rm", **{"limits": LIMITS, **settings}
    )
    server = uvicorn.Server(serving.configuration(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Client(server.servers[0].sockets[0].getsockname()[1], judge)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def served():
    with client(Length()) as asked:
        yield asked


def test_documents_come_back_best_first(served):
    body = {"model": "rm", "query": "q", "documents": ["a", "ccc", {"text": "bb"}]}
    found = served.post("/v1/rerank", json={**body, "top_n": 2}).json()
    assert [(r["index"], r["relevance_score"]) for r in found["results"]] == [
        (1, 3.1),
        (2, 2.1),
    ]
    assert found["model"] == "rm" and "document" not in found["results"][0]
    found = served.post("/v1/rerank", json={**body, "return_documents": True}).json()
    assert [r["document"]["text"] for r in found["results"]] == ["ccc", "bb", "a"]
    assert served.judge.asked[0] == (["q"] * 3, ["a", "ccc", "bb"])


def test_scores_come_back_in_order(served):
    body = {"model": "rm", "text_1": "p", "text_2": ["aa", "b"]}
    found = served.post("/v1/score", json=body).json()
    assert [(d["index"], d["score"]) for d in found["data"]] == [(0, 2.1), (1, 1.1)]
    body["text_1"] = ["p", "q"]
    served.post("/v1/score", json=body)
    assert [asked[0] for asked in served.judge.asked] == [["p", "p"], ["p", "q"]]


@pytest.mark.parametrize(
    ("path", "change", "status", "says"),
    [
        ("rerank", {"documents": []}, 400, "documents must be a text or a list"),
        ("rerank", {"documents": ["a", 3]}, 400, r"documents\[1\] must be a text"),
        ("rerank", {"documents": ["a"] * 6}, 400, "6 texts; this server takes 5"),
        ("rerank", {"documents": ["a" * 9]}, 400, "longer than the 8 tokens"),
        ("rerank", {"query": "a" * 12}, 400, "longer than the 12 tokens"),
        ("rerank", {"query": None}, 400, "query must be a str"),
        ("rerank", {"querry": "x"}, 400, "Did you mean 'query'"),
        ("rerank", {"top_n": 0}, 400, "top_n must be an integer in"),
        ("rerank", {"model": "other"}, 404, "No model 'other' here; expected 'rm'"),
        ("score", {"text_1": ["a", "b"]}, 400, "as many as text_2, got 2 and 1"),
        ("nothing", {}, 404, "there are /v1/rerank, /v1/score, /v1/models"),
    ],
)
def test_what_cannot_be_asked_is_refused(served, path, change, status, says):
    body = {"model": "rm", "query": "q", "documents": ["a"]}
    if path == "score":
        body = {"model": "rm", "text_1": "p", "text_2": "a"}
    found = served.post(f"/v1/{path}", json={**body, **change})
    assert found.status_code == status
    assert re.search(says, found.json()["error"]["message"]), found.json()
    assert not served.judge.asked


def test_the_usual_limits_hold(served):
    big = {"model": "rm", "query": "q", "documents": ["a" * 30_000]}
    assert served.post("/v1/rerank", json=big).status_code == 413
    plain = {"content": "{}", "headers": {"Content-Type": "text/plain"}}
    assert served.post("/v1/rerank", **plain).status_code == 415
    headers = {"Host": "evil.example"}
    assert served.get("/health", headers=headers).status_code == 403
    with client(Length(), api_key="secret") as locked:
        body = {"model": "rm", "text_1": "p", "text_2": "a"}
        assert locked.post("/v1/score", json=body).status_code == 401
        bearer = {"Authorization": "Bearer secret"}
        assert locked.post("/v1/score", json=body, headers=bearer).is_success


def test_a_queue_that_is_full_refuses():
    judge = Length()
    judge.open.clear()
    body = {"model": "rm", "text_1": "p", "text_2": "a"}
    with client(judge, max_waiting=1) as served:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(served.post, "/v1/score", json=body) for _ in range(4)]
            done, _ = concurrent.futures.wait(
                asked, timeout=10, return_when="FIRST_COMPLETED"
            )
            assert done and next(iter(done)).result().status_code == 429
            judge.open.set()
            codes = sorted(a.result().status_code for a in asked)
        assert codes[0] == 200 and codes[-1] == 429
        assert served.get("/health").json() == {"running": 0, "waiting": 0}
        told = served.get("/metrics").text
        assert 'path="/v1/score",status="429"' in told.replace("'", '"')


def test_no_verdict_is_an_error_and_never_a_score(served):
    body = {"model": "rm", "query": "q", "documents": ["a", "boom"]}
    found = served.post("/v1/rerank", json=body)
    assert found.status_code == 500 and "results" not in found.json()
    body["documents"] = ["a"]
    assert served.post("/v1/rerank", json=body).is_success


def test_a_model_that_compares_reranks_and_scores_nothing():
    with client(Longer(), limits=Limits(samples=6)) as served:
        body = {"model": "rm", "query": "q", "documents": ["a", "ccc", "bb"]}
        found = served.post("/v1/rerank", json=body).json()
        assert [(r["index"], r["relevance_score"]) for r in found["results"]] == [
            (1, 1.0),
            (2, 0.5),
            (0, 0.0),
        ]
        body["documents"].append("d")
        found = served.post("/v1/rerank", json=body)
        assert found.status_code == 400 and "12 comparisons" in found.text
        body = {"model": "rm", "text_1": "p", "text_2": "a"}
        assert "compares two responses" in served.post("/v1/score", json=body).text
