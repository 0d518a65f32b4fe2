"""A teacher behind HTTP: any OpenAI-compatible server, and every paid answer kept."""

from __future__ import annotations

import concurrent.futures
import hashlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxalign.teachers.recorded import Recording, padded

_log = logging.getLogger(__name__)

# Where answers are kept, unless told otherwise.
FOLDER = "~/.cache/jaxalign/answers"


class HTTPTeacher:
    """Chat completions of a server, asked for concurrently.

    Retries with growing pauses, and a server's ``Retry-After``, are the official
    client's. An answer is on disk before it is returned, and a request that was
    answered is never sent again: a job that was killed goes on at no cost. The key is
    ``OPENAI_API_KEY``; local servers need none.

    Args:
      url: of the server's API, such as ``http://127.0.0.1:8000/v1``.
      model: as the server calls it.
      answers: the file where answers are kept; by default one for each address and
        model in ``~/.cache/jaxalign/answers``.
      concurrency: requests on the way at a time.
      max_retries: of a request that failed in a way that may pass.

    Attributes:
      usage: how many requests, prompt tokens and completion tokens were paid for.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        answers: str | Path | None = None,
        concurrency: int = 8,
        max_retries: int = 6,
    ):
        self.url, self.model, self.concurrency = url.rstrip("/"), model, concurrency
        self.fingerprint = f"http:{self.url}#{model}#"
        digest = hashlib.sha256(self.fingerprint.encode()).hexdigest()[:16]
        self.answers = Recording(answers or f"{FOLDER}/{digest}.jsonl")
        self.usage: Counter[str] = Counter()
        self._usage_lock = threading.Lock()
        try:
            import openai
        except ImportError as error:
            how = "pip install 'jaxalign[teachers]'."
            raise ImportError(f"A teacher behind HTTP needs a client: {how}") from error
        self._client = openai.OpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=max_retries,
        )

    def generate(
        self,
        prompts: Sequence[str],
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[list[str | None]]:
        """``n`` texts for each prompt; None for each that the server refused.

        Raises:
          ConnectionError: when no request was answered, or the key or model is unknown.
        """
        settings = {"temperature": temperature, "top_p": top_p, "seed": seed}
        settings |= {"max_tokens": max_tokens, "stop": list(stop)}
        found = {p: self.answers.get(p, settings)[:n] for p in dict.fromkeys(prompts)}
        missing = {prompt: texts for prompt, texts in found.items() if len(texts) < n}
        if missing:
            self._complete(missing, settings, n)
        return [padded(found[prompt], n) for prompt in prompts]

    def _complete(
        self, found: Mapping[str, list[str]], settings: Mapping[str, Any], n: int
    ) -> None:
        """Sends requests for what is missing of ``n`` texts; adds the answers."""
        refused: dict[str, str] = {}
        pool = concurrent.futures.ThreadPoolExecutor(self.concurrency)
        try:
            jobs = {
                pool.submit(self._request, prompt, settings, n, len(texts)): prompt
                for prompt, texts in found.items()
            }
            done = concurrent.futures.as_completed(jobs)
            for job in tqdm(done, self.model, len(jobs), disable=None, leave=False):
                prompt = jobs[job]
                try:
                    found[prompt].extend(job.result())
                except _Refused as error:
                    refused[prompt] = str(error)
        finally:
            pool.shutdown(cancel_futures=True)
        if refused:
            prompt, why = next(iter(refused.items()))
            text = (
                f"{self.url} did not answer {len(refused)} of {len(found)} requests; "
                f"the first, {prompt[:60]!r}: {why}"
            )
            if len(refused) == len(found):
                raise ConnectionError(f"{text}. What was answered before is kept.")
            _log.warning("%s", text)

    def _request(
        self, prompt: str, settings: Mapping[str, Any], n: int, have: int
    ) -> list[str]:
        import openai

        # The first samples are there: more of the same seed would repeat them.
        changed = {"seed": settings["seed"] + have, "stop": settings["stop"] or None}
        hopeless = openai.AuthenticationError, openai.PermissionDeniedError
        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                n=n - have,
                **{**settings, **changed},
            )
        except (*hopeless, openai.NotFoundError) as error:
            raise ConnectionError(
                f"{self.url} refuses the model {self.model!r} or the key: "
                f"{_first_line(error)}"
            ) from error
        except openai.OpenAIError as error:
            raise _Refused(_first_line(error)) from error
        texts = [c.message.content for c in reply.choices if c.message.content]
        with self._usage_lock:
            self.usage["requests"] += 1
            if reply.usage:
                self.usage["prompt_tokens"] += reply.usage.prompt_tokens
                self.usage["completion_tokens"] += reply.usage.completion_tokens
        if not texts:
            raise _Refused("the server answered without a text")
        self.answers.add(prompt, settings, texts)
        return texts


class _Refused(Exception):
    """One request that got no text."""


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
