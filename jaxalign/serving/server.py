"""uvicorn with what it lacks: a time for headers, room kept for who does ask."""

from __future__ import annotations

import contextlib
import errno
import resource
import socket
from typing import Any

# File descriptors that are not for connections: libraries, logs, devices.
_RESERVED = 64


def require() -> None:
    """Says what to install where the server's packages are missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Serving needs starlette and uvicorn: pip install 'jaxalign[serve]'. "
            f"({error})"
        ) from error


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that no other program can take the port.

    Who connects before the server runs waits.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port={port}: expected a port in [0, 65535].")
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(f"--host={host}: no such address here ({error}).") from error
    family, *_, address = found[0]
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            address, family=family, backlog=2048, dualstack_ipv6=both
        )
    except OSError as error:
        reason = f"{error.strerror}."
        if error.errno == errno.EADDRINUSE:
            reason = "another program listens there; choose another --port."
        raise OSError(f"Cannot listen on {host}:{port}: {reason}") from error


def configuration(
    app: Any, *, header_seconds: float = 10.0, max_connections: int = 1000, **more: Any
) -> Any:
    """The ``uvicorn.Config`` of an ASGI application.

    The headers of a request have their time from the connection or the end of the
    answer before. Connections are never more than half of what the system lets a
    process open. Beyond them the one that has waited longest with its request is
    closed; where all have asked, new ones get status 503.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY:
        max_connections = min(max_connections, max((files - _RESERVED) // 2, 8))

    class Protocol(H11Protocol):
        """A connection that has to ask in time."""

        _late = None  # the timer while a request is awaited

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_request()
            silent = [c for c in self.connections if c._late is not None]
            if len(self.connections) > max_connections and len(silent) > 1:
                min(silent, key=lambda c: c._late.when())._drop()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._has_request():
                self._stop_waiting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if not self._has_request() and not self.transport.is_closing():
                self._await_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _has_request(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _await_request(self) -> None:
            self._stop_waiting()
            self._late = self.loop.call_later(header_seconds, self._drop)

        def _drop(self) -> None:
            self._stop_waiting()
            # Its place is free at once, before the loop comes to close it.
            self.connections.discard(self)
            self.transport.abort()

        def _stop_waiting(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        # uvicorn counts the connection that asks, and refuses at the limit.
        limit_concurrency=max_connections + 1,
        **more,
    )


def run(config: Any, sock: socket.socket) -> None:
    """Serves on a socket until interrupted."""
    import uvicorn

    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[sock])
