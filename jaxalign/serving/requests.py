"""What clients may ask: checks of request bodies, errors that say what to change."""

from __future__ import annotations

import dataclasses
import difflib
import secrets
from collections.abc import Mapping
from typing import Any

from jaxalign.decoding.stops import Stops
from jaxalign.serving.batching import EOS_ID, Settings, Work

# Accepted and without effect on the responses.
_IGNORED = {"user", "metadata", "store", "stream_options", "parallel_tool_calls"}
# The API's parameters that change responses in ways not offered, and their neutral
# values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}
_COMMON = ("model", "n", "temperature", "top_p", "seed", "stop", "stream")
_COMPLETION = (*_COMMON, "prompt", "max_tokens")
_CHAT = (*_COMMON, "messages", "max_tokens", "max_completion_tokens")


class Refusal(Exception):
    """An error for the client.

    Attributes:
      status: of the HTTP response.
      param: the field at fault.
      code: a word for programs.
    """

    def __init__(self, status, message, *, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error in the API's format."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind}
        return {"error": {**error, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
      body_bytes: of a request.
      prompt_tokens: of a prompt, EOS included.
      new_tokens: of a response; also what requests that name none get.
      samples: responses to a request, prompts times ``n``.
      body_seconds: for a body to arrive.
    """

    body_bytes: int = 1 << 20
    prompt_tokens: int = 1024
    new_tokens: int = 256
    samples: int = 64
    body_seconds: float = 30.0


@dataclasses.dataclass(frozen=True)
class Asked:
    """A checked request: the work, and how to answer it."""

    work: Work
    include_usage: bool


def parse(
    body: Any, *, chat: bool, model: str, vocabulary: Any, limits: Limits
) -> Asked:
    """Checks the body of a request.

    Raises:
      Refusal: naming the field, what it must be and what came.
    """
    if not isinstance(body, dict):
        raise Refusal(400, f"The body must be a JSON object, got {_name(body)}.")
    _check_fields(body, _CHAT if chat else _COMPLETION)
    if _typed(body, "model", str) != model:
        raise Refusal(
            404,
            f"No model {body['model']!r} here; expected {model!r}.",
            param="model",
            code="model_not_found",
        )
    texts = [_chat_prompt(body)] if chat else _prompts(body)
    prompts = [_tokens(i, text, vocabulary, limits) for i, text in enumerate(texts)]
    n = _number(body, "n", 1, 1, limits.samples, int)
    if n * len(prompts) > limits.samples:
        raise Refusal(
            400,
            f"{len(prompts)} prompts times n = {n} are more than {limits.samples} "
            "responses; ask for fewer at once.",
            param="n",
        )
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    new_tokens = _number(body, name, limits.new_tokens, 1, limits.new_tokens, int)
    seed = _number(body, "seed", None, -(2**63), 2**63 - 1, int)
    seed = secrets.randbits(32) if seed is None else seed
    temperature = _number(body, "temperature", 1.0, 0.0, 2.0, float)
    top_p = _number(body, "top_p", 1.0, 0.0, 1.0, float)
    # Below these, float32 logits overflow: the most probable token is what is meant.
    temperature = 0.0 if temperature < 1e-4 else float(temperature)
    top_p = max(float(top_p), 1e-4)
    options = body.get("stream_options") or {}
    return Asked(
        Work(
            prompts,
            # An odd constant: no two prompts of a request share a seed.
            [(seed + 0x9E3779B1 * i) % 2**32 for i in range(len(prompts))],
            Settings(temperature, top_p),
            new_tokens,
            n,
            stream=bool(_typed(body, "stream", bool, False)),
            stops=Stops(_stops(body), vocabulary),
        ),
        include_usage=isinstance(options, dict) and bool(options.get("include_usage")),
    )


def _name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _check_fields(body: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name, value in body.items():
        if name in known or name in _IGNORED:
            continue
        if name in _NEUTRAL:
            if value is None or value in _NEUTRAL[name]:
                continue
            raise Refusal(400, f"{name} is not supported; leave it out.", param=name)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise Refusal(400, f"Unknown field {name!r}.{hint}", param=name)


def _typed(body: Mapping[str, Any], name: str, kind: type, *default: Any) -> Any:
    value = body.get(name)
    if value is None and default:
        return default[0]
    if not isinstance(value, kind):
        came = "nothing" if name not in body else _name(value)
        raise Refusal(400, f"{name} must be a {kind.__name__}, got {came}.", param=name)
    return value


def _number(body, name, default, low, high, kind):
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, (int, float) if kind is float else int)
    # NaN fails both comparisons.
    if not fits or isinstance(value, bool) or not low <= value <= high:
        what = "an integer" if kind is int else "a number"
        raise Refusal(
            400, f"{name} must be {what} in [{low}, {high}], got {value!r}.", param=name
        )
    return value


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop") or []
    value = [value] if isinstance(value, str) else value
    fits = isinstance(value, list) and len(value) <= 4
    if not fits or not all(isinstance(s, str) and s for s in value):
        raise Refusal(
            400, "stop must be a string or up to 4 of them, none empty.", param="stop"
        )
    return tuple(value)


def _prompts(body: Mapping[str, Any]) -> list[str | list[int]]:
    """A text, several, token ids, or several lists of those."""
    value = body.get("prompt")

    def ids(x):
        return isinstance(x, list) and x and all(type(i) is int for i in x)

    if isinstance(value, str) or ids(value):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(x, str) for x in value) or all(ids(x) for x in value):
            return value
    raise Refusal(
        400,
        "prompt must be a string, a list of strings, token ids, or a list of lists of "
        f"those, not empty; got {_name(value) if value else repr(value)}.",
        param="prompt",
    )


def _chat_prompt(body: Mapping[str, Any]) -> str:
    """One message is the prompt as it stands; more are told apart by their roles."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(
            400, "messages must be a list of at least one message.", param="messages"
        )
    turns = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise Refusal(400, f"{where} must be an object.", param=where)
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            raise Refusal(
                400,
                f"{where}.role must be system, developer, user or assistant, got "
                f"{role!r}.",
                param=f"{where}.role",
            )
        if isinstance(content, list):
            parts = [p.get("text") if isinstance(p, dict) else None for p in content]
            content = "".join(parts) if all(isinstance(p, str) for p in parts) else None
        if not isinstance(content, str):
            raise Refusal(
                400,
                f"{where}.content must be text; images and tools are not supported.",
                param=f"{where}.content",
            )
        turns.append((role, content))
    if len(turns) == 1:
        return turns[0][1]
    return "\n".join([f"{role}: {content}" for role, content in turns] + ["assistant:"])


def _tokens(i: int, prompt: Any, vocabulary: Any, limits: Limits) -> list[int]:
    # Far too long texts are not worth encoding: no token spells that many characters.
    if isinstance(prompt, str) and len(prompt) <= 64 * limits.prompt_tokens:
        tokens = [*vocabulary.encode(prompt), EOS_ID]
    elif isinstance(prompt, str):
        tokens = [EOS_ID] * len(prompt)
    else:
        bad = [t for t in prompt if not 0 < t < vocabulary.vocab_size]
        if bad:
            raise Refusal(
                400,
                f"prompt holds the id {bad[0]}; expected ids in [1, "
                f"{vocabulary.vocab_size}).",
                param="prompt",
            )
        tokens = prompt if prompt[-1] == EOS_ID else [*prompt, EOS_ID]
    if len(tokens) > limits.prompt_tokens:
        raise Refusal(
            400,
            f"Prompt {i} is longer than the {limits.prompt_tokens} tokens that this "
            "server takes; shorten it.",
            param="prompt",
            code="context_length_exceeded",
        )
    return tokens
