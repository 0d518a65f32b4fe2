"""Who may ask, what is counted, connections that never ask, engines that make room."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import sys
import time

import pytest
from echo_server import running

from jaxalign import cli
from jaxalign.serving import api, guard, server
from jaxalign.serving.refusals import Refusal

JSON = {"Content-Type": "application/json"}
BODY = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 5}).encode()


def ask(port, method="POST", path="/v1/completions", body=BODY, **headers):
    """Status, headers and body of the answer to a request with such headers alone."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    headers = {"Host": f"127.0.0.1:{port}", **headers}
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.putheader("Content-Length", str(len(body or b"")))
    connection.endheaders(body)
    with contextlib.closing(connection), connection.getresponse() as answer:
        return answer.status, answer.headers, answer.read().decode()


@pytest.fixture(scope="module")
def open_port():
    with running(hosts=["My.Server"]) as port:
        yield port


JSON_HEADER = {"Content_Type": "application/json"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Content_Type": "Application/JSON; charset=UTF-8"}, 200),
        ({"Content_Type": None}, 415),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "text/plain; application/json"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content_Type": "multipart/form-data; boundary=a"}, 415),
        ({"Content_Type": "application/json; charset=latin-1"}, 415),
        ({"Content_Type": "application/jsonp"}, 415),
        ({"Host": "localhost:9"}, 200),
        ({"Host": "LOCALHOST."}, 200),
        ({"Host": "a.localhost"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "10.0.0.3"}, 200),
        ({"Host": "my.server:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:8000"}, 403),
        ({"Host": "user@localhost"}, 403),
        ({"Host": "my.server.evil.example"}, 403),
        ({"Host": "a:b:c"}, 403),
        ({"Host": "127.0.0.1?evil.example"}, 403),
        ({"Host": "127.0.0.1/evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "."}, 403),
        ({"Host": "localhost:99999999"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://my.server"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:8080"}, 200),
        ({"Origin": "http://[::1]:3000"}, 200),
        ({"Origin": "http://203.0.113.5"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "file://"}, 403),
        ({"Origin": "http://[::1"}, 403),
    ],
)
def test_pages_and_names_of_others_are_refused(open_port, headers, status):
    got, _, text = ask(open_port, **{**JSON_HEADER, **headers})
    assert got == status, text
    assert status == 200 or json.loads(text)["error"]["type"] == "invalid_request_error"
    if status == 403:  # whatever is asked
        assert ask(open_port, "GET", "/metrics", None, **headers)[0] == 403


def test_any_name_may_be_allowed():
    with running(hosts=["*"]) as port:
        assert ask(port, **JSON_HEADER, Host="evil.example", Origin="null")[0] == 200


def test_an_api_key_is_wanted_of_all_but_those_who_watch():
    with running(api_key="secret") as port:
        for wrong in (None, "Bearer wrong", "Bearer ", "secret", "Basic secret"):
            status, headers, text = ask(port, **JSON_HEADER, Authorization=wrong)
            assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
            assert "secret" not in text and "API key" in text
        right = {**JSON_HEADER, "Authorization": "bearer secret"}
        assert ask(port, **right)[0] == 200
        assert ask(port, "GET", "/v1/models", None)[0] == 401
        assert ask(port, "GET", "/metrics", None)[0] == 401
        assert ask(port, "GET", "/health", None)[0] == 200


def test_metrics_count_what_was_done():
    with running() as port:
        assert ask(port, **JSON_HEADER)[0] == 200
        streamed = BODY.replace(b"{", b'{"stream": true, ')
        assert ask(port, **JSON_HEADER, body=streamed)[0] == 200
        assert ask(port)[0] == 415
        assert ask(port, "GET", "/nothing/" + "x" * 99, None)[0] == 404
        status, headers, text = ask(port, "GET", "/metrics", None)
    assert status == 200
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")
    )
    counted = "jaxalign_requests_total"
    assert found[f'{counted}{{path="/v1/completions",status="200"}}'] == "2"
    assert found[f'{counted}{{path="/v1/completions",status="415"}}'] == "1"
    assert found[f'{counted}{{path="other",status="404"}}'] == "1"
    bucket = 'jaxalign_request_seconds_bucket{path="/v1/completions",le='
    assert found[f'{bucket}"+Inf"}}'] == "3"
    counts = [int(n) for name, n in found.items() if name.startswith(bucket)]
    assert counts == sorted(counts)
    assert found["jaxalign_prompt_tokens_total"] == "4"
    assert found["jaxalign_completion_tokens_total"] == "4"
    assert found["jaxalign_running_requests"] == found["jaxalign_waiting_requests"]
    assert found["jaxalign_engines"] == "2"
    # Each name is described once, before its samples.
    names = [line.split()[2] for line in text.splitlines() if "# TYPE" in line]
    assert len(names) == len(set(names)) == text.count("# HELP")


def closed(sock: socket.socket) -> bool:
    sock.settimeout(10)
    try:
        return sock.recv(100) == b""
    except ConnectionResetError:
        return True


def test_a_connection_that_does_not_ask_is_closed():
    with running({"header_seconds": 0.4}) as port:
        silent, half, again, slow = (
            socket.create_connection(("127.0.0.1", port)) for _ in range(4)
        )
        with silent, half, again, slow:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: ")
            again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with again.makefile("rb") as answer:
                lines = iter(answer.readline, b"\r\n")
                assert next(lines).startswith(b"HTTP/1.1 200")
                headers = dict(line.decode().lower().split(": ") for line in lines)
                answer.read(int(headers["content-length"]))
            again.sendall(b"GET /hea")  # and no more
            # Headers that came are enough: a body has its own time.
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
            slow.sendall(b"Content-Type: application/json\r\n")
            slow.sendall(f"Content-Length: {len(BODY)}\r\n\r\n".encode())
            assert closed(silent) and closed(half) and closed(again)
            time.sleep(0.3)
            slow.sendall(BODY)
            assert slow.recv(1000).startswith(b"HTTP/1.1 200")


def test_connections_that_do_not_ask_make_room_for_those_that_do():
    with running({"header_seconds": 60, "max_connections": 8}) as port:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        for sock in idle:
            with contextlib.suppress(OSError):
                sock.sendall(b"POST / HTTP/1.1\r\n")
        try:
            for _ in range(3):
                assert ask(port, **JSON_HEADER)[0] == 200
            assert closed(idle[0])  # the one that has waited longest
        finally:
            for sock in idle:
                sock.close()


def test_a_missing_extra_and_a_taken_port_are_told_before_the_model_is_read(
    monkeypatch, capsys
):
    command = ["serve", "--checkpoint=/no/such/run"]
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert cli.main([*command, f"--port={port}"]) == 2
    told = capsys.readouterr().err
    assert f"Cannot listen on 127.0.0.1:{port}: another program listens" in told
    assert cli.main([*command, "--port=99999"]) == 2
    assert "expected a port in [0, 65535]" in capsys.readouterr().err
    assert cli.main([*command, "--host=no.such.host.invalid", "--port=0"]) == 2
    assert "--host=no.such.host.invalid: no such address" in capsys.readouterr().err
    monkeypatch.setenv(api.KEY_VARIABLE, "schlüssel")
    assert cli.main([*command, "--port=0"]) == 2
    assert "must be printable ASCII" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert "pip install 'jaxalign[serve]'" in told
    # No line of gin's about a function and where it lies.
    assert len(told.splitlines()) == 1 and "0x" not in told


def test_content_types_are_read_whole():
    with pytest.raises(Refusal, match="got 'application/json', 'text/plain'"):
        guard.require_json(["application/json", "text/plain"])
