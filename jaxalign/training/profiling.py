"""Where a step's time goes: an xprof trace of some steps, added up by part.

``jaxalign train --profile_steps=10,15`` writes the trace, which xprof and TensorBoard
read, and ``profile/breakdown.json``, which ``jaxalign report`` draws. Operations belong
to the part that their scope names; Flax and this package name the scopes.
"""

from __future__ import annotations

import collections
import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxalign.files import write_atomically

FOLDER = "profile"
BREAKDOWN = f"{FOLDER}/breakdown.json"

# In this order: the first whose pattern the scope has. The decoder's cross-attention is
# called encoder_decoder_attention, so names are matched whole.
_PARTS = {
    "reference": r"[/(]reference[/)]",
    "optimizer": r"[/(]optimizer[/)]",
    "vocabulary": r"[/(]vocabulary[/)]",
    "decoder": r"[/(]decoder[/)]",
    "encoder": r"[/(]encoder[/)]",
    "embedding": r"[/(]token_embedder[/.)]",
}
REST = "loss and the rest"
# What contains other instructions would be counted twice.
_CONTAINERS = {"while", "call", "conditional", "parameter", "tuple"}


def part_of(scope: str) -> str:
    """The part of the step that a scope belongs to.

    >>> part_of("jit(step)/transpose(jvp(T5.decode))/decoder/layers_0/mlp/wo/dot")
    'decoder'
    >>> part_of("jit(step)/jvp(vocabulary)/dot_general")
    'vocabulary'
    """
    for part, pattern in _PARTS.items():
        if re.search(pattern, scope):
            return part
    return REST


def parts_of_instructions(hlo: str) -> dict[str, str]:
    """The part of every instruction of a compiled program, by the instruction's name.

    >>> parts_of_instructions('  %dot.1 = f32[2]{0} dot(%a, %b), metadata={op_name='
    ...                       '"jit(step)/optimizer/mul"}')
    {'dot.1': 'optimizer'}
    """
    found = {}
    for line in hlo.splitlines():
        head = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)", line)
        if not head:
            continue
        opcode = re.search(r"(?:^|[\s})\]])([a-z][\w\-]*)\(", head.group(2))
        if not opcode or opcode.group(1) in _CONTAINERS:
            continue
        scope = re.search(r'op_name="([^"]*)"', line)
        found[head.group(1)] = part_of(scope.group(1)) if scope else REST
    return found


def breakdown(trace: Path, hlo: str) -> dict[str, float]:
    """Shares of the device's busy time by part, largest first; empty if unreadable."""
    parts = parts_of_instructions(hlo)
    files = sorted(trace.rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    busy: collections.Counter[str] = collections.Counter()
    for file in files[-1:]:
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        lines = (line for plane in planes for line in plane.lines)
        for event in (event for line in lines for event in line.events):
            name = _instruction(event)
            if name in parts:
                busy[parts[name]] += event.duration_ns
    total = sum(busy.values())
    return {part: ns / total for part, ns in busy.most_common()} if total else {}


def _instruction(event: Any) -> str:
    """The HLO instruction of an event: its statistic on GPUs, else its name."""
    if event.name.startswith("%"):  # TPUs: "%fusion.3 = ..."
        return event.name[1:].split(" ", 1)[0]
    return str(dict(event.stats).get("hlo_op", event.name))


def check_steps(steps: tuple[int, int] | None, train_steps: int) -> None:
    """Refuses steps that are no range, or that a run never comes to."""
    if steps is None:
        return
    if not 1 <= steps[0] <= steps[1]:
        raise ValueError(
            f"--profile_steps=FIRST,LAST needs 1 <= FIRST <= LAST, got {steps}."
        )
    if steps[0] > train_steps:
        raise ValueError(
            f"--profile_steps={steps[0]},{steps[1]} begins after the last step, "
            f"{train_steps}: choose steps among 1 to {train_steps}."
        )


class Profile(contextlib.AbstractContextManager):
    """Traces steps ``first`` to ``last`` of a run, both included.

    Steps count from 1 and have passed `check_steps`; None traces nothing. A run that
    begins or ends within them traces those that it takes. `run_dir` gets ``profile/``.
    """

    def __init__(
        self, run_dir: Path, steps: tuple[int, int] | None, enabled: bool = True
    ) -> None:
        self.folder = Path(run_dir) / FOLDER
        self.steps = steps if enabled else None
        self._hlo = ""
        self._input_seconds = 0.0
        self._start: float | None = None
        self._traced: list[int] = []

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Ends the trace of a run that stopped, or broke, before the last of them."""
        if self._start is not None and kind is None and self._traced:
            self._end()
        elif self._start is not None:
            jax.profiler.stop_trace()

    def compiled(self, function: Any, *arguments: Any) -> Any:
        """The step to call: compiled here where it is traced, to know its scopes."""
        if self.steps is None or self._hlo:
            return function
        step = function.lower(*arguments).compile()
        self._hlo = step.as_text()
        return step

    @contextlib.contextmanager
    def input(self) -> Iterator[None]:
        """Counts the time that the loop waits for its next batch."""
        start = time.perf_counter()
        yield
        if self._start is not None:
            self._input_seconds += time.perf_counter() - start

    def before(self, step: int, state: Any) -> None:
        """Starts the trace before the first of its steps."""
        begun = self._start is not None or self._traced
        if self.steps and not begun and self.steps[0] <= step <= self.steps[1]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self._start = time.perf_counter()

    def after(self, step: int, state: Any) -> None:
        """Ends the trace after the last of its steps and writes the breakdown."""
        if self._start is None:
            return
        self._traced.append(step)
        if step >= self.steps[1]:
            jax.block_until_ready(state)
            self._end()

    def _end(self) -> None:
        seconds = time.perf_counter() - self._start
        self._start = None
        jax.profiler.stop_trace()
        count = len(self._traced)
        found = {
            "steps": [self._traced[0], self._traced[-1]],
            "seconds_per_step": seconds / count,
            "input_seconds_per_step": self._input_seconds / count,
            "shares": breakdown(self.folder, self._hlo),
        }
        path = self.folder.parent / BREAKDOWN
        write_atomically(path, json.dumps(found, indent=2) + "\n")
