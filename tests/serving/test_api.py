"""The server on loopback, asked by the real `openai` client and by raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time
import types
import urllib.error
import urllib.request

import jax
import openai
import pytest
import sentence_pieces
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.models import T5, T5Config, init_params
from jaxalign.serving import api, refusals
from jaxalign.serving import backend as backends
from jaxalign.serving import server as serving
from jaxalign.serving.answers import Answer
from jaxalign.serving.backend import EngineBackend
from jaxalign.serving.batching import Settings
from jaxalign.serving.requests import Limits, parse
from jaxalign.vocabularies import ByteVocabulary

HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\n"
)
LIMITS = Limits(body_bytes=20_000, prompt_tokens=40, new_tokens=8, samples=8)


@contextlib.contextmanager
def running(backend, config=None, **options):
    options = {"limits": LIMITS, "batch_size": 4, **options}
    app = api.application(backend, ByteVocabulary(), model="tiny", **options)
    config = {"port": 0, "log_level": "error", **(config or {})}
    server = uvicorn.Server(serving.configuration(app, **config))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield types.SimpleNamespace(app=app, port=port)
    finally:
        server.should_exit = True
        thread.join()


class Recorder:
    """A backend that answers with the seed's digits, when it is allowed to."""

    def __init__(self):
        self.open = threading.Event()
        self.begun = []
        self.running = {}
        self.resets = 0

    def submit(self, prompt, seed, settings, *, max_new_tokens, num_samples):
        text = bytes(t - 3 for t in prompt[:-1]).decode()
        self.begun.append(text)
        self.running[len(self.begun)] = (
            text,
            [
                ([ord(c) + 3 for c in f"{seed}.{k}"] + [1])[:max_new_tokens]
                for k in range(num_samples)
            ],
        )
        return len(self.begun)

    def step(self):
        self.open.wait(10.0)
        if any("boom" in text for text, _ in self.running.values()):
            raise ZeroDivisionError("inside the engine")
        found = {ticket: samples for ticket, (_, samples) in self.running.items()}
        self.running.clear()
        return found

    def progress(self):
        return {}

    def cancel(self, ticket):
        self.running.pop(ticket, None)

    def reset(self):
        self.running.clear()
        self.resets += 1


@pytest.fixture(scope="module")
def policy():
    """A random network."""
    model = T5(T5Config(259, 16, 2, 8, 16, 1, 1))
    params = init_params(model, jax.random.key(0))
    return types.SimpleNamespace(
        model=model, params=params, vocabulary=ByteVocabulary()
    )


@pytest.fixture(scope="module")
def tiny(policy):
    """A server of it."""
    backends._TOKENS_PER_STEP = 2  # streams come in several pieces
    backend = EngineBackend(
        policy, max_prompt_tokens=40, max_new_tokens=8, max_samples=8, batch_size=4
    )
    with running(backend) as server:
        yield server


@pytest.fixture
def recorder():
    backend = Recorder()
    with running(backend, max_waiting=3) as server:
        server.backend = backend
        yield server
        backend.open.set()


def client(server, kind=openai.OpenAI):
    return kind(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    )


def post(server, body, path="/v1/completions"):
    """Status and JSON of a raw request."""
    url = f"http://127.0.0.1:{server.port}{path}"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def health(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health") as response:
        return json.load(response)


def wait_until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen in 5 seconds")


def test_completions(tiny):
    with client(tiny) as api_client:
        first = api_client.completions.create(
            model="tiny", prompt=["say a", "say b"], n=2, max_tokens=5, seed=3
        )
        assert [c.index for c in first.choices] == [0, 1, 2, 3]
        assert first.usage.prompt_tokens == 12
        assert 0 < first.usage.completion_tokens <= 20
        assert {c.finish_reason for c in first.choices} <= {"stop", "length"}
        # The same seed gives the same texts, alone or beside another prompt.
        alone = api_client.completions.create(
            model="tiny", prompt="say a", n=2, max_tokens=5, seed=3
        )
        assert [c.text for c in alone.choices] == [c.text for c in first.choices[:2]]
        ids = [ord(c) + 3 for c in "say a"]
        tokens = api_client.completions.create(
            model="tiny", prompt=ids, n=2, max_tokens=5, seed=3
        )
        assert [c.text for c in tokens.choices] == [c.text for c in alone.choices]
        assert [m.id for m in api_client.models.list()] == ["tiny"]


def test_chat_and_streaming(tiny):
    with client(tiny) as api_client:
        settings = {"model": "tiny", "max_tokens": 5, "seed": 3}
        completion = api_client.completions.create(prompt="say a", **settings)
        messages = [{"role": "user", "content": "say a"}]
        chat = api_client.chat.completions.create(messages=messages, **settings)
        assert chat.choices[0].message.content == completion.choices[0].text
        assert chat.choices[0].message.role == "assistant"
        chunks = list(
            api_client.chat.completions.create(
                messages=messages,
                stream=True,
                stream_options={"include_usage": True},
                **settings,
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == completion.choices[0].text
        assert chunks[-2].choices[0].finish_reason == chat.choices[0].finish_reason
        assert chunks[-1].usage == chat.usage
        parts = api_client.completions.create(prompt="say a", stream=True, **settings)
        assert "".join(p.choices[0].text for p in parts) == text


def test_a_stream_comes_in_pieces_that_make_the_whole(tiny):
    settings = {"model": "tiny", "prompt": ["say a", "say b"], "n": 2, "seed": 5}
    with client(tiny) as api_client:
        whole = api_client.completions.create(**settings)
        chunks = list(api_client.completions.create(**settings, stream=True))
    texts, ends = [""] * 4, {}
    for chunk in chunks:
        (choice,) = chunk.choices
        assert choice.index not in ends
        texts[choice.index] += choice.text
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == [c.text for c in whole.choices]
    assert [ends[i] for i in range(4)] == [c.finish_reason for c in whole.choices]
    # Two tokens a step, up to eight tokens: more than one piece and an end each.
    assert len(chunks) > 8


def test_settings_are_data_that_nothing_is_compiled_for(tiny):
    from jaxalign.decoding import seats

    with client(tiny) as api_client:

        def ask(**settings):
            answer = api_client.completions.create(
                model="tiny", prompt="say a", seed=3, **settings
            )
            return answer.choices[0].text

        greedy = ask(temperature=0)
        compiled = seats.run._cache_size()
        texts = {ask(temperature=0.1 * k, top_p=0.99) for k in range(1, 8)}
        assert ask(temperature=2, top_p=1e-6) == greedy  # a nucleus of one token
        assert greedy.startswith(ask(temperature=0, max_tokens=3))
        assert len(texts) > 1 and seats.run._cache_size() == compiled


@pytest.mark.parametrize(
    ("tokens", "complete", "expected"),
    [
        ("abc", False, ("abc", None)),
        ("abcE", False, ("abc", None)),  # E may begin END
        ("abcEN", False, ("abc", None)),
        ("abcEN", True, ("abcEN", "length")),
        ("abcENDxyz", False, ("abc", "stop")),
        ("abcENx", False, ("abcENx", None)),
        ("ab\xc3", False, ("ab", None)),  # half a character
    ],
)
def test_a_stream_holds_back_what_may_change(tokens, complete, expected):
    body = {"model": "tiny", "prompt": "x", "stop": ["END"], "max_tokens": 20}
    limits = dataclasses.replace(LIMITS, new_tokens=20)
    asked = parse(
        body, chat=False, model="tiny", vocabulary=ByteVocabulary(), limits=limits
    )
    answer = Answer(asked, ByteVocabulary(), chat=False, model="tiny")
    ids = [byte + 3 for byte in tokens.encode("latin-1")]
    assert answer.text(ids, complete) == expected


def test_two_hundred_concurrent_requests_are_all_answered(tiny):
    async def ask_all():
        async with client(tiny, openai.AsyncOpenAI) as api_client:
            return await asyncio.gather(
                *(
                    api_client.completions.create(
                        model="tiny", prompt=f"say {i % 10}", max_tokens=5, seed=i % 10
                    )
                    for i in range(200)
                )
            )

    answers = asyncio.run(ask_all())
    texts = [answer.choices[0].text for answer in answers]
    # Twenty of each, equal whoever shared their batches.
    assert len(texts) == 200 and texts == texts[:10] * 20
    assert health(tiny) == {"running": 0, "waiting": 0}


def test_stops_cut_the_text(recorder):
    recorder.backend.open.set()
    with client(recorder) as api_client:
        answer = api_client.completions.create(
            model="tiny", prompt="x", seed=1234, stop=["4", ".", "3"]
        )
    assert answer.choices[0].text == "12"
    assert answer.choices[0].finish_reason == "stop"


def test_conversations_name_the_roles(recorder):
    recorder.backend.open.set()
    with client(recorder) as api_client:
        api_client.chat.completions.create(
            model="tiny",
            messages=[
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            ],
        )
    assert recorder.backend.begun == ["system: be kind\nuser: hi\nassistant:"]


def test_the_queue_is_served_in_order_and_bounded(recorder):
    """Two prompts run, three requests wait, the next is refused."""

    async def ask_all():
        async with client(recorder, openai.AsyncOpenAI) as api_client:

            def ask(prompt, **settings):
                return asyncio.ensure_future(
                    api_client.completions.create(
                        model="tiny", prompt=prompt, seed=7, **settings
                    )
                )

            tasks = [ask(["first"] * 4)]
            begun = recorder.backend.begun
            await asyncio.to_thread(wait_until, lambda: len(begun) == 4)
            for prompt, temperature in (("a", 1.0), ("b", 0.5), ("c", 1.0)):
                tasks.append(ask(prompt, temperature=temperature, max_tokens=2))
                waiting = len(tasks) - 1
                await asyncio.to_thread(
                    wait_until, lambda n=waiting: health(recorder)["waiting"] == n
                )
            # The queue holds three; the fourth is told so, at once, streaming or not.
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError, match="Too many requests"):
                    await ask("d", stream=stream)
            recorder.backend.open.set()
            return [(await task).choices[0].text for task in tasks]

    assert asyncio.run(ask_all()) == ["7.0", "7.", "7.", "7."]
    assert recorder.backend.begun == ["first"] * 4 + ["a", "b", "c"]


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_are_forgotten(recorder, stream):
    body = json.dumps({"model": "tiny", "prompt": "PROMPT", "stream": stream})

    def leave(prompt):
        raw = body.replace("PROMPT", prompt).encode()
        sock = socket.create_connection(("127.0.0.1", recorder.port))
        head = HEAD + f"Content-Length: {len(raw)}\r\n\r\n".encode()
        sock.sendall(head + raw)
        return sock

    running_one = leave("running")
    wait_until(lambda: recorder.backend.begun == ["running"])
    waiting_ones = [leave(f"waiting {i}") for i in range(3)]
    wait_until(lambda: health(recorder)["waiting"] == 3)
    for sock in (running_one, *waiting_ones):
        sock.close()
    wait_until(lambda: health(recorder)["waiting"] == 0)
    recorder.backend.open.set()
    wait_until(lambda: health(recorder) == {"running": 0, "waiting": 0})
    assert recorder.backend.begun == ["running"]  # nobody computed for the others
    with client(recorder) as api_client:  # and the server goes on
        assert api_client.completions.create(model="tiny", prompt="x").choices


def test_a_failing_engine_fails_what_runs_alone(recorder, caplog):
    recorder.backend.open.set()
    with client(recorder) as api_client:
        with pytest.raises(openai.InternalServerError, match="The server failed"):
            api_client.completions.create(model="tiny", prompt="boom")
        assert recorder.backend.resets == 1
        with pytest.raises(openai.APIError, match="The server failed"):
            list(
                api_client.completions.create(model="tiny", prompt="boom", stream=True)
            )
        assert "inside the engine" in caplog.text
        assert api_client.completions.create(model="tiny", prompt="x").choices


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"prompt": None}, 400, "prompt must be a string"),
        ({"prompt": []}, 400, "not empty"),
        ({"prompt": "x" * 40}, 400, "longer than the 40 tokens"),
        ({"prompt": [5, 999]}, 400, "holds the id 999; expected ids in"),
        ({"prompt": ["x"] * 5, "n": 2}, 400, "5 prompts times n = 2 are more than 8"),
        ({"n": 9}, 400, "n must be an integer in [1, 8], got 9"),
        ({"n": True}, 400, "n must be an integer"),
        ({"max_tokens": 9}, 400, "max_tokens must be an integer in [1, 8]"),
        ({"temperature": -1}, 400, "temperature must be a number in [0.0, 2.0]"),
        ({"temperature": float("nan")}, 400, "temperature must be a number"),
        ({"top_p": "0.5"}, 400, "top_p must be a number"),
        ({"stop": ["a"] * 5}, 400, "stop must be a string or up to 4"),
        ({"stream": "yes"}, 400, "stream must be a bool, got str"),
        ({"temprature": 1}, 400, "Did you mean 'temperature'?"),
        ({"logprobs": 5}, 400, "logprobs is not supported"),
        ({"model": "gpt"}, 404, "No model 'gpt' here; expected 'tiny'"),
        ({"model": None}, 400, "model must be a str, got null"),
        ({"stop": 0}, 400, "none empty; got 0"),
        ({"stop": {}}, 400, "none empty; got dict"),
        ({"stop": ""}, 400, "none empty; got ''"),
        ({"stop": False}, 400, "none empty; got False"),
        ({"logprobs": 0}, 400, "logprobs is not supported; leave it out. Got 0"),
        ({"echo": 0}, 400, "echo is not supported"),
        ({"frequency_penalty": False}, 400, "frequency_penalty is not supported"),
        ({"best_of": 2}, 400, "best_of is not supported"),
        ({"stream_options": "x"}, 400, "stream_options must be a dict, got str"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            400,
            "stream_options.include_usage must be a bool, got int",
        ),
        (
            {"stream": True, "stream_options": {"usage": True}},
            400,
            "stream_options.usage is not supported",
        ),
        ({"user": 5}, 400, "user must be a str, got int"),
        ({"metadata": {"a": 1}}, 400, "metadata must hold strings, got int in 'a'"),
        ({"max_completion_tokens": 3}, 400, "Did you mean 'max_tokens'?"),
        ({"x" * 9999: 1}, 400, "Unknown field 'xxx"),
        ({"prompt": [10**4000]}, 400, "prompt holds the id 1000"),
        ({"prompt": "a\ud83d b"}, 400, "prompt holds half a character, '\\ud83d' at"),
        ({"prompt": ["a", "\udc00"]}, 400, "prompt[1] holds half a character"),
        ({"stop": "\ud800"}, 400, "stop holds half a character"),
        ({"\ud800": 1}, 400, "the name of a field holds half a character"),
        ({"metadata": {"a": [{"\udfff": 1}]}}, 400, "of a field metadata.a[0] holds"),
    ],
)
def test_wrong_requests_are_refused_with_the_reason(tiny, change, status, message):
    body = {"model": "tiny", "prompt": "x", **change}
    got, answer = post(tiny, json.dumps(body).encode())
    assert got == status and message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert len(answer["error"]["message"]) < 300


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"role": "robot", "content": "x"}], "messages[0].role must be"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "must be text"),
        (["x"], "messages[0] must be an object"),
        (None, "at least one message"),
        ([{"role": "user"}], "messages[0].content must be text"),
        ([{"role": "user", "content": []}], "Got an empty list"),
        ([{"role": "user", "content": 5}], "must be text; images and tools are not"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role must be"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name is not"),
        ([{"role": "user", "content": "x", "nmae": "a"}], "messages[0].nmae is not"),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"id": "a"}]}],
            "messages[0].tool_calls is not supported",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "text": "b"}]}],
            "messages[0].content[0] must be",
        ),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content holds half"),
    ],
)
def test_wrong_messages_are_refused(tiny, messages, message):
    body = json.dumps({"model": "tiny", "messages": messages}).encode()
    status, answer = post(tiny, body, "/v1/chat/completions")
    assert status == 400 and message in answer["error"]["message"]


def test_what_is_understood_means_what_it_says():
    def read(chat, **body):
        body |= (
            {"messages": [{"role": "user", "content": "x"}]}
            if chat
            else {"prompt": "x"}
        )
        return parse(
            {"model": "tiny", **body},
            chat=chat,
            model="tiny",
            vocabulary=ByteVocabulary(),
            limits=LIMITS,
        )

    assert read(False, max_tokens=3).max_new_tokens == 3
    assert read(True, max_tokens=3, max_completion_tokens=None).max_new_tokens == 3
    assert read(True, max_tokens=None, max_completion_tokens=4).max_new_tokens == 4
    assert read(True, max_tokens=3, max_completion_tokens=5).max_new_tokens == 5
    assert read(True, max_tokens=None).max_new_tokens == LIMITS.new_tokens
    assert read(False, n=2, best_of=2).num_samples == 2
    assert read(
        False, stream=True, stream_options={"include_usage": True}
    ).include_usage
    assert read(True, stream_options={"include_usage": True}).max_new_tokens
    assert not read(
        True, stream=True, stream_options={"include_usage": None}
    ).include_usage
    # All that the API's own clients send where they ask for nothing of it.
    nothing = {"logprobs": False, "top_logprobs": None, "tools": [], "user": "me"}
    nothing |= {"tool_choice": "auto", "logit_bias": {}, "presence_penalty": 0.0}
    nothing |= {
        "response_format": {"type": "text"},
        "stop": None,
        "metadata": {"a": "b"},
    }
    assert read(True, **nothing).prompts == read(True).prompts
    asked = read(False, logprobs=None, suffix="", echo=False, stop=["a"])
    assert asked.stops.texts == ("a",)


FIELDS = [
    *("model", "prompt", "messages", "n", "temperature", "top_p", "seed", "stop"),
    *("stream", "stream_options", "max_tokens", "max_completion_tokens", "logprobs"),
    *("best_of", "echo", "suffix", "user", "metadata", "tools", "tool_choice", "store"),
    *("response_format", "logit_bias", "top_logprobs", "frequency_penalty", "name"),
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(0, 9)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["tiny", "user", "text", "\ud83d", "a\x00", "auto", "\r\n"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "include_usage", "\ud800"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_body_is_understood_or_refused(fields, chat):
    """Neither an error of ours, nor words that an answer could not hold."""
    right = (
        {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    )
    raw = json.dumps({"model": "tiny", **right, **fields}).encode()
    try:
        asked = parse(
            refusals.from_json(raw),
            chat=chat,
            model="tiny",
            vocabulary=ByteVocabulary(),
            limits=LIMITS,
        )
    except refusals.Refusal as refusal:
        assert 400 <= refusal.status < 500
        told = json.dumps(refusal.body(), ensure_ascii=False).encode()
        assert len(told) < 700 and b" at 0x" not in told
    else:
        assert 1 <= asked.max_new_tokens <= LIMITS.new_tokens
        assert all(type(i) is int for prompt in asked.prompts for i in prompt)
        assert isinstance(asked.stream, bool)


def test_a_field_that_is_given_twice_is_refused(tiny):
    status, answer = post(tiny, b'{"model": "tiny", "prompt": "x", "prompt": "y"}')
    assert status == 400 and "'prompt' is given twice" in answer["error"]["message"]


def test_malformed_and_oversized_bodies_are_refused(tiny):
    status, answer = post(tiny, b"{")
    assert status == 400 and "The body is no JSON" in answer["error"]["message"]
    status, answer = post(tiny, b"[" * 15_000)
    assert status == 400
    status, answer = post(tiny, b"[]")
    assert status == 400 and "must be a JSON object" in answer["error"]["message"]
    status, answer = post(tiny, b" " * 20_001)
    assert status == 413 and "larger than 20000 bytes" in answer["error"]["message"]
    status, answer = post(tiny, b"{}", "/v1/embeddings")
    assert status == 404 and "/v1/completions" in answer["error"]["message"]
    status, answer = post(tiny, None)
    assert status == 405


def test_a_body_that_never_ends_is_given_up():
    limits = dataclasses.replace(LIMITS, body_seconds=0.5)
    with (
        running(Recorder(), limits=limits) as server,
        socket.create_connection(("127.0.0.1", server.port)) as sock,
    ):
        sock.sendall(HEAD)
        sock.sendall(b"Content-Length: 100\r\n\r\n{")
        sock.settimeout(30.0)
        assert b"408" in sock.recv(1000)


# Engines; of the sizes of the server's, so that nothing is compiled twice.


def make(policy, **options):
    return EngineBackend(
        policy,
        max_prompt_tokens=40,
        max_new_tokens=8,
        max_samples=8,
        batch_size=4,
        **options,
    )


def submit(backend, length, num_samples=1, seed=0):
    prompt = [*range(3, 2 + length), 1]
    return backend.submit(
        prompt, seed, Settings(1.0, 1.0), max_new_tokens=4, num_samples=num_samples
    )


def answers(backend, tickets):
    found = {}
    for _ in range(200):
        found |= backend.step()
        if set(found) >= set(tickets):
            return [found[ticket] for ticket in tickets]
    raise AssertionError(f"{found} are not the answers to {tickets}.")


def test_engines_are_bounded_and_answers_do_not_depend_on_it(policy):
    asked = [(5, 1), (20, 1), (6, 2), (6, 1), (21, 1), (7, 3), (7, 1)]
    free = make(policy)
    tickets = [submit(free, *one, seed=i) for i, one in enumerate(asked)]
    expected = answers(free, tickets)
    assert free.engines == 3
    for bound in ({"max_engines": 1}, {"max_engine_bytes": 1}):
        backend = make(policy, **bound)
        tickets = [submit(backend, *one, seed=i) for i, one in enumerate(asked)]
        backend.cancel(submit(backend, 20))
        assert answers(backend, tickets) == expected
        assert backend.engines == 1


def test_the_engine_that_has_been_idle_longest_goes(policy):
    backend = make(policy, max_engines=2)
    for one in ((5, 1), (20, 1), (5, 1), (5, 2)):
        answers(backend, [submit(backend, *one)])
    assert list(backend._engines) == [(16, 1), (16, 8)]
    two = backend.engine_bytes
    bounded = make(policy, max_engine_bytes=two)
    for one in ((5, 1), (20, 1), (5, 2), (5, 1)):
        answers(bounded, [submit(bounded, *one)])
        assert 0 < bounded.engine_bytes <= two
    with pytest.raises(ValueError, match="max_engines must be at least 1"):
        make(policy, max_engines=0)


class Scripted(Recorder):
    """A backend whose samples are one text, eight tokens a step."""

    def __init__(self, vocabulary, text):
        super().__init__()
        self.ids = vocabulary.encode(text)
        self.steps, self.at, self.ended = 0, {}, []

    def submit(self, prompt, seed, settings, *, max_new_tokens, num_samples):
        self.at[len(self.at)] = 0
        self.running[len(self.at) - 1] = num_samples, self.ids[:max_new_tokens]
        return len(self.at) - 1

    def step(self):
        self.steps += 1
        done = {}
        for ticket, (n, ids) in list(self.running.items()):
            self.at[ticket] += 8
            if self.at[ticket] >= len(ids):
                done[ticket] = [ids] * n
                del self.running[ticket]
        return done

    def progress(self):
        return {t: [ids[: self.at[t]]] * n for t, (n, ids) in self.running.items()}

    def end(self, ticket, sample):
        self.ended.append((ticket, sample))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stop_ends_decoding_and_the_count_of_tokens(stream, n):
    text = "A: yes\nQ: " + "more " * 30
    backend = Scripted(ByteVocabulary(), text)
    limits = dataclasses.replace(LIMITS, new_tokens=200)
    settings = {"model": "tiny", "prompt": "x", "stop": ["\n", "s\nQ"], "n": n}
    with running(backend, limits=limits) as server, client(server) as api_client:
        if stream:
            options = {"include_usage": True}
            chunks = list(
                api_client.completions.create(
                    **settings, stream=True, stream_options=options
                )
            )
            texts = [
                "".join(
                    c.choices[0].text
                    for c in chunks
                    if c.choices and c.choices[0].index == i
                )
                for i in range(n)
            ]
            usage = chunks[-1].usage
        else:
            answer = api_client.completions.create(**settings)
            texts, usage = [c.text for c in answer.choices], answer.usage
            assert {c.finish_reason for c in answer.choices} == {"stop"}
    assert texts == ["A: yes"] * n
    assert backend.steps == 1 and not backend.running
    assert usage.completion_tokens == n * len("A: yes\n")


def test_pieces_of_a_stream_never_break_an_escape(tmp_path):
    vocabulary = sentence_pieces.vocabularies(str(tmp_path))[1]
    asked = parse(
        {"model": "tiny", "prompt": "x", "max_tokens": 90, "stop": ["}}"]},
        chat=False,
        model="tiny",
        vocabulary=vocabulary,
        limits=dataclasses.replace(LIMITS, new_tokens=90),
    )
    answer = Answer(asked, vocabulary, chat=False, model="tiny")
    text = 'if x < y:\n\treturn {"a": §}, 日本 🎉 } ok'
    ids = [*vocabulary.encode(text), 1]
    told = ""
    for n in range(len(ids) + 1):
        now, _ = answer.text(ids[:n], complete=False)
        assert now.startswith(told)
        told = now
    assert told == text
