"""The OpenAI-compatible HTTP API: ``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from jaxalign.serving import requests
from jaxalign.serving.answers import Answer
from jaxalign.serving.batching import Batcher, EngineFailed, QueueFull, Samples
from jaxalign.serving.requests import Limits, Refusal

# Starlette is an extra: imported where it is used.
if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_POLL = 0.1  # seconds between looks whether a client is still there


def application(
    backend: Any,
    vocabulary: Any,
    *,
    model: str,
    limits: Limits | None = None,
    batch_size: int = 16,
    max_waiting: int = 512,
) -> Starlette:
    """The ASGI application over a backend.

    Args:
      backend: see ``jaxalign.serving.batching.Backend``.
      vocabulary: encodes prompts.
      model: the name that clients ask for.
      limits: of a request.
      batch_size: prompts decoded at a time.
      max_waiting: requests that may wait; more get status 429.

    Returns:
      An application whose ``state.batcher`` tells what runs and waits.
    """
    try:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse, Response, StreamingResponse
        from starlette.routing import Route
    except ImportError as error:
        raise ImportError(
            "Serving needs starlette and uvicorn: pip install 'jaxalign[serve]'."
        ) from error
    limits = limits or Limits()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        batcher = Batcher(backend, batch_size=batch_size, max_waiting=max_waiting)
        app.state.batcher = batcher
        try:
            yield
        finally:
            await asyncio.to_thread(batcher.close)

    async def answer(request: Request, chat: bool) -> Response:
        body = await _body(request, limits)
        asked = requests.parse(
            body, chat=chat, model=model, vocabulary=vocabulary, limits=limits
        )
        batcher: Batcher = request.app.state.batcher
        try:
            batcher.enqueue(asked.work)
        except QueueFull:
            raise Refusal(
                429,
                "Too many requests are waiting; try again later.",
                code="queue_full",
            ) from None
        answer = Answer(asked, vocabulary, chat=chat, model=model)
        updates = batcher.updates(asked.work)
        if asked.work.stream:
            events = _events(updates, answer)
            return StreamingResponse(events, media_type="text/event-stream")
        found = await _while_connected(request, updates)
        if found is None:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(answer.whole(found))

    async def completions(request: Request) -> Response:
        return await answer(request, chat=False)

    async def chat_completions(request: Request) -> Response:
        return await answer(request, chat=True)

    async def models(request: Request) -> Response:
        entry = {"id": model, "object": "model", "created": 0, "owned_by": "jaxalign"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(request: Request) -> Response:
        batcher = request.app.state.batcher
        return JSONResponse({"running": batcher.running, "waiting": batcher.waiting})

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        exception_handlers={
            Refusal: _refused,
            404: _unknown_path,
            405: _wrong_method,
            Exception: _failed,
        },
        lifespan=lifespan,
    )


async def _body(request: Request, limits: Limits) -> Any:
    """The JSON body, read no further than the limit."""
    from starlette.requests import ClientDisconnect

    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.body_bytes:
                    raise Refusal(
                        413,
                        f"The body is larger than {limits.body_bytes} bytes; send "
                        "fewer or shorter prompts.",
                        code="body_too_large",
                    )
                chunks.append(chunk)
    except TimeoutError:
        raise Refusal(
            408, f"The body did not arrive in {limits.body_seconds} seconds."
        ) from None
    except ClientDisconnect:
        raise Refusal(400, "The client left before its request had arrived.") from None
    try:
        return json.loads(b"".join(chunks))
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"The body is no JSON: {error}.") from None


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
        raise Refusal(500, str(error)) from None
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await updates.aclose()


async def _events(
    updates: AsyncIterator[tuple[bool, list[Samples]]], answer: Answer
) -> AsyncIterator[str]:
    """Server-sent events: pieces of text as they come, an end for each choice."""

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        body = {**answer.head(chunk=True), "choices": choices, **more}
        return f"data: {json.dumps(body)}\n\n"

    sent: dict[int, int] = {}  # characters of each choice
    ended: set[int] = set()
    try:
        async for complete, found in updates:
            for i, tokens in enumerate(t for samples in found for t in samples):
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
            if complete and answer.asked.include_usage:
                yield event([], usage=answer.usage(found))
    except EngineFailed as error:
        yield f"data: {json.dumps(Refusal(500, str(error)).body())}\n\n"
    finally:
        await updates.aclose()
    yield "data: [DONE]\n\n"


async def _refused(request: Request, refusal: Refusal) -> Response:
    from starlette.responses import JSONResponse

    headers = {"Retry-After": "1"} if refusal.status == 429 else None
    return JSONResponse(refusal.body(), refusal.status, headers)


async def _unknown_path(request: Request, error: Exception) -> Response:
    return await _refused(
        request,
        Refusal(
            404,
            f"No {request.url.path} here; there are /v1/completions, "
            "/v1/chat/completions, /v1/models and /health.",
        ),
    )


async def _wrong_method(request: Request, error: Exception) -> Response:
    refusal = Refusal(405, f"{request.url.path} does not take {request.method}.")
    return await _refused(request, refusal)


async def _failed(request: Request, error: Exception) -> Response:
    return await _refused(request, Refusal(500, "The server failed; see its log."))


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
) -> None:
    """Serves a checkpoint until interrupted.

    Args:
      checkpoint: a run directory or one of its checkpoints.
      host: address to listen on; the default is reachable from this machine only. There
        is no authentication: put a proxy in front before opening it.
      port: to listen on.
      model: the name that clients ask for; default: the run directory's name.
      batch_size: prompts decoded at a time.
      max_waiting: requests that may wait; more get status 429.
      max_prompt_tokens: longer prompts are refused.
      max_new_tokens: of a response, and the default.
      max_samples: responses to one request.
      max_body_bytes: of a request.
    """
    import uvicorn

    from jaxalign.serving.backend import EngineBackend
    from jaxalign.training import checkpoints

    policy = checkpoints.load_policy(checkpoint)
    backend = EngineBackend(
        policy,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_samples=max_samples,
        batch_size=batch_size,
    )
    app = application(
        backend,
        policy.vocabulary,
        model=model or policy.path.parents[1].name,
        limits=Limits(
            body_bytes=max_body_bytes,
            prompt_tokens=max_prompt_tokens,
            new_tokens=max_new_tokens,
            samples=max_samples,
        ),
        batch_size=batch_size,
        max_waiting=max_waiting,
    )
    uvicorn.run(app, host=host, port=port, ws="none")
