"""Where a run's numbers go: metrics.jsonl, TensorBoard and W&B."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jaxalign.files import write_atomically

METRICS_FILE = "metrics.jsonl"
CALIBRATION_FILE = "calibration.json"


class MetricWriter(contextlib.AbstractContextManager):
    """Appends metrics to a run directory, one flushed JSON line per call.

    ``metrics.jsonl`` holds flat objects ``{"step": 10, "time": 1.7e9, "train/loss":
    2.3, ...}``. JSON has no number for what is not finite, so such values are written
    as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``; ``float(value)``
    reads both kinds. A process killed while it writes leaves half a line; opening the
    file drops it.

    Args:
      use_wandb: also log to Weights & Biases; the W&B run's id is kept in
        ``wandb_id.txt`` so that a restart continues it.
      enabled: write at all; on one process of a job.

    >>> import tempfile
    >>> run_dir = tempfile.mkdtemp()
    >>> with MetricWriter(run_dir) as writer:
    ...     writer.write(1, {"train/loss": 2.5})
    >>> read_metrics(run_dir)["train/loss"]
    (array([1]), array([2.5]))
    """

    def __init__(
        self, run_dir: str | Path, use_wandb: bool = False, enabled: bool = True
    ):
        self.enabled = enabled
        self.run_dir = Path(run_dir)
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if enabled:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._wandb = _wandb_run(self.run_dir) if use_wandb else None
            self._open(step=None)

    def _open(self, step: int | None) -> None:
        from tensorboardX import SummaryWriter

        self._close_files()
        _rewrite(self.run_dir / METRICS_FILE, last_step=step)
        self._file = open(self.run_dir / METRICS_FILE, "a", encoding="utf-8")
        # TensorBoard hides the events of an earlier process from purge_step on.
        purge = None if step is None else step + 1
        self._tensorboard = SummaryWriter(str(self.run_dir), purge_step=purge)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records scalars of one step; what is not one number is refused by name."""
        if not self.enabled:
            return
        if self._file is None:
            raise ValueError(f"MetricWriter of {self.run_dir} is closed.")
        step = int(step)
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        line = {"step": step, "time": round(time.time(), 3)}
        for name, value in values.items():
            line[name] = value if math.isfinite(value) else json.dumps(value)
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def resume_at(self, step: int) -> None:
        """Forgets what an earlier process wrote after `step`.

        Call it with the restored step (0 without a checkpoint) before the first
        `write`: the finished file then equals an unbroken run's, except for times and
        speeds. The file is replaced atomically.
        """
        if self.enabled:
            self._open(step=int(step))

    def _close_files(self) -> None:
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()
            self._file = self._tensorboard = None

    def close(self) -> None:
        self._close_files()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads ``metrics.jsonl``: ``{name: (steps int64 [n], values float64 [n])}``.

    ``"time"`` (Unix seconds) is among the names. Steps ascend; where a step was
    written twice the later value counts. A torn last line is ignored, another one is a
    ValueError; an absent file gives ``{}``.
    """
    series: dict[str, dict[int, float]] = {}
    for line in _lines(Path(run_dir) / METRICS_FILE):
        step = line.pop("step")
        for name, value in line.items():
            series.setdefault(name, {})[step] = float(value)
    out = {}
    for name, points in series.items():
        steps = np.array(sorted(points), np.int64)
        out[name] = steps, np.array([points[s] for s in steps.tolist()], np.float64)
    return out


def write_calibration(
    run_dir: str | Path,
    step: int,
    values: np.ndarray,
    targets: np.ndarray,
    bins: int = 10,
) -> None:
    """Writes ``calibration.json``: a value network's targets, by its predictions.

    The responses are sorted by predicted value and cut into `bins` parts of equal
    size; a calibrated value network has ``value == target`` in each. Format:
    ``{"step": s, "bins": [{"value": mean, "target": mean, "count": n}, ...]}``.

    Args:
      values: predictions ``[n]``, one per response.
      targets: what they were to be ``[n]``: for DRO ``r - tau lr``, the soft value.
    """
    values, targets = np.asarray(values, np.float64), np.asarray(targets, np.float64)
    order = np.argsort(values, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    rows = [
        {"value": values[p].mean(), "target": targets[p].mean(), "count": len(p)}
        for p in parts
    ]
    text = json.dumps({"step": int(step), "bins": rows}, indent=1) + "\n"
    write_atomically(Path(run_dir) / CALIBRATION_FILE, text)


def _scalar(name: str, value: Any) -> float:
    array = np.asarray(value)
    if array.size != 1 or not (
        np.issubdtype(array.dtype, np.number) or array.dtype == bool
    ):
        raise ValueError(
            f"metric {name!r}: expected one number, got {array.dtype} of shape "
            f"{array.shape}. Reduce it before writing."
        )
    return float(array.reshape(()))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The parsed lines, without a torn last one."""
    if not path.exists():
        return []
    # Bytes first: a tear may fall inside a character.
    raws = path.read_bytes().split(b"\n")
    if not raws[-1]:
        del raws[-1]
    out = []
    for number, raw in enumerate(raws, start=1):
        try:
            line = json.loads(raw)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError("no object with an integer 'step'")
        except ValueError as error:
            if number == len(raws):
                break
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with a 'step', got "
                f"{raw[:80]!r} ({error}). Remove the line."
            ) from error
        out.append(line)
    return out


def _rewrite(path: Path, last_step: int | None) -> None:
    """Drops a torn tail and, given `last_step`, later lines; atomic, or untouched."""
    if not path.exists():
        return
    text = "".join(
        json.dumps(line) + "\n"
        for line in _lines(path)
        if last_step is None or line["step"] <= last_step
    )
    if text.encode() != path.read_bytes():
        write_atomically(path, text)


def _wandb_run(run_dir: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "use_wandb=True needs the 'wandb' package, which is not installed. "
            "Install it (pip install wandb) or set use_wandb=False: metrics.jsonl and "
            "TensorBoard events are written either way."
        ) from error
    id_file = run_dir / "wandb_id.txt"
    run_id = id_file.read_text().strip() if id_file.exists() else None
    run = wandb.init(dir=str(run_dir), name=run_dir.name, id=run_id, resume="allow")
    id_file.write_text(run.id)
    return run
