"""What clients may ask: checks of request bodies, errors that say what to change."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from jaxalign.decoding.stops import Stops
from jaxalign.serving.batching import Settings, Work
from jaxalign.serving.refusals import Refusal, name_of, shown, wrong
from jaxalign.user_code import hint

# Accepted and without effect on the responses, with their types.
_IGNORED: dict[str, type] = {
    "user": str,
    "metadata": dict,
    "store": bool,
    "parallel_tool_calls": bool,
}
# The API's parameters that change responses in ways not offered, and the values that
# change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
_NEUTRAL_IN_COMPLETION: dict[str, tuple[Any, ...]] = {
    **_NEUTRAL,
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (),  # 0 asks for those of the chosen tokens
}
_NEUTRAL_IN_CHAT: dict[str, tuple[Any, ...]] = {
    **_NEUTRAL,
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
_COMMON = ("model", "n", "temperature", "top_p", "seed", "stop", "stream")
_COMPLETION = (*_COMMON, "stream_options", "prompt", "max_tokens")
_CHAT = (*_COMPLETION[:-2], "messages", "max_tokens", "max_completion_tokens")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may cost."""

    body_bytes: int = 1 << 20  # of a request
    prompt_tokens: int = 1024  # of a prompt, EOS included
    new_tokens: int = 256  # of a response; also what requests that name none get
    samples: int = 64  # responses to a request, prompts times ``n``
    body_seconds: float = 30.0  # for a body to arrive


def parse(
    body: Any, *, chat: bool, model: str, vocabulary: Any, limits: Limits
) -> Work:
    """Checks the body of a request; a `Refusal` names the field and what came."""
    if not isinstance(body, dict):
        raise Refusal(f"The body must be a JSON object, got {name_of(body)}.")
    _check_fields(body, chat)
    if typed(body, "model", str) != model:
        raise Refusal(
            f"No model {shown(body['model'])} here; expected {model!r}.",
            param="model",
            code="model_not_found",
            status=404,
        )
    texts = [_chat_prompt(body)] if chat else _prompts(body)
    field = "messages" if chat else "prompt"
    n = integer(body, "n", 1, 1, limits.samples)
    if n * len(texts) > limits.samples:
        raise Refusal(
            f"{len(texts)} prompts times n = {n} are more than {limits.samples} "
            "responses; ask for fewer at once.",
            param="n" if n > 1 else field,
        )
    prompts = [
        _tokens(i, text, field, vocabulary, limits) for i, text in enumerate(texts)
    ]
    seed = integer(body, "seed", None, -(2**63), 2**63 - 1)
    seed = secrets.randbits(32) if seed is None else seed
    temperature = number(body, "temperature", 1.0, 0.0, 2.0)
    top_p = number(body, "top_p", 1.0, 0.0, 1.0)
    # Below these, float32 logits overflow: the most probable token is what is meant.
    temperature = 0.0 if temperature < 1e-4 else float(temperature)
    new_tokens = limits.new_tokens
    for name in ("max_tokens", "max_completion_tokens"):  # the latter goes before
        new_tokens = integer(body, name, new_tokens, 1, limits.new_tokens)
    return Work(
        prompts,
        # An odd constant: no two prompts of a request share a seed.
        [(seed + 0x9E3779B1 * i) % 2**32 for i in range(len(prompts))],
        Settings(temperature, max(float(top_p), 1e-4)),
        new_tokens,
        n,
        stream=typed(body, "stream", bool, False),
        include_usage=_include_usage(body),
        stops=Stops(_stops(body), vocabulary),
        eos_id=vocabulary.eos_id,
    )


def _check_fields(body: Mapping[str, Any], chat: bool) -> None:
    """Refuses fields that nobody knows, and values that ask for what is not offered."""
    known = _CHAT if chat else _COMPLETION
    neutral = dict(_NEUTRAL_IN_CHAT if chat else _NEUTRAL_IN_COMPLETION)
    if not chat:  # the best n of n are all of them
        neutral["best_of"] = (body.get("n") or 1,)
    for name, value in body.items():
        if name in known:
            continue
        if name in _IGNORED:
            typed(body, name, _IGNORED[name], None)
        elif name not in neutral:
            near = hint(name[:100], known)
            raise Refusal(f"Unknown field {shown(name)}.{near}", param=name[:100])
        elif value is not None and not any(_same(value, x) for x in neutral[name]):
            raise wrong(name, f"is not supported; leave it out. Got {shown(value)}.")
    for name, text in (body.get("metadata") or {}).items():
        if not isinstance(text, str):
            came = f"{name_of(text)} in {shown(name)}"
            raise wrong("metadata", f"must hold strings, got {came}.")


def _same(a: Any, b: Any) -> bool:
    """Whether two values of JSON are one: ``false`` is not 0, as it is in Python."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def typed(body: Mapping[str, Any], name: str, kind: type, *default: Any) -> Any:
    """A field of a type, or the default where it is missing or null."""
    value = body.get(name)
    if value is None and default:
        return default[0]
    if not isinstance(value, kind):
        came = "nothing" if name not in body else name_of(value)
        raise wrong(name, f"must be a {kind.__name__}, got {came}.")
    return value


def number(body, name, default, low, high, kind=(int, float), what="a number"):
    value = body.get(name)
    if value is None:
        return default
    # NaN fails both comparisons.
    if type(value) not in kind or not low <= value <= high:
        raise wrong(name, f"must be {what} in [{low}, {high}], got {shown(value)}.")
    return value


def integer(body, name, default, low, high):
    return number(body, name, default, low, high, (int,), "an integer")


def _include_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream ends with its usage; an answer in one piece always has it."""
    options = typed(body, "stream_options", dict, {})
    # Padding against observers of the line, which this server does not send.
    neutral = {"include_obfuscation": False}
    for name, value in options.items():
        if name == "include_usage" or value is None or neutral.get(name) is value:
            continue
        raise Refusal(
            f"stream_options.{shown(name)[1:-1]} is not supported; leave it out.",
            param="stream_options",
        )
    name = "stream_options.include_usage"
    return typed({name: options.get("include_usage")}, name, bool, False)


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    value = [] if value is None else value
    value = [value] if isinstance(value, str) else value
    fits = isinstance(value, list) and len(value) <= 4
    if not fits or not all(isinstance(s, str) and s for s in value):
        raise wrong(
            "stop",
            "must be a string or up to 4 of them, none empty; got "
            f"{shown(body['stop'])}.",
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
    raise wrong(
        "prompt",
        "must be a string, a list of strings, token ids, or a list of lists of those, "
        f"not empty; got {name_of(value) if value else repr(value)}.",
    )


def _chat_prompt(body: Mapping[str, Any]) -> str:
    """One message is the prompt as it stands; more are told apart by their roles."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "must be a list of at least one message.")
    turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if len(turns) == 1:
        return turns[0][1]
    return "\n".join([f"{role}: {content}" for role, content in turns] + ["assistant:"])


_ROLES = ("system", "developer", "user", "assistant")
# What the API's own answers hold beside role and content, sent back as null.
_MESSAGE = ("name", "refusal", "audio", "annotations", "tool_calls", "function_call")


def _turn(message: Any, where: str) -> tuple[str, str]:
    """The role and the text of a message."""
    if not isinstance(message, dict):
        raise wrong(where, f"must be an object, got {name_of(message)}.")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        expected = f"{', '.join(_ROLES[:-1])} or {_ROLES[-1]}"
        raise wrong(f"{where}.role", f"must be {expected}, got {shown(role)}.")
    for name, value in message.items():
        if name in ("role", "content") or value is None and name in _MESSAGE:
            continue
        # A name tells participants of one role apart; no prompt of ours does.
        if name == "name" and isinstance(value, str):
            continue
        raise Refusal(
            f"{where}.{shown(name)[1:-1]} is not supported; leave it out.", param=where
        )
    return role, _content(message.get("content"), f"{where}.content")


def _content(content: Any, where: str) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        came = "an empty list" if content == [] else name_of(content)
        raise wrong(
            where, f"must be text; images and tools are not supported. Got {came}."
        )
    for i, part in enumerate(content):
        fits = isinstance(part, dict) and part.get("type") == "text"
        if not fits or set(part) != {"type", "text"} or type(part["text"]) is not str:
            raise wrong(
                f"{where}[{i}]",
                'must be {"type": "text", "text": TEXT}: content must be text; images '
                "and tools are not supported.",
            )
    return "".join(part["text"] for part in content)


def _tokens(
    i: int, prompt: Any, field: str, vocabulary: Any, limits: Limits
) -> list[int]:
    eos = vocabulary.eos_id
    # Far too long texts are not worth encoding: no token spells that many characters.
    if isinstance(prompt, str) and len(prompt) <= 64 * limits.prompt_tokens:
        tokens = [*vocabulary.encode(prompt), eos]
    elif isinstance(prompt, str):
        tokens = [eos] * len(prompt)
    else:
        size = vocabulary.vocab_size
        bad = [t for t in prompt if not 0 < t < size]
        if bad:
            raise wrong(
                "prompt", f"holds the id {shown(bad[0])}; expected ids in [1, {size})."
            )
        tokens = prompt if prompt[-1] == eos else [*prompt, eos]
    if len(tokens) > limits.prompt_tokens:
        raise Refusal(
            f"Prompt {i} is longer than the {limits.prompt_tokens} tokens that this "
            "server takes; shorten it.",
            param=field,
            code="context_length_exceeded",
        )
    return tokens
