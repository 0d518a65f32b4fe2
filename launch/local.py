#!/usr/bin/env python3
"""Runs a real multi-process job on this machine, on CPU devices.

    python launch/local.py -n 2 --devices_per_process=4 -- jaxalign train --gin_file=...

Every process gets the command plus ``--coordinator_address``, ``--process_count`` and
``--process_index``; its lines are printed behind its number. The first process that
fails ends the others; SIGTERM and SIGINT are passed on to all. ``--dry_run`` prints the
commands.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time


def main(argv: list[str]) -> int:
    own, _, command = _split(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--processes", type=int, default=2)
    parser.add_argument("--devices_per_process", type=int, default=1)
    parser.add_argument("--grace", type=float, default=30.0, help="seconds, then kill")
    parser.add_argument("--dry_run", action="store_true")
    args = parser.parse_args(own)
    if not command:
        parser.error("no command: put it after --, as in -- jaxalign train ...")
    if args.processes < 1 or args.devices_per_process < 1:
        parser.error("-n and --devices_per_process must be at least 1")
    address = f"127.0.0.1:{free_port()}"
    commands = [
        [
            *command,
            f"--coordinator_address={address}",
            f"--process_count={args.processes}",
            f"--process_index={index}",
        ]
        for index in range(args.processes)
    ]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(args.devices_per_process),
    }
    if args.dry_run:
        shown = " ".join(f"{k}={v}" for k, v in settings.items())
        print("\n".join(f"{shown} {shlex.join(c)}" for c in commands))
        return 0
    return run(commands, os.environ | settings, args.grace)


def _split(argv: list[str]) -> tuple[list[str], str, list[str]]:
    if "--" not in argv:
        return argv, "", []
    at = argv.index("--")
    return argv[:at], "--", argv[at + 1 :]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(commands: list[list[str]], environment: dict[str, str], grace: float) -> int:
    """Runs all commands at once; returns the first failure's exit status, or 0."""
    processes = [
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for command in commands
    ]
    readers = [
        threading.Thread(target=_prefix, args=(i, process), daemon=True)
        for i, process in enumerate(processes)
    ]
    for reader in readers:
        reader.start()

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    failed = 0
    while not failed:
        # A list, so that all are asked: any() would stop at the first that runs.
        found = [process.poll() for process in processes]
        failed = next((status for status in found if status), 0)
        if None not in found:
            break
        time.sleep(0.05)
    if failed:
        # The others may be saying why; they are given a moment, then ended.
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and any(p.poll() is None for p in processes):
            time.sleep(0.05)
        for process in processes:
            if process.poll() is None:
                process.kill()
    for process, reader in zip(processes, readers, strict=True):
        process.wait()
        reader.join()
    return 128 - failed if failed < 0 else failed


def _prefix(index: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        sys.stdout.write(f"[{index}] {line}")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
