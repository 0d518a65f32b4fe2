"""The HTTP API: ``/v1/completions`` and ``/v1/chat/completions`` as OpenAI has them.

Of a reward model it is `jaxalign.serving.rerank`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Collection, Sequence
from typing import TYPE_CHECKING, Any

from jaxalign.serving import guard, requests, rerank, server
from jaxalign.serving.answers import Answer
from jaxalign.serving.batching import Batcher, EngineFailed, Samples
from jaxalign.serving.http import read_body, refusal_response, refused
from jaxalign.serving.metrics import CONTENT_TYPE, Metrics
from jaxalign.serving.refusals import Refusal
from jaxalign.serving.requests import Limits

# Starlette is an extra: imported where it is used.
if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_log = logging.getLogger(__name__)

KEY_VARIABLE = "JAXALIGN_API_KEY"
_POLL = 0.1  # seconds between looks whether a client is still there


def application(
    backend: Any,
    vocabulary: Any,
    *,
    model: str,
    limits: Limits | None = None,
    batch_size: int = 16,
    max_waiting: int = 512,
    hosts: Collection[str] = (),
    api_key: str | None = None,
) -> Starlette:
    """The ASGI application over a backend, whose ``state.batcher`` tells what runs.

    Arguments that are not named here are those of `serve`.

    Args:
      backend: see ``jaxalign.serving.batching.Backend``.
      vocabulary: encodes prompts.
      limits: of a request.
      hosts: names by which clients may call the server, beside IP addresses and
        ``localhost``; see `jaxalign.serving.guard`.
    """
    server.require()
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    limits = limits or Limits()
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        batcher = Batcher(backend, batch_size=batch_size, max_waiting=max_waiting)
        app.state.batcher = batcher
        try:
            yield
        finally:
            await asyncio.to_thread(batcher.close)

    async def answer(request: Request) -> Response:
        chat = request.url.path == "/v1/chat/completions"
        guard.require_json(request.headers.getlist("content-type"))
        body = await read_body(request, limits)
        work = requests.parse(
            body, chat=chat, model=model, vocabulary=vocabulary, limits=limits
        )
        batcher: Batcher = request.app.state.batcher
        if not batcher.enqueue(work):
            raise Refusal(
                "Too many requests are waiting; try again later.",
                code="queue_full",
                status=429,
            )
        answer = Answer(work, vocabulary, chat=chat, model=model)
        updates = batcher.updates(work)
        if work.stream:
            events = _events(updates, answer, metrics)
            return StreamingResponse(events, media_type="text/event-stream")
        found = await _while_connected(request, updates)
        if found is None:
            return Response(status_code=499)  # nobody reads it
        whole = answer.whole(found)
        metrics.used(whole["usage"])
        return JSONResponse(whole)

    async def models(request: Request) -> Response:
        entry = {"id": model, "object": "model", "created": 0, "owned_by": "jaxalign"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(request: Request) -> Response:
        return JSONResponse(request.app.state.batcher.load)

    async def prometheus(request: Request) -> Response:
        load = request.app.state.batcher.load
        gauges = {f"{name}_requests": n for name, n in load.items()}
        gauges |= {n: getattr(backend, n, 0) for n in ("engines", "engine_bytes")}
        return Response(metrics.text(**gauges), media_type=CONTENT_TYPE)

    checks = {"hosts": hosts, "api_key": api_key, "metrics": metrics}
    return Starlette(
        middleware=[Middleware(guard.Guard, refuse=refusal_response, **checks)],
        routes=[
            Route("/v1/completions", answer, methods=["POST"]),
            Route("/v1/chat/completions", answer, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/metrics", prometheus),
        ],
        exception_handlers=dict.fromkeys((Refusal, 404, 405, Exception), refused),
        lifespan=lifespan,
    )


async def _while_connected(
    request: Request, updates: AsyncIterator[tuple[bool, list[Samples]]]
) -> list[Samples] | None:
    """The responses; None when the client went away, its request taken back."""
    task = asyncio.ensure_future(anext(updates))
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_POLL)
            if not task.done() and await request.is_disconnected():
                return None
        return task.result()[1]
    except EngineFailed as error:
        raise Refusal(str(error), status=500) from None
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await updates.aclose()


async def _events(
    updates: AsyncIterator[tuple[bool, list[Samples]]], answer: Answer, metrics: Metrics
) -> AsyncIterator[str]:
    """Server-sent events: pieces of text as they come, an end for each choice."""

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps(answer.event(choices, chunk=True, **more))}\n\n"

    sent: dict[int, int] = {}  # characters of each choice
    ended: set[int] = set()
    try:
        async for complete, found in updates:
            for i, tokens in enumerate(itertools.chain.from_iterable(found)):
                if i in ended:
                    continue
                text, reason = answer.text(tokens, complete)
                new = text[sent.get(i, 0) :]
                if new or i not in sent:
                    yield event([answer.piece(i, new, first=i not in sent)])
                    sent[i] = len(text)
                if reason:
                    yield event([answer.piece(i, "", reason=reason)])
                    ended.add(i)
            if complete:
                metrics.used(answer.usage(found))
                if answer.work.include_usage:
                    yield event([], usage=answer.usage(found))
    except EngineFailed as error:
        yield f"data: {json.dumps(Refusal(str(error), status=500).body())}\n\n"
    finally:
        await updates.aclose()
    yield "data: [DONE]\n\n"


def serve(
    *,
    checkpoint: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    model: str | None = None,
    batch_size: int = 16,
    max_waiting: int = 512,
    max_prompt_tokens: int = 1024,
    max_new_tokens: int = 256,
    max_samples: int = 64,
    max_body_bytes: int = 1 << 20,
    max_connections: int = 1000,
    header_seconds: float = 10.0,
    max_engines: int = 4,
    max_engine_bytes: int | None = None,
    allowed_hosts: Sequence[str] = (),
    api_key: str | None = None,
) -> None:
    """Serves a checkpoint until interrupted: a policy's texts, a reward model's scores.

    Args:
      checkpoint: a run directory or one of its checkpoints.
      host: address to listen on; the default is reachable from this machine only.
        Before opening it, set an API key, and put a proxy with TLS in front.
      port: to listen on.
      model: the name that clients ask for; default: the run directory's name.
      batch_size: prompts decoded at a time.
      max_waiting: requests that may wait; more get status 429.
      max_prompt_tokens: longer prompts are refused.
      max_new_tokens: of a response, and the default; of a text to score.
      max_samples: responses to one request; texts to score, or comparisons.
      max_body_bytes: of a request.
      max_connections: at a time.
      header_seconds: for a request's headers to arrive.
      max_engines: classes of prompt lengths that keep device memory at a time.
      max_engine_bytes: of them together; see `EngineBackend`.
      allowed_hosts: comma-separated names by which clients may call the server, beside
        IP addresses, ``localhost``, this machine's name and ``host``; ``"*"`` is any.
      api_key: what clients have to present; default: the environment's
        ``JAXALIGN_API_KEY``, else nothing.

    Raises:
      ImportError: when the extra is not installed.
      OSError: when the port is taken, or there is no such checkpoint.
      ValueError: for settings that cannot be.
    """
    # What can go wrong at once comes before the model is read.
    server.require()
    key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise ValueError(
            f"The API key (--api_key or {KEY_VARIABLE}) must be printable ASCII and "
            "not empty."
        )

    from jaxalign.serving.backend import EngineBackend
    from jaxalign.training import checkpoints

    limits = Limits(
        body_bytes=max_body_bytes,
        prompt_tokens=max_prompt_tokens,
        new_tokens=max_new_tokens,
        samples=max_samples,
    )
    common = {
        "limits": limits,
        "max_waiting": max_waiting,
        "hosts": (host, socket.gethostname(), *allowed_hosts),
        "api_key": key and key.strip(),
    }
    with server.listen(host, port) as sock:
        if rerank.is_reward_model(checkpoint):
            app = rerank.of_checkpoint(checkpoint, model=model, **common)
        else:
            policy = checkpoints.load(checkpoint)
            backend = EngineBackend(
                policy,
                max_prompt_tokens=max_prompt_tokens,
                max_new_tokens=max_new_tokens,
                max_samples=max_samples,
                batch_size=batch_size,
                max_engines=max_engines,
                max_engine_bytes=max_engine_bytes,
            )
            app = application(
                backend,
                policy.vocabulary,
                model=model or policy.path.parents[1].name,
                batch_size=batch_size,
                **common,
            )
        config = server.configuration(
            app, header_seconds=header_seconds, max_connections=max_connections
        )
        where = f"[{host}]" if ":" in host else host
        _log.info("Serving on http://%s:%d/v1", where, sock.getsockname()[1])
        server.run(config, sock)
