"""Who may ask: the checks that come before a request is read.

A server on loopback is reachable by every web page that its user looks at, directly or
by a name that its owner lets point here. So the names under which a client may call
this server are known ones, a page has to come from one of them too, and what is not
safe takes JSON alone, which no page can send to another origin unasked.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
from collections.abc import Collection, Iterable
from typing import Any

from jaxalign.serving.metrics import Metrics
from jaxalign.serving.refusals import Refusal, shown

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/rerank", "/v1/score")
PATHS += ("/v1/models", "/health", "/metrics")
_HOST = re.compile(r"(\[[\da-f:.]+\]|[\w.-]+)(?::\d{1,5})?", re.ASCII | re.IGNORECASE)
_OPEN = ("/health",)  # asked by what watches the server, which has no key


class Guard:
    """ASGI middleware: refuses whom it should, counts every answer.

    A host ``"*"`` is any. ``refuse`` makes the response of a `Refusal`.
    """

    def __init__(
        self,
        app: Any,
        *,
        hosts: Collection[str],
        api_key: str | None,
        metrics: Metrics,
        refuse: Any,
    ):
        self._app = app
        self._hosts = {"localhost", *(host.lower() for host in hosts if host)}
        self._key = None if api_key is None else api_key.encode()
        self._metrics = metrics
        self._refuse = refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = 499  # unless something is answered

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        app = self._app
        try:
            self._check(scope)
        except Refusal as refusal:
            app = self._refuse(refusal)
        try:
            await app(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._metrics.answered(path, status, time.monotonic() - began)

    def _check(self, scope: Any) -> None:
        address, _ = scope.get("server") or (None, None)
        for host in _values(scope, b"host"):
            name = _name(host)
            if not (self._named(name) or _address(name) or name == address):
                raise Refusal(
                    f"This server is not called {shown(host)}; if it should be, start "
                    "it with --allowed_hosts=NAME.",
                    code="host_not_allowed",
                    status=403,
                )
        for origin in _values(scope, b"origin"):
            scheme, _, netloc = origin.partition("://")
            page = _name(netloc)
            # Anybody may put a page at his own address: only this machine's counts.
            ours = self._named(page) or getattr(_address(page), "is_loopback", False)
            if not (ours and scheme in ("http", "https")) and "*" not in self._hosts:
                raise Refusal(
                    f"Pages of {shown(origin)} may not ask this server; to allow "
                    "those of a host, start it with --allowed_hosts=NAME.",
                    code="origin_not_allowed",
                    status=403,
                )
        if self._key is None or scope["path"] in _OPEN:
            return
        given = [
            value[7:].strip()
            for value in _values(scope, b"authorization")
            if value[:7].lower() == "bearer "
        ]
        # All of the key is compared, whatever is wrong.
        if len(given) != 1 or not hmac.compare_digest(
            given[0].encode("latin-1"), self._key
        ):
            raise Refusal(
                "This server wants its API key: Authorization: Bearer KEY.",
                code="invalid_api_key",
                status=401,
            )

    def _named(self, name: str) -> bool:
        """Whether a host is one of those given, or this machine."""
        return bool({"*", name} & self._hosts) or name.endswith(".localhost")


def _name(netloc: str) -> str:
    """The host of ``HOST`` or ``HOST:PORT``; empty if it is neither."""
    match = _HOST.fullmatch(netloc)
    return match[1].lower().strip("[]").removesuffix(".") if match else ""


def _address(name: str) -> Any:
    """A host as an IP address, which no name server of others can give, or None."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def require_json(content_types: Iterable[str]) -> None:
    """Refuses what does not say that it is JSON in UTF-8."""
    given = list(content_types)
    kind, _, rest = (given[0] if len(given) == 1 else "").partition(";")
    parameters = rest.lower().replace(" ", "").replace('"', "").strip(";")
    fits = parameters in ("", "charset=utf-8", "charset=utf8")
    if kind.strip().lower() != "application/json" or not fits:
        came = ", ".join(map(shown, given)) or "none"
        raise Refusal(
            f"Content-Type must be application/json, got {came}.",
            code="unsupported_media_type",
            status=415,
        )


def _values(scope: Any, name: bytes) -> list[str]:
    return [v.decode("latin-1") for n, v in scope["headers"] if n.lower() == name]
