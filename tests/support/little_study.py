"""Four stages without a compiler, killed where ``DIE`` says: ``STAGE:MOMENT``.

``python little_study.py FOLDER`` runs them with a kill at each moment, one after
another, then without one; it prints how the runs ended, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

from jaxalign.pipelines.study import Study

MOMENTS = (
    "numbers.txt:half",
    "numbers.txt:end",
    "verdicts.jsonl:half",
    "total.json:half",
    "deep/last.txt:half",
    "deep/last.txt:end",
)


def die_at(stage: str, moment: str) -> None:
    if os.environ.get("DIE") == f"{stage}:{moment}":
        os.kill(os.getpid(), signal.SIGKILL)


def write(output: Path, number: int) -> None:
    """Written in two goes, the first of which is found again."""
    partial = output.with_name(f"{output.name}.partial")
    if not partial.exists():
        partial.write_text(f"{number}\n")
    die_at("numbers.txt", "half")
    partial.write_text("".join(f"{i}\n" for i in range(number)))
    os.replace(partial, output)
    die_at("numbers.txt", "end")


def noisy(items: list[int]) -> list[float]:
    """A judge that never says the same twice."""
    if 4 in items:
        die_at("verdicts.jsonl", "half")
    return [item + random.random() for item in items]


def total(output: Path, verdicts: Path) -> None:
    die_at("total.json", "half")
    output.write_text(json.dumps(sum(map(float, verdicts.read_text().split()))))


def last(output: Path, total: Path, numbers: Path) -> None:
    die_at("deep/last.txt", "half")
    output.write_text(total.read_text() + numbers.read_text())
    die_at("deep/last.txt", "end")


def run(folder: str, number: int = 6, redo: tuple[str, ...] = (), say=print) -> Path:
    with Study(folder, redo=redo, say=say) as study:
        numbers = study.file("numbers.txt", write, number=number)
        items = [int(line) for line in numbers.read_text().split()]
        verdicts = study.lines("verdicts.jsonl", noisy, items, batch=2)
        summed = study.file("total.json", total, verdicts=verdicts)
        found = study.file("deep/last.txt", last, total=summed, numbers=numbers)
        study.page("A little study", "<p>Four stages.</p>")
    return found


def killed(folder: str, moment: str) -> int:
    """Runs in a process of its own, a copy of this one; its exit status."""
    child = os.fork()
    if not child:
        os.environ["DIE"] = moment
        run(folder, say=None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ended = [killed(str(folder), moment) for moment in MOMENTS[:3]]
    before = (folder / "verdicts.jsonl.partial").read_text()
    ended += [killed(str(folder), moment) for moment in MOMENTS[3:]]
    told: list[str] = []
    run(str(folder), say=told.append)
    print(json.dumps({"ended": ended, "before": before, "told": told}))
