"""One writer at a time in one place: locks that survive kills.

A lock is a file held with `flock`, which the kernel drops when its process ends,
however it ends. So a lock that nobody holds is stale and is taken over; nothing has to
be cleaned up after a kill. In the file stand its holder and a beat that grows while the
holder lives. The beat decides where `flock` does not reach: another host on a disk that
does not pass it on, a file system without it, and a bucket.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxalign import remote

_log = logging.getLogger(__name__)

BEAT = 10.0  # seconds between two beats
PATIENCE = 45.0  # seconds without a beat after which a holder is taken for dead
SETTLE = 1.0  # seconds in which one of two writers at once sees the other in a bucket
NAME = ".lock"  # in a folder; ``.NAME.lock`` beside a file
_SIZE = 4096  # of a lock file: one write of one size, never seen torn
# What systems answer where there is no flock.
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: set[int] = set()  # descriptors: a forked child must not keep its parent's locks


class HeldError(ValueError):
    """Another process writes there."""


@contextlib.contextmanager
def hold(
    place: str | os.PathLike[str], what: str, *, is_file: bool = False
) -> Iterator[None]:
    """Holds the lock of a folder or of a file that is to be written.

    Args:
      place: a path or an address such as ``gs://...``; made if it is a local folder.
      what: it is, for the message.
      is_file: it is a file; its lock lies beside it.

    Raises:
      HeldError: naming the process that holds it.
      OSError: when the lock cannot be written.

    >>> import tempfile
    >>> with hold(tempfile.mkdtemp(), "run directory"):
    ...     print("nobody else writes there")
    nobody else writes there
    """
    with contextlib.ExitStack() as stack:
        if remote.is_remote(place):
            url = os.fspath(place).rstrip("/")
            parent, _, name = url.rpartition("/")
            entry = f"{parent}/.{name}{NAME}" if is_file else f"{url}/{NAME}"
            copy = remote.copy_path(url, "locks")
            copy.mkdir(parents=True, exist_ok=True)
            # The kernel knows the processes that share this folder, the bucket others.
            stack.enter_context(_holding(_File(copy / NAME), url, what))
            stat = copy.stat()
            lock = _Object(entry, f"{_machine()}:{stat.st_dev}:{stat.st_ino}")
            stack.enter_context(_holding(lock, url, what))
        else:
            path = Path(place).expanduser().absolute()
            file = path.with_name(f".{path.name}{NAME}") if is_file else path / NAME
            if not file.parent.exists():
                file.parent.mkdir(parents=True, exist_ok=True)

                @stack.callback
                def remove_what_came_to_nothing() -> None:
                    with contextlib.suppress(OSError):
                        file.parent.rmdir()

            try:
                stack.enter_context(_holding(_File(file), path, what))
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                lock = _Object(f"file://{file}", "")
                stack.enter_context(_holding(lock, path, what))
        yield


@contextlib.contextmanager
def _holding(
    lock: _File | _Object, place: str | os.PathLike[str], what: str
) -> Iterator[None]:
    try:
        lock.acquire()
        before = lock.read()
        # The kernel has vouched that whoever shares it with us is dead.
        if before and before.get("machine") != lock.machine:
            _watch(lock, before)
        program = os.path.basename(sys.argv[0] or "python")
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "machine": lock.machine,
            "command": shlex.join([program, *sys.argv[1:]])[:1000],
            "since": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "token": uuid.uuid4().hex,
            "beat": 0,
        }
        lock.write(holder)
        if isinstance(lock, _Object):  # of two that come at once, the later one stays
            time.sleep(SETTLE)
            _check_ours(lock, holder)
    except _InUse as found:
        lock.abandon()
        raise HeldError(
            f"The {what} {place} is in use by {_named(found.args[0] or {})}. Wait "
            "until it has ended or stop it; or write to another place."
        ) from None
    except BaseException:
        lock.abandon()
        raise
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            holder["beat"] += 1
            # A beat that fails is made up for by the next one.
            with contextlib.suppress(OSError, _InUse):
                _check_ours(lock, holder)
                lock.write(holder)

    beating = threading.Thread(target=beat, name="lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        lock.release(holder)


class _InUse(Exception):
    """Somebody holds the lock: what stands in it."""


def _check_ours(lock: _File | _Object, holder: dict[str, Any]) -> None:
    now = lock.read()
    if now and now.get("token") != holder["token"]:
        raise _InUse(now)


def _watch(lock: _File | _Object, before: dict[str, Any]) -> None:
    """Returns when a holder has not stirred for long; no clocks are compared."""
    _log.warning(
        "%s was the last to write here and has not said that it ended; waiting up to "
        "%.0f s for a sign of life.",
        _named(before).capitalize(),
        PATIENCE,
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        now = lock.read()
        if now and now != before:
            raise _InUse(now)


def _named(holder: dict[str, Any]) -> str:
    """A holder for a message; anybody may have written what is read here."""
    if not isinstance(holder.get("pid"), int):
        return "another process"
    shown = {}
    for name in ("host", "command", "since"):
        text = "".join(c if c.isprintable() else "?" for c in str(holder.get(name)))
        shown[name] = text if len(text) <= 160 else text[:160] + "..."
    return (
        f"process {holder['pid']} on {shown['host']} (`{shown['command']}`, since "
        f"{shown['since']})"
    )


@functools.cache
def _machine() -> str:
    """This boot of this machine: its kernel keeps the locks, over containers too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _decoded(content: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):  # nothing yet, or half of it
        found = json.loads(content)
        return found if isinstance(found, dict) else None


class _File:
    """A lock file under `flock`."""

    def __init__(self, path: Path):
        self._path = path
        self._file: int | None = None
        self.machine = _machine()

    def acquire(self) -> None:
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            self._file = os.open(self._path, flags, 0o644)
            _held.add(self._file)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _InUse(self.read()) from None
            # The holder before removes the file when it ends: is this one still it?
            if self._is_current():
                return
            self.abandon()

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.lstat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def read(self) -> dict[str, Any] | None:
        with contextlib.suppress(OSError):
            # Opened anew: a shared disk shows other hosts' writes only then.
            return _decoded(self._path.read_bytes())

    def write(self, holder: dict[str, Any]) -> None:
        os.pwrite(self._file, json.dumps(holder).encode().ljust(_SIZE), 0)

    def release(self, holder: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            if self._is_current():
                os.unlink(self._path)  # while it is held: nobody else has it
        self.abandon()

    def abandon(self) -> None:
        if self._file is not None:
            _held.discard(self._file)
            os.close(self._file)
            self._file = None


class _Object:
    """An entry without `flock`; of two that begin at once, the later writer stays."""

    def __init__(self, url: str, machine: str):
        self._fs, self._path = remote.connect(url)
        self._url = url
        # Who shares our kernel's lock beside it; without one, only beats tell.
        self.machine = machine or uuid.uuid4().hex

    def acquire(self) -> None: ...

    def read(self) -> dict[str, Any] | None:
        with contextlib.suppress(FileNotFoundError), remote.reporting(self._url):
            return _decoded(self._fs.cat_file(self._path))

    def write(self, holder: dict[str, Any]) -> None:
        content = json.dumps(holder).encode()
        with remote.reporting(self._url):
            if "file" in self._fs.protocol:  # a bucket's objects are never seen torn
                temporary = f"{self._path}.{holder['token']}"
                self._fs.pipe_file(temporary, content)
                os.replace(temporary, self._path)
            else:
                self._fs.pipe_file(self._path, content)

    def release(self, holder: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, _InUse), remote.reporting(self._url):
            _check_ours(self, holder)
            self._fs.rm_file(self._path)

    def abandon(self) -> None: ...


def _close_in_child() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
