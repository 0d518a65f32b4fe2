"""What every endpoint does with a request and with what goes wrong."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from jaxalign.serving import refusals
from jaxalign.serving.refusals import Refusal, shown
from jaxalign.serving.requests import Limits

# Starlette is an extra: imported where it is used.
if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


async def read_body(request: Request, limits: Limits) -> Any:
    """The JSON body, read no further than the limit."""
    from starlette.requests import ClientDisconnect

    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.body_bytes:
                    raise Refusal(
                        f"The body is larger than {limits.body_bytes} bytes; send "
                        "fewer or shorter prompts.",
                        code="body_too_large",
                        status=413,
                    )
                chunks.append(chunk)
    except TimeoutError:
        raise Refusal(
            f"The body did not arrive in {limits.body_seconds} seconds.", status=408
        ) from None
    except ClientDisconnect:
        raise Refusal("The client left before its request had arrived.") from None
    return refusals.from_json(b"".join(chunks))


_HEADERS = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}


def refusal_response(refusal: Refusal) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(refusal.body(), refusal.status, _HEADERS.get(refusal.status))


async def refused(request: Request, error: Exception) -> Response:
    """Whatever goes wrong, in the API's format."""
    if isinstance(error, Refusal):
        return refusal_response(error)
    path, method = shown(request.url.path), shown(request.method)
    status = getattr(error, "status_code", 500)
    what = {
        404: f"No {path} here; there are {', '.join(_paths(request))}.",
        405: f"{path} does not take {method}.",
    }.get(status, "The server failed; see its log.")
    return refusal_response(Refusal(what, status=status))


def _paths(request: Request) -> list[str]:
    return [route.path for route in request.app.routes]
