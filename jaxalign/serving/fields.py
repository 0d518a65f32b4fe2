"""The fields of requests: read, ignored, or refused unless they ask for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def check_fields(body: Mapping[str, Any], chat: bool) -> None:
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
