"""How far a run has come, and how fast: one line on the terminal or in a log."""

from __future__ import annotations

import collections
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm import tqdm


class Progress(contextlib.AbstractContextManager):
    """One progress line: step, loss, tokens per second, time left.

    A tqdm bar on a terminal; elsewhere (files, job logs) a log line at most every
    `interval` seconds, and one at the end.

    Args:
      start_step: where this process starts; the restored step of a resumed run.
      stream: the terminal, by default ``sys.stderr``.
      enabled: print at all; `update` measures regardless.

    >>> with Progress(0, 100, enabled=False) as progress:
    ...     speed = progress.update(10, {"loss": 2.5, "batch/tokens": 4096.0})
    >>> sorted(speed)
    ['steps_per_second', 'tokens_per_second']
    """

    def __init__(
        self,
        start_step: int,
        total_steps: int,
        *,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        enabled: bool = True,
    ):
        self._total, self._clock, self._interval = total_steps, clock, interval
        # (seconds, step) of the last updates: what the time left is judged by.
        self._recent = collections.deque([(clock(), start_step)], maxlen=11)
        self._compiling = True
        self._last_log = clock()
        self._text = ""
        self._logged = False
        self._enabled = enabled
        self._bar = None
        stream = sys.stderr if stream is None else stream
        if enabled and stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
            )

    def update(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Reports the steps since the previous call, whose results have arrived.

        Of `metrics`, means over those steps, ``loss`` (else ``objective``) is shown;
        ``batch/tokens`` gives the tokens of one step.
        """
        now = self._clock()
        before, previous = self._recent[-1]
        self._recent.append((now, step))
        if self._compiling and len(self._recent) == 3:
            # The first stretch includes compilation: forget it once there is another.
            self._recent.popleft()
            self._compiling = False
        rate = (step - previous) / max(now - before, 1e-9)
        speed = {"steps_per_second": rate}
        if "batch/tokens" in metrics:
            speed["tokens_per_second"] = rate * metrics["batch/tokens"]
        self._text = self._line(step, metrics, speed)
        self._logged = False
        if self._bar is not None:
            self._bar.set_description_str(self._text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._enabled and now - self._last_log >= self._interval:
            self._log(now)
        return speed

    def _line(
        self, step: int, metrics: Mapping[str, float], speed: Mapping[str, float]
    ) -> str:
        parts = [f"step {step}/{self._total}"]
        loss = metrics.get("loss", metrics.get("objective"))
        if loss is not None:
            parts.append(f"loss {loss:.4g}")
        if "tokens_per_second" in speed:
            rate = tqdm.format_sizeof(speed["tokens_per_second"])
            parts.append(f"{rate} tokens/s")
        (t0, s0), (t1, s1) = self._recent[0], self._recent[-1]
        if s1 > s0:
            left = (t1 - t0) / (s1 - s0) * max(self._total - step, 0)
            minutes, seconds = divmod(round(left), 60)
            parts.append(f"ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
        return "  ".join(parts)

    def _log(self, now: float) -> None:
        logging.getLogger("jaxalign").info(self._text)
        self._last_log, self._logged = now, True

    def close(self) -> None:
        """Ends the bar, or logs the last line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._enabled and self._text and not self._logged:
            self._log(self._clock())

    def __exit__(self, *_: object) -> None:
        self.close()
