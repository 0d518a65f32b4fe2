"""The whole benchmark: which cases, in what order, what becomes of their numbers."""

from __future__ import annotations

import json
import logging
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.steps import cases, peers, ragged
from benchmarks.steps.results import Result, read, slower, table, write
from jaxalign.data.bad_rows import nearest

_log = logging.getLogger(__name__)


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """What a worker process finds; see `benchmarks.steps.worker`.

    Raises:
      RuntimeError: with its last message, where it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.steps.worker"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        _log.debug("%s", done.stderr)
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            raise RuntimeError(
                f"its process was ended by {name}, as for want of memory"
            )
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def step_result(case: cases.Case, steps: int, rounds: int) -> Result:
    """Times a case and its peer in turns, so that noise falls on both alike."""
    ours: list[dict[str, Any]] = []
    theirs: list[peers.Peer] = []
    for _ in range(rounds):
        ours.append(measure(case.request(steps)))
        if case.peer:
            theirs.append(peers.time_peer(*case.peer.split()))
            if theirs[-1].seconds is None:
                break
    found = ours[-1]
    seconds = statistics.median(s for o in ours for s in o["seconds"])
    ceiling = statistics.median(o["matmul_ceiling"] for o in ours)
    result = Result(
        case.name,
        found["device"],
        found["dtype"],
        seconds,
        found["real_tokens"] / seconds,
        found["model_flops"] / seconds / ceiling,
        found["peak_temporary_bytes"],
        more={
            "compile_seconds": found["compile_seconds"],
            "resident_bytes": found["resident_bytes"],
            "matmul_ceiling_flops": ceiling,
            "model_flops": found["model_flops"],
            "seconds": [s for o in ours for s in o["seconds"]],
        },
    )
    if case.mfu_target:
        result.note = "ratio: MFU"
        return result.judge(result.mfu, case.mfu_target)
    if not case.peer:
        return result
    result.peer = case.peer
    medians = [peer.seconds for peer in theirs if peer.seconds is not None]
    if not medians:
        result.note = f"no peer: {theirs[-1].note}"
        return result.judge(None, case.target)
    result.peer_median_seconds = statistics.median(medians)
    return result.judge(result.peer_median_seconds / seconds, case.target)


def temporaries(_: int, __: int) -> Result:
    """A DPO step's temporaries, logits and attention in chunks against whole.

    Layers are computed again on both sides, in a loop: elsewhere XLA's CPU compiler
    merges that with what was computed before.
    """
    found = []
    for settings in ((), (cases.CHUNK, cases.ATTENTION)):
        case = cases.step_case(
            "", "dpo", "small", cases.SCAN, cases.REMAT_FULL, *settings,
            inputs=512, targets=512,
        )  # fmt: skip
        request = {"kind": "memory", "gin_files": [*case.gin_files]}
        found.append(measure(request | {"bindings": [*case.bindings]}))
    whole, chunked = found
    share = chunked["peak_temporary_bytes"] / whole["peak_temporary_bytes"]
    result = Result(
        "temporaries-chunked",
        chunked["device"],
        chunked["dtype"],
        peak_temporary_bytes=chunked["peak_temporary_bytes"],
        peer="the same step, nothing in chunks",
        note="ratio: unchunked temporaries / chunked",
        more={"unchunked_temporary_bytes": whole["peak_temporary_bytes"]},
    )
    return result.judge(1 / share, 1 / cases.TEMPORARIES_TARGET)


def responses_growth(steps: int, _: int) -> Result:
    """Seconds per model operation with 16 responses to a prompt, against one."""
    found = {}
    for count in (1, 4, 16):
        case = cases.step_case(
            f"responses-{count}",
            "dro_v",
            "small",
            f"inputs.Dataset.decoder_rows = {count}",
            batch=max(1, 16 // count),
        )
        one = measure(case.request(steps))
        seconds = statistics.median(one["seconds"])
        found[count] = {
            "seconds_per_real_token": seconds / one["real_tokens"],
            "seconds_per_gigaflop": seconds / one["model_flops"] * 1e9,
            "real_tokens": one["real_tokens"],
        }
    result = Result(
        "responses-1-to-16",
        one["device"],
        note="ratio: seconds per operation with 1 response to a prompt / with 16",
        more={"responses": found},
    )
    least = min(f["seconds_per_gigaflop"] for f in found.values())
    most = max(f["seconds_per_gigaflop"] for f in found.values())
    return result.judge(least / most, 1 / cases.GROWTH_TARGET)


OTHERS: dict[str, Callable[[int, int], Result]] = {
    "temporaries-chunked": temporaries,
    "ragged-packed": ragged.packed,
    "input-pipeline": ragged.input_pipeline,
    "examples-1k-to-100k": ragged.examples_growth,
    "responses-1-to-16": responses_growth,
}


def names(everything: bool = False) -> list[str]:
    """Cases by name: those with targets, or all that this machine can run."""
    steps = cases.STEPS if everything else cases.MAIN
    return [*(case.name for case in steps), *OTHERS]


def run(
    wanted: Sequence[str] = (),
    *,
    everything: bool = False,
    steps: int = 6,
    rounds: int = 2,
    output: str | Path = "benchmarks/results.json",
    check: bool = False,
) -> list[str]:
    """Runs cases, prints their table and writes it.

    Args:
      wanted: names of cases; by default those of the table of targets.
      everything: all cases by default, not only those with targets.
      steps: timed in each round.
      rounds: of each case and its peer, in turns.
      output: JSON file; results of other cases in it stay.
      check: compare with what `output` holds instead of writing it.

    Returns:
      With `check`, a line for each case that became slower.

    Raises:
      ValueError: for an unknown case, naming the nearest.
    """
    by_name = {case.name: case for case in cases.STEPS}
    known = [*by_name, *OTHERS]
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"No case {name!r}"
                f"{nearest(name, known) or '; known: ' + ', '.join(known)}."
            )
    # Not jax.devices(): it would keep an accelerator from the workers.
    platform = os.environ.get("JAX_PLATFORMS", "").split(",")[0] or "cpu"
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    found = []
    for name in wanted or names(everything):
        case = by_name.get(name)
        if case and platform not in case.devices and not wanted:
            continue
        _log.info("Measuring %s", name)
        try:
            if case:
                found.append(step_result(case, steps, rounds))
            else:
                found.append(OTHERS[name](steps, rounds))
        except (RuntimeError, FileNotFoundError) as error:
            found.append(Result(name, note=f"not measured: {error}"))
        print(table(found[-1:]).split("\n", 1)[1], flush=True)
        if not check:
            write(Path(output), found)
    print("\n" + table(found))
    if check:
        return slower(found, read(Path(output)))
    print(f"\nWritten to {output}")
    return []
