"""Token ids to the API's answers, whole or in pieces."""

from __future__ import annotations

import itertools
import time
import uuid
from typing import Any

from jaxalign.serving.batching import Samples, Work


class Answer:
    """The answer to one request, which is a chat completion or a plain one."""

    def __init__(self, work: Work, vocabulary: Any, *, chat: bool, model: str):
        self.work = work
        self._vocabulary = vocabulary
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def event(self, choices: list[dict], chunk: bool = False, **more: Any) -> dict:
        """An answer in the API's format, or a chunk of one."""
        head = self._head
        if self._chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
            head = {**head, "object": kind}
        return {**head, "choices": choices, **more}

    def text(self, tokens: list[int], complete: bool) -> tuple[str, str | None]:
        """The text that may be sent of a sample, and why it ended, if it did.

        Of a sample that goes on, what may still change is held back: half a character,
        an open escape, and what may be the beginning of a stop sequence.
        """
        work = self.work
        complete |= work.ended(tokens)
        cut = work.stops.cut(tokens, complete) if work.stops else None
        if cut:
            return cut.text[: cut.start], "stop"
        text = self._vocabulary.decode(tokens, final=complete)
        if complete:
            return text, "stop" if work.eos_id in tokens else "length"
        held = work.stops.held(text) if work.stops else 0
        return text[: len(text) - held], None

    def piece(
        self, index: int, text: str, *, first: bool = False, reason: str | None = None
    ) -> dict[str, Any]:
        """A piece of one choice, as a stream carries it."""
        own: dict[str, Any] = {"text": text}
        if self._chat:
            role = {"role": "assistant"} if first else {}
            own = {"delta": {} if reason else {**role, "content": text}}
        return {"index": index, "finish_reason": reason, "logprobs": None, **own}

    def usage(self, found: list[Samples]) -> dict[str, int]:
        """Tokens read and written."""
        read = sum(map(len, self.work.prompts))
        written = sum(map(len, itertools.chain.from_iterable(found)))
        usage = {"prompt_tokens": read, "completion_tokens": written}
        return {**usage, "total_tokens": read + written}

    def whole(self, found: list[Samples]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for tokens in itertools.chain.from_iterable(found):
            text, reason = self.text(tokens, complete=True)
            own = {"text": text}
            if self._chat:
                own = {"message": {"role": "assistant", "content": text}}
            choice = {"index": len(choices), "finish_reason": reason, "logprobs": None}
            choices.append({**choice, **own})
        return self.event(choices, usage=self.usage(found))
