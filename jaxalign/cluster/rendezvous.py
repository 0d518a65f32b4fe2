"""The processes of a job meet on a port and learn who is missing."""

from __future__ import annotations

import contextlib
import json
import logging
import selectors
import socket
import time

_log = logging.getLogger(__name__)


class MissingProcessesError(TimeoutError):
    """Some processes of the job did not come in time."""


def rendezvous(address: str, count: int, index: int, timeout: float) -> None:
    """Returns once all processes of the job have called it; else refuses in all.

    Process 0 listens on the coordinator's port, which JAX takes over afterwards.
    """
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + timeout
    if index == 0:
        missing = _collect(int(port), count, deadline)
    else:
        missing = _report(host.strip("[]"), int(port), count, index, deadline)
    if missing:
        raise MissingProcessesError(
            f"Processes {missing} of {count} did not come to {address} within "
            f"{timeout:g} s. Start the command on every host, with the same "
            "--coordinator_address, and let the port through the firewall."
        )


def _greeting(count: int, index: int) -> bytes:
    """What a process says on the coordinator's port; nobody else says it by chance."""
    return f"jaxalign: process {index} of {count}\n".encode()


# Connections that have not said who they are, beside those of the job: a port that
# others can reach is scanned.
_MAX_STRANGERS = 256


def _collect(port: int, count: int, deadline: float) -> list[int]:
    """The processes that did not come; those that did are told.

    Whoever else connects is left alone: what it sends, and whether it sends, waits or
    goes away, changes nothing.
    """
    indices = {_greeting(count, i): i for i in range(1, count)}
    longest = max(map(len, indices), default=0)
    heard: dict[socket.socket, bytes] = {}  # in the order in which they came
    present: dict[int, socket.socket] = {}
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with (
        socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6
        ) as server,
        selectors.DefaultSelector() as selector,
    ):
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)

        def drop(connection: socket.socket) -> None:
            heard.pop(connection, None)
            selector.unregister(connection)
            connection.close()

        while len(present) < count - 1 and time.monotonic() < deadline:
            for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
                connection = key.fileobj
                if connection.fileno() < 0:  # dropped a moment ago
                    continue
                with contextlib.suppress(OSError):
                    if connection is server:
                        connection, _ = server.accept()
                        connection.setblocking(False)
                        selector.register(connection, selectors.EVENT_READ)
                        heard[connection] = b""
                        if len(heard) > count + _MAX_STRANGERS:
                            drop(next(iter(heard)))
                        continue
                said = b""
                with contextlib.suppress(OSError):
                    said = connection.recv(longest + 1)
                whole = heard.get(connection, b"") + said
                # One that came and speaks again, or has gone, has to come again.
                known = connection in heard and said
                if known and (index := indices.get(whole)):
                    del heard[connection]
                    if index in present:
                        drop(present[index])
                    present[index] = connection
                elif known and any(g.startswith(whole) for g in indices):
                    heard[connection] = whole
                else:
                    if said:
                        _log.warning("Somebody who is none of us said %r", whole[:80])
                    present = {i: c for i, c in present.items() if c is not connection}
                    drop(connection)
        for connection in list(heard):
            drop(connection)
    missing = sorted(set(range(1, count)) - set(present))
    for connection in present.values():
        with connection, contextlib.suppress(OSError):  # it may have gone just now
            connection.settimeout(5)
            connection.sendall(json.dumps({"missing": missing}).encode())
            # The other side closes first, so that no port is left waiting here.
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
    return missing


def _report(host: str, port: int, count: int, index: int, deadline: float) -> list[int]:
    while time.monotonic() < deadline:
        # Process 0 may not be there yet, and what is there may be somebody else.
        with (
            contextlib.suppress(OSError, ValueError, KeyError, TypeError),
            socket.create_connection((host, port), timeout=5) as connection,
        ):
            connection.sendall(_greeting(count, index))
            connection.settimeout(max(deadline - time.monotonic(), 0) + 10)
            answer = b""
            while len(answer) < 1 << 20 and (more := connection.recv(4096)):
                answer += more
            return [int(i) for i in json.loads(answer)["missing"]]
        time.sleep(0.2)
    return [0]
