"""Rows of chat messages to rows of text, in the formats that TRL reads.

=====================  =============================================================
format                 fields, each a text or a list of ``{"role", "content"}``
=====================  =============================================================
prompt-completion      ``prompt``, ``completion``
unpaired preference    the same with ``label``
preference             ``prompt``, ``chosen``, ``rejected``
... implicit prompt    ``chosen``, ``rejected``, which begin with the same prompt
language modelling     ``messages``: every answer of a dialogue is a completion
=====================  =============================================================

A prompt is rendered by the chat template with what an answer begins with, a response is
what the template puts behind that: so TRL has it, with its ``extract_prompt``,
``apply_chat_template`` and common prefix. A row of texts is left as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.data.bad_rows import FieldError, show
from jaxalign.data.chat_template import TemplateError, compiled
from jaxalign.data.field_map import Record
from jaxalign.data.tables import Cell

Messages = list[dict[str, Any]]
# How a record was read.
CHAT, DIALOGUE, IMPLICIT = "chat", "dialogue", "implicit prompt"
_ANSWERS = ("completion", "chosen", "rejected")
# Those that a schema looks at, where that is not all.
_READ = {"prompts": (), "supervised": ("completion", "chosen")}
_FIELDS = ("prompt", *_ANSWERS, "messages")
_IN_CELLS = (*_FIELDS, "tools", "metadata")


class Conversations:
    """Reads the records of one source.

    Args:
      schema: which of the formats' records are asked for.
      template: text of the chat template; None: the default one.
      implicit: whether a pair may hold its own prompt. Not where another field is said
        to be the prompt.

    >>> read = Conversations("supervised").read
    >>> read({"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello"})[0]
    [{'prompt': 'User: Hi\\n\\nAssistant: ', 'completion': 'Hello'}]
    """

    def __init__(
        self, schema: str, template: str | None = None, *, implicit: bool = True
    ):
        self._schema, self._implicit = schema, implicit
        self._template = template

    def read(self, record: Record) -> tuple[list[Record], frozenset[str]]:
        """The record in texts, and how it was read.

        There are several where each answer of a dialogue is one to imitate. How is
        `CHAT` where messages were made into texts, besides `DIALOGUE` where they were
        all in one field, and `IMPLICIT` where answers held their prompt.

        Raises:
          FieldError: when messages are not what they should be, or not for the
            template.
        """
        record = _opened(record)
        chats = {f for f in _FIELDS if _is_chat(record.get(f))}
        has = {f for f in ("prompt", *_ANSWERS) if record.get(f) is not None}
        # Some rows have a dialogue's first message beside it.
        enough = {"prompt"} if self._schema == "prompts" else set(_ANSWERS)
        if "messages" in chats and not has & enough:
            return self._dialogue(record), frozenset((CHAT, DIALOGUE))
        chats.discard("messages")
        how = frozenset((CHAT,) if chats else ())
        if (
            self._implicit
            and {"chosen", "rejected"} <= has
            and not has & {"completion"}
            # Some pairs have the prompt as a text, and dialogues that begin with it.
            and ("prompt" not in has or chats == {"chosen", "rejected"})
        ):
            found = self._with_prompt(record, chats)
            how |= {IMPLICIT} if found is not record else frozenset()
            record = found
        if not chats or record.get("prompt") is None:
            return [record], how
        return [self._rendered(record)], how

    def _with_prompt(self, record: Record, chats: set[str]) -> Record:
        """A pair whose shared beginning becomes its prompt."""
        chosen, rejected = record["chosen"], record["rejected"]
        if chats >= {"chosen", "rejected"}:
            chosen = _checked("chosen", chosen)
            rejected = _checked("rejected", rejected)
        elif not (isinstance(chosen, str) and isinstance(rejected, str)):
            return record  # told by whoever checks the fields
        size = shared(chosen, rejected)
        if not size:  # then the prompt, if it is missing, is told to be
            return record
        chosen, rejected, prompt = chosen[size:], rejected[size:], chosen[:size]
        return record | {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    def _rendered(self, record: Record) -> Record:
        """Prompt and answers as texts, all of which are messages then."""
        prompt = _messages("prompt", record["prompt"], "user")
        answers = {
            f: _messages(f, record[f], "assistant")
            for f in _READ.get(self._schema, _ANSWERS)
            if record.get(f) is not None
        }
        return record | self._texts(prompt, answers, _tools(record))

    def _texts(
        self, prompt: Messages, answers: Mapping[str, Messages], tools: Any
    ) -> Record:
        template, field = compiled(self._template), "prompt"
        try:
            goes_on = prompt[-1]["role"] == "assistant"
            if goes_on and isinstance(prompt[-1]["content"], str):
                text = template.unfinished(prompt, tools=tools)
            else:
                text = template.render(
                    prompt, tools=tools, add_generation_prompt=not goes_on
                )
            whole = {}
            for field, answer in answers.items():
                whole[field] = template.render([*prompt, *answer], tools=tools)
        except TemplateError as error:
            expected = "messages that CHAT_TEMPLATE renders"
            raise FieldError(field, "template", expected, str(error)) from None
        # Some templates write more behind a prompt than before an answer.
        text = os.path.commonprefix([text, *whole.values()])
        return {"prompt": text} | {f: w[len(text) :] for f, w in whole.items()}

    def _dialogue(self, record: Record) -> list[Record]:
        """The records of ``messages``."""
        messages = _checked("messages", record["messages"])
        said = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i]
        others = {k: v for k, v in record.items() if k not in ("messages", "tools")}
        tools = _tools(record)
        if self._schema == "prompts":
            ends = bool(said) and said[-1] == len(messages) - 1
            prompt = messages[: said[-1]] if ends else messages
            return [others | self._turn(prompt, None, tools)]
        if self._schema in ("preference", "rationale"):
            return [record]  # whose chosen is missing
        if not said or said[-1] != len(messages) - 1:
            expected = "a dialogue whose last message is an assistant's answer"
            got = f"a last message by {messages[-1]['role']!r}"
            got = "a single message" if len(messages) == 1 else got
            raise FieldError("messages", "unanswered", expected, got)
        # Feedback is on the dialogue, whose last answer is what it ended with.
        turns = said if self._schema == "supervised" else said[-1:]
        return [others | self._turn(messages[:i], messages[i], tools) for i in turns]

    def _turn(
        self, prompt: Messages, answer: Mapping[str, Any] | None, tools: Any
    ) -> Record:
        template = compiled(self._template)
        try:
            text = template.render(prompt, tools=tools, add_generation_prompt=True)
            if answer is None:
                return {"prompt": text}
            whole = template.render([*prompt, answer], tools=tools)
        except TemplateError as error:
            expected = "messages that CHAT_TEMPLATE renders"
            raise FieldError("messages", "template", expected, str(error)) from None
        text = os.path.commonprefix([text, whole])
        return {"prompt": text, "completion": whole[len(text) :]}


def shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How much of the beginning of two texts or dialogues is their prompt.

    As TRL's ``extract_prompt`` has it: all that is equal, a space at the end of it
    apart, and never the whole of the shorter one.

    >>> shared("The sky is blue.", "The sky is green.")
    10
    """
    most = min(len(chosen), len(rejected)) - 1
    pairs = zip(chosen, rejected, strict=False)
    size = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if size is None:
        return max(most, 0)
    return size - 1 if size and chosen[size - 1] == " " else size


def _is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, as its first item says."""
    if not isinstance(value, list) or not value:
        return False
    return isinstance(value[0], Mapping) and "role" in value[0]


def _opened(record: Record) -> Record:
    """A record whose cells of a table that hold messages are lists of them."""
    cells = [f for f in _IN_CELLS if isinstance(record.get(f), Cell)]
    found = dict(record) if cells else record
    for field in cells:
        value = record[field]
        if field == "metadata":
            found[field] = value.json()
        elif value.lstrip().startswith(("[{'role'", "[{'content'")):
            got = "its Python form, in single quotes"
            raise FieldError(field, "messages", "a list of messages as JSON", got)
        elif field == "tools" or _is_chat(value.json()):
            found[field] = value.json()
    return found


def _messages(field: str, value: Any, role: str) -> Messages:
    """A list of messages; a text is what ``role`` says."""
    if isinstance(value, str):
        return [{"role": role, "content": str(value)}]
    if not _is_chat(value):
        raise FieldError(field, "type", "a text or a list of messages", show(value))
    return _checked(field, value)


def _checked(field: str, value: Any) -> Messages:
    """Messages with a role and a content, entries without a value left out."""
    if not _is_chat(value):
        got = "an empty list" if value == [] else show(value)
        raise FieldError(field, "type", "a list of messages", got)
    return [_message(field, i, message) for i, message in enumerate(value, start=1)]


def _message(field: str, number: int, message: Any) -> dict[str, Any]:
    def fail(got: str) -> FieldError:
        expected = "messages with a 'role' and a 'content'"
        return FieldError(field, "messages", expected, f"{got} (message {number})")

    if not isinstance(message, Mapping):
        raise fail(show(message))
    # Parquet gives every message the entries of all.
    found = {k: v for k, v in message.items() if v is not None}
    role, content = found.get("role"), found.get("content")
    if not isinstance(role, str) or not role.strip():
        raise fail(f"{show(role)} for the role")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, Mapping) else p for p in content]
        if not all(isinstance(part, str) for part in parts):
            raise fail("a content with parts that are no text")
        content = "".join(parts)
    if content is None and len(found) > 1:  # such as tool_calls
        return found | {"content": None}
    if not isinstance(content, str):
        raise fail(f"{show(content)} for the content")
    return found | {"content": content}


def _tools(record: Record) -> Any:
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        expected = "a list of functions' JSON schemas"
        raise FieldError("tools", "type", expected, show(tools))
    return tools
