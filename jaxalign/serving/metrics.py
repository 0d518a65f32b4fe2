"""What the server has done, in the text format that Prometheus reads."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_HELP = {
    "requests_total": ("counter", "Answered requests by path and HTTP status."),
    "request_seconds": ("histogram", "Time to the end of an answer, by path."),
    "prompt_tokens_total": ("counter", "Tokens of prompts that were answered."),
    "completion_tokens_total": ("counter", "Tokens of responses."),
    "running_requests": ("gauge", "Requests being decoded."),
    "waiting_requests": ("gauge", "Requests in the queue."),
    "engines": ("gauge", "Classes of prompt lengths that hold device memory."),
    "engine_bytes": ("gauge", "Device memory that they hold."),
}


class Metrics:
    """Counters of one server; used from the event loop alone."""

    def __init__(self) -> None:
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._seconds: dict[str, list[float]] = {}  # a sum, then a count per bucket
        self._tokens = {"prompt_tokens": 0, "completion_tokens": 0}

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        self._requests[path, status] += 1
        sums = self._seconds.setdefault(path, [0.0] * (len(_SECONDS) + 1))
        sums[0] += seconds
        for i, limit in enumerate(_SECONDS, start=1):
            sums[i] += seconds <= limit

    def used(self, usage: dict[str, int]) -> None:
        """Counts the tokens of an answer, as its ``usage`` tells them."""
        for name in self._tokens:
            self._tokens[name] += usage[name]

    def text(self, **gauges: int) -> str:
        """All of it, with what holds now: ``running_requests`` and the like."""
        values: dict[str, Iterable[str]] = {
            "requests_total": (
                f'{{path="{path}",status="{status}"}} {n}'
                for (path, status), n in sorted(self._requests.items())
            ),
            "request_seconds": self._histograms(),
        }
        totals = {f"{name}_total": n for name, n in self._tokens.items()}
        values |= {name: [f" {n}"] for name, n in {**totals, **gauges}.items()}
        lines = []
        for name, samples in values.items():
            kind, doc = _HELP[name]
            lines += [f"# HELP jaxalign_{name} {doc}", f"# TYPE jaxalign_{name} {kind}"]
            lines += [f"jaxalign_{name}{sample}" for sample in samples]
        return "\n".join(lines) + "\n"

    def _histograms(self) -> Iterator[str]:
        for path, (total, *counts) in sorted(self._seconds.items()):
            all_of_it = sum(n for (p, _), n in self._requests.items() if p == path)
            buckets = zip([*_SECONDS, "+Inf"], [*counts, all_of_it], strict=True)
            for limit, n in buckets:
                yield f'_bucket{{path="{path}",le="{limit}"}} {int(n)}'
            yield f'_sum{{path="{path}"}} {total:g}'
            yield f'_count{{path="{path}"}} {all_of_it}'
