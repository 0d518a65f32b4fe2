"""Numbers of a benchmark as JSON, as a table, and against what was recorded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign import files

# A ratio may fall by so much before it counts as slower: machines are noisy.
_TOLERANCE = 0.15


@dataclasses.dataclass
class Result:
    """One line of ``results.json``; None where a case has no such number.

    Attributes:
      case: its name.
      device: what it ran on.
      dtype: of the activations.
      median_seconds: of a step.
      real_tokens_per_second: prompt and response tokens, padding not counted.
      mfu: operations of the step's matrix products per second, as a share of what one
        large product reaches on the same machine in the same process.
      peak_temporary_bytes: by the compiler's own analysis.
      peer: what it is compared with.
      peer_median_seconds: the same of the peer.
      ratio: what the target is about; for peers, their median over ours.
      target: the ratio to reach.
      reached: whether it was.
      note: why something is missing, or what the ratio is of.
      more: further numbers.
    """

    case: str
    device: str = ""
    dtype: str = "float32"
    median_seconds: float | None = None
    real_tokens_per_second: float | None = None
    mfu: float | None = None
    peak_temporary_bytes: int | None = None
    peer: str | None = None
    peer_median_seconds: float | None = None
    ratio: float | None = None
    target: float | None = None
    reached: bool | None = None
    note: str = ""
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def judge(self, ratio: float | None, target: float | None) -> Result:
        """Sets `ratio`, `target` and `reached`."""
        self.ratio, self.target = ratio, target
        if ratio is not None and target is not None:
            self.reached = ratio >= target
        return self


def write(path: Path, results: Sequence[Result]) -> None:
    """Writes the results; those of other cases in the file stay."""
    kept = {r["case"]: r for r in read(path)}
    kept |= {r.case: dataclasses.asdict(r) for r in results}
    files.write_atomically(path, json.dumps([*kept.values()], indent=2) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The recorded results; none if there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def table(results: Sequence[Result]) -> str:
    """The results for a terminal.

    >>> print(table([Result("sft", median_seconds=0.5).judge(2.0, 1.5)]))
    case                        s/step  tokens/s    MFU  temp MiB   ratio  target
    sft                          0.500         -      -         -    2.00    1.50 yes
    """
    lines = [
        f"{'case':<26}{'s/step':>8}{'tokens/s':>10}{'MFU':>7}{'temp MiB':>10}"
        f"{'ratio':>8}{'target':>8}"
    ]
    for r in results:
        temporary = r.peak_temporary_bytes
        mebibytes = None if temporary is None else temporary / 2**20
        reached = {True: " yes", False: " no", None: ""}[r.reached]
        lines.append(
            f"{r.case:<26}{_cell(r.median_seconds, 8, '.3f')}"
            f"{_cell(r.real_tokens_per_second, 10, '.0f')}{_cell(r.mfu, 7, '.2f')}"
            f"{_cell(mebibytes, 10, '.0f')}{_cell(r.ratio, 8, '.2f')}"
            f"{_cell(r.target, 8, '.2f')}{reached}"
        )
        if r.note:
            lines.append(f"    {r.note}")
    return "\n".join(lines)


def _cell(value: float | None, width: int, spec: str) -> str:
    return f"{'-' if value is None else format(value, spec):>{width}}"


def slower(results: Sequence[Result], recorded: Sequence[dict[str, Any]]) -> list[str]:
    """Cases whose ratio fell below the recorded one by more than the noise.

    >>> slower([Result("a", ratio=1.0)], [{"case": "a", "ratio": 2.0}])
    ['a: ratio 1.00, recorded 2.00']
    """
    before = {r["case"]: r["ratio"] for r in recorded if r.get("ratio")}
    return [
        f"{r.case}: ratio {r.ratio:.2f}, recorded {before[r.case]:.2f}"
        for r in results
        if r.ratio is not None
        and r.case in before
        and r.ratio < (1 - _TOLERANCE) * before[r.case]
    ]
