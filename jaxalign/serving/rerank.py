"""Reward models over HTTP: ``/v1/rerank`` as Jina and Cohere have it, ``/v1/score``.

Requests are scored one after another by one worker thread, each in batches of its own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from jaxalign import judges
from jaxalign.evaluation import judging
from jaxalign.serving import guard, requests, server
from jaxalign.serving.http import read_body, refusal_response, refused
from jaxalign.serving.metrics import CONTENT_TYPE, Metrics
from jaxalign.serving.refusals import Refusal, name_of, shown, wrong
from jaxalign.serving.requests import Limits
from jaxalign.training import checkpoints
from jaxalign.user_code import hint

# Starlette is an extra: imported where it is used.
if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_log = logging.getLogger(__name__)

_POLL = 0.1  # seconds between looks whether a client is still there
_RERANK = ("model", "query", "documents", "top_n", "return_documents", "user")
_SCORE = ("model", "text_1", "text_2", "user")


@dataclasses.dataclass(frozen=True)
class Asked:
    """Responses to prompts, and what is made of their scores."""

    prompts: list[str]
    responses: list[str]
    answer: Callable[[list[float]], dict[str, Any]]


def application(
    judge: judging.Judge | judging.PairwiseJudge,
    vocabulary: Any,
    *,
    model: str,
    limits: Limits | None = None,
    max_waiting: int = 512,
    hosts: Collection[str] = (),
    api_key: str | None = None,
) -> Starlette:
    """The ASGI application over a judge; its arguments are those of `api.serve`.

    Args:
      judge: scores or compares responses; larger is better.
      vocabulary: counts the tokens of requests.
      limits: of a request: `samples` documents, `prompt_tokens` of a query and
        `new_tokens` of a document.
    """
    server.require()
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    limits, metrics, load = limits or Limits(), Metrics(), Load()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        with concurrent.futures.ThreadPoolExecutor(1, "scores") as worker:
            app.state.worker = worker
            try:
                yield
            finally:
                worker.shutdown(wait=True, cancel_futures=True)

    async def answer(request: Request) -> Response:
        guard.require_json(request.headers.getlist("content-type"))
        body = await read_body(request, limits)
        parse = parse_rerank if request.url.path == "/v1/rerank" else parse_score
        asked = parse(body, model=model, limits=limits, vocabulary=vocabulary)
        check_comparisons(judge, asked, request.url.path, limits)
        if load.told["waiting"] >= max_waiting:
            raise Refusal(
                "Too many requests are waiting; try again later.",
                code="queue_full",
                status=429,
            )
        work = request.app.state.worker.submit(load.counted(_scores), judge, asked)
        load.waiting += 1
        try:
            if not await _while_connected(request, work):
                return Response(status_code=499)  # nobody reads it
        finally:
            load.waiting -= 1
        return JSONResponse(asked.answer(work.result()))

    async def models(request: Request) -> Response:
        entry = {"id": model, "object": "model", "created": 0, "owned_by": "jaxalign"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(request: Request) -> Response:
        return JSONResponse(load.told)

    async def prometheus(request: Request) -> Response:
        gauges = {f"{name}_requests": n for name, n in load.told.items()}
        gauges |= {"engines": 0, "engine_bytes": 0}
        return Response(metrics.text(**gauges), media_type=CONTENT_TYPE)

    checks = {"hosts": hosts, "api_key": api_key, "metrics": metrics}
    return Starlette(
        middleware=[Middleware(guard.Guard, refuse=refusal_response, **checks)],
        routes=[
            Route("/v1/rerank", answer, methods=["POST"]),
            Route("/v1/score", answer, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/metrics", prometheus),
        ],
        exception_handlers=dict.fromkeys((Refusal, 404, 405, Exception), refused),
        lifespan=lifespan,
    )


def is_reward_model(checkpoint: str) -> bool:
    """Whether a checkpoint's main network gives numbers rather than texts."""
    meta = checkpoints.newest_meta(checkpoint)
    kind = checkpoints.description(meta, meta["main"], checkpoint)["kind"]
    return kind in ("RewardModel", "ScalarModel")


def of_checkpoint(checkpoint: str, *, model: str | None, **settings: Any) -> Starlette:
    """The application over a checkpoint; its name is the run directory's by default."""
    judge = judges.resolve(f"reward:{checkpoint}")
    vocabulary = judge.load().vocabulary
    path = checkpoints.resolve(checkpoint)
    return application(judge, vocabulary, model=model or path.parents[1].name,
                       **settings)  # fmt: skip


class Load:
    """How many requests are being scored, and how many are there in all."""

    def __init__(self):
        self.running = self.waiting = 0

    @property
    def told(self) -> dict[str, int]:
        return {
            "running": self.running,
            "waiting": max(self.waiting - self.running, 0),
        }

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.running = 1  # of one worker
            try:
                return function(*arguments)
            finally:
                self.running = 0

        return run


def _scores(judge: judging.Judge | judging.PairwiseJudge, asked: Asked) -> list[float]:
    """Finite scores; in the worker thread."""
    if judging.is_pairwise(judge):
        (found,) = judging.verdicts([(asked.prompts[0], asked.responses)], judge)
    else:
        found = judging.scores(judge, asked.prompts, asked.responses)
    scores = [float(str(score)) for score in found]
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"The judge has no verdict on some of {len(scores)} texts.")
    return scores


async def _while_connected(request: Request, work: concurrent.futures.Future) -> bool:
    """Waits for the scores; False when the client went away, its request taken back."""
    future = asyncio.wrap_future(work)
    while not future.done():
        await asyncio.wait([future], timeout=_POLL)
        if not future.done() and await request.is_disconnected():
            future.cancel()
            return False
    if error := future.exception():
        _log.error("Scoring failed.", exc_info=error)
        raise Refusal("The server failed to score; see its log.", status=500)
    return True


def check_comparisons(judge: Any, asked: Asked, path: str, limits: Limits) -> None:
    """Refuses what a judge that compares cannot do, or only at too high a cost."""
    if not judging.is_pairwise(judge):
        return
    if path != "/v1/rerank":
        raise Refusal(
            "This model compares two responses and scores none: ask /v1/rerank.",
            status=400,
        )
    count = len(asked.responses)
    if count * (count - 1) > limits.samples:
        raise Refusal(
            f"Comparing {count} documents with each other takes {count * (count - 1)} "
            f"comparisons, more than {limits.samples}; send fewer.",
            param="documents",
        )


def parse_rerank(body: Any, *, model: str, limits: Limits, vocabulary: Any) -> Asked:
    """A query and documents: ``{"results": [{"index", "relevance_score"}]}``, best
    first."""
    _check(body, model, _RERANK)
    query = requests.typed(body, "query", str)
    texts = _texts(body, "documents", limits)
    top = requests.integer(body, "top_n", len(texts), 1, 2**31)
    with_text = requests.typed(body, "return_documents", bool, False)
    _check_lengths([query], "query", limits.prompt_tokens, vocabulary)
    _check_lengths(texts, "documents", limits.new_tokens, vocabulary)

    def answer(scores: list[float]) -> dict[str, Any]:
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:top]
        results = [
            {"index": i, "relevance_score": scores[i]}
            | ({"document": {"text": texts[i]}} if with_text else {})
            for i in order
        ]
        return {"id": f"rerank-{secrets.token_hex(12)}", "model": model,
                "results": results}  # fmt: skip

    return Asked([query] * len(texts), texts, answer)


def parse_score(body: Any, *, model: str, limits: Limits, vocabulary: Any) -> Asked:
    """``text_1`` prompts, ``text_2`` responses: one to many, or as many as each."""
    _check(body, model, _SCORE)
    prompts, responses = (_texts(body, f"text_{i}", limits) for i in (1, 2))
    if len(prompts) == 1:
        prompts = prompts * len(responses)
    if len(prompts) != len(responses):
        raise wrong(
            "text_1",
            f"must be one text or as many as text_2, got {len(prompts)} and "
            f"{len(responses)}.",
        )
    _check_lengths(prompts, "text_1", limits.prompt_tokens, vocabulary)
    _check_lengths(responses, "text_2", limits.new_tokens, vocabulary)

    def answer(scores: list[float]) -> dict[str, Any]:
        data = [
            {"index": i, "object": "score", "score": score}
            for i, score in enumerate(scores)
        ]
        told = {"object": "list", "created": int(time.time()), "model": model}
        return {"id": f"score-{secrets.token_hex(12)}", **told, "data": data}

    return Asked(prompts, responses, answer)


def _check(body: Any, model: str, known: tuple[str, ...]) -> None:
    if not isinstance(body, dict):
        raise Refusal(f"The body must be a JSON object, got {name_of(body)}.")
    for name in body:
        if name not in known:
            near = hint(name[:100], known)
            raise Refusal(f"Unknown field {shown(name)}.{near}", param=name[:100])
    if requests.typed(body, "model", str) != model:
        raise Refusal(
            f"No model {shown(body['model'])} here; expected {model!r}.",
            param="model",
            code="model_not_found",
            status=404,
        )


def _texts(body: Mapping[str, Any], name: str, limits: Limits) -> list[str]:
    """A text, or a list of texts and ``{"text": ...}``."""
    value = body.get(name)
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise wrong(name, f"must be a text or a list of texts, got {name_of(value)}.")
    found = []
    for i, item in enumerate(value):
        if isinstance(item, dict) and set(item) == {"text"}:
            item = item["text"]
        if not isinstance(item, str):
            raise wrong(
                f"{name}[{i}]", f'must be a text or {{"text": ...}}, got '
                f"{name_of(item)}."
            )  # fmt: skip
        found.append(item)
    if len(found) > limits.samples:
        raise wrong(
            name, f"holds {len(found)} texts; this server takes {limits.samples}."
        )
    return found


def _check_lengths(texts: list[str], name: str, most: int, vocabulary: Any) -> None:
    for i, text in enumerate(texts):
        # No token spells more than 64 characters.
        if len(text) > 64 * most or len(vocabulary.encode(text)) + 1 > most:
            raise Refusal(
                f"{name}[{i}] is longer than the {most} tokens that this server takes; "
                "shorten it.",
                param=name,
                code="context_length_exceeded",
            )
