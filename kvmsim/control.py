# SPDX-License-Identifier: GPL-2.0-or-later
"""Questions to a running ``kvmsim`` process: one JSON line each way over a socket of its own.

The sockets lie in a directory that only their user may enter, one a process, named by its pid;
whoever asks must be that user or root (SO_PEERCRED).  A request is ``{"ask": "stat"}``, the answer
``{"ok": [{…}, …]}``, a :meth:`~kvmsim.emulator.Emulator.report` for each VM, or
``{"errno": N, "error": TEXT}``.  ``{"ask": "map", "vm": NAME|PID|null, "table": NAME, "start": N,
"end": N}`` asks for a table of the VMs that are meant (:mod:`kvmsim.views`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvmsim.uapi import U64, KvmError
from privfs.notifier.lane import LinkError

log = logging.getLogger(__name__)

Report = dict[str, Any]

#: Tells of a VM's table in gpas [start, end): (table, start, end) → what it says.
TellTable = Callable[[str, int, int], Report]

_UCRED: Final = struct.Struct("3i")
_MAX_LINE: Final = 4096
_CLIENT_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 0.1
#: An owner that hangs may keep a process from answering for as long as it asks that itself.
_ANSWER_SECONDS: Final = 15.0
_SUFFIX: Final = ".socket"
#: How a process that has ended answers, or one that is about to begin.
_GONE: Final = (errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET)


class ControlError(OSError):
    """A process refused a question or does not answer; ``errno`` says why."""


def directory() -> Path:
    """Return the directory of the sockets: ``$XDG_RUNTIME_DIR/kvmsim`` or ``/tmp/kvmsim-UID``."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    if given and os.path.isdir(given):
        return Path(given, "kvmsim")
    return Path(f"/tmp/kvmsim-{os.geteuid()}")


def _private(place: Path) -> Path:
    """Refuse a directory that anyone else could have put something into."""
    found = os.lstat(place)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ControlError(errno.EPERM, f"{place} is no directory of ours")
    if found.st_mode & 0o077:
        raise ControlError(errno.EPERM, f"{place} is open to others; chmod 700 {place}")
    return place


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Name a path so that it fits into the 107 bytes of ``sun_path``."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


# --- the process's side ------------------------------------------------------------------------


class Control:
    """Answers from a thread of its own until :meth:`close`; VMs come and go."""

    def __init__(self) -> None:
        place = directory()
        place.mkdir(mode=0o700, exist_ok=True)
        self.path = _private(place) / f"{os.getpid()}{_SUFFIX}"
        self._vms: dict[str, Callable[[], Report]] = {}
        self._tables: dict[str, TellTable] = {}
        self._lock = threading.Lock()  # held while a VM is asked, so that none goes meanwhile
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._wake, self._bell = os.pipe2(os.O_CLOEXEC)
        try:
            if self.path.exists() and _cleared(Process(os.getpid(), self.path)):
                log.debug("%s was of a process that was killed and had our pid", self.path)
            with _short(self.path) as name:
                self._listener.bind(name)
            self._listener.listen(16)
        except BaseException:
            self._listener.close()
            os.close(self._wake)
            os.close(self._bell)
            raise
        self._thread = threading.Thread(target=self._run, name="control")
        self._thread.start()

    def add(self, name: str, report: Callable[[], Report], tables: TellTable | None = None) -> None:
        """Tell of a VM from now on; ``report`` and ``tables`` are called in the control thread."""
        with self._lock:
            self._vms[name] = report
            if tables is not None:
                self._tables[name] = tables

    def remove(self, name: str) -> None:
        """Tell of it no more: on return nothing of it is in use."""
        with self._lock:
            self._vms.pop(name, None)
            self._tables.pop(name, None)

    def close(self) -> None:
        """Answer no more, and leave no socket behind."""
        os.close(self._bell)
        self._thread.join()
        self.path.unlink(missing_ok=True)
        self._listener.close()
        os.close(self._wake)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake, 0)  # POLLHUP once the bell is closed
        poll.register(self._listener, select.POLLIN)
        while self._wake not in {fd for fd, _ in poll.poll()}:
            try:
                client, _ = self._listener.accept()
            except OSError as error:  # it has left, or there is no descriptor for it
                log.debug("kvmsim stat: %s", error)
                select.select([self._wake], [], [], _RETRY_SECONDS)
                continue
            with client, contextlib.suppress(OSError):  # it left, or took too long
                client.settimeout(_CLIENT_SECONDS)
                self._talk(client)

    def _talk(self, client: socket.socket) -> None:
        line = bytearray()
        while not line.endswith(b"\n"):
            data = client.recv(_MAX_LINE)
            line += data
            if not data or len(line) > _MAX_LINE:
                return
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, uid, _ = _UCRED.unpack(credentials)
        if not admitted(uid):
            client.sendall(_refusal(errno.EPERM, f"this kvmsim is not of uid {uid}"))
            return
        client.sendall(self.answer(bytes(line)))

    def answer(self, line: bytes) -> bytes:
        """Answer one line; whatever it holds, the answer is one line too."""
        try:
            question = json.loads(line)
        except (ValueError, RecursionError):
            question = None
        ask = question.get("ask") if isinstance(question, dict) else None
        try:
            with self._lock:
                match ask:
                    case "stat":
                        found = [report() for report in self._vms.values()]
                    case "map":
                        found = self._map(question)
                    case _:
                        return _refusal(errno.EINVAL, 'ask {"ask": "stat"} or {"ask": "map"}')
        except (KvmError, LinkError) as error:
            return _refusal(error.errno or errno.EIO, str(error))
        except Exception as error:
            log.exception("kvmsim %s: a VM cannot be told of", ask)
            return _refusal(errno.EIO, f"internal error: {error}")
        return json.dumps({"ok": found}).encode() + b"\n"

    def _map(self, question: Report) -> list[Report]:
        which, table = question.get("vm"), question.get("table")
        start, end = question.get("start"), question.get("end")
        if (
            not (which is None or isinstance(which, str))
            or not isinstance(table, str)
            or type(start) is not int
            or type(end) is not int
            or not 0 <= start <= end <= U64
        ):
            raise KvmError(errno.EINVAL, "map", "vm, table, start and end say what is wanted")
        return [
            {"vm": name, "pid": os.getpid()} | tell(table, start, end)
            for name, tell in self._tables.items()
            if which in (None, name, str(os.getpid()))
        ]


def admitted(uid: int) -> bool:
    """Whether a user may ask: ours, or root."""
    return uid in (0, os.geteuid())


def _refusal(number: int, text: str) -> bytes:
    return json.dumps({"errno": number, "error": text}).encode() + b"\n"


class NoControl:
    """What stands in for :class:`Control` where there can be none."""

    def add(self, name: str, report: Callable[[], Report], tables: TellTable | None = None) -> None:
        """Nobody will ask."""

    def remove(self, name: str) -> None:
        """Nobody can have asked."""


@contextlib.contextmanager
def answering() -> Iterator[Control | NoControl]:
    """Answer questions while the block lasts; where that cannot be, say so and go on."""
    try:
        control = Control()
    except OSError as error:
        log.warning("kvmsim stat will not find this process: %s", error.strerror or error)
        yield NoControl()
        return
    try:
        yield control
    finally:
        control.close()


# --- the asker's side --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Process:
    """A process that may answer."""

    pid: int
    path: Path

    def stat(self) -> list[Report]:
        """Ask about its VMs; ControlError."""
        return self.ask({"ask": "stat"})

    def map(self, vm: str | None, table: str, start: int, end: int) -> list[Report]:
        """Ask for a table of those of its VMs that are meant; ControlError."""
        return self.ask({"ask": "map", "vm": vm, "table": table, "start": start, "end": end})

    def ask(self, question: Report) -> list[Report]:
        """Ask something; ControlError."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(_ANSWER_SECONDS)
                with _short(self.path) as name:
                    sock.connect(name)
                sock.sendall(json.dumps(question).encode() + b"\n")
                with sock.makefile("rb") as stream:
                    reply = json.loads(stream.readline())
        except OSError as error:
            why = error.strerror or str(error)
            raise ControlError(error.errno or errno.ETIMEDOUT, f"pid {self.pid}: {why}") from error
        except ValueError:
            raise ControlError(errno.ECONNRESET, f"pid {self.pid}: it ended meanwhile") from None
        if "ok" not in reply:
            raise ControlError(reply["errno"], f"pid {self.pid}: {reply['error']}")
        found: list[Report] = reply["ok"]
        return found


def processes() -> list[Process]:
    """Return the processes of this user that have a socket, by pid; also what they left behind."""
    try:
        place = _private(directory())
    except FileNotFoundError:
        return []
    found = []
    for path in place.glob(f"*{_SUFFIX}"):
        pid = path.name.removesuffix(_SUFFIX)
        if pid.isdecimal():
            found.append(Process(int(pid), path))
    return sorted(found, key=lambda process: process.pid)


def everything(
    ask: Callable[[Process], list[Report]] = Process.stat,
) -> tuple[list[Report], list[ControlError]]:
    """Ask every process; what a killed one left behind is removed.

    Returns the answers, and why others have not answered.
    """
    found: list[Report] = []
    silent: list[ControlError] = []
    for process in processes():
        try:
            found += ask(process)
        except ControlError as error:
            if error.errno not in _GONE:
                silent.append(error)
            else:
                _cleared(process)
    return found, silent


def _cleared(process: Process) -> bool:
    """Remove a socket that nobody listens at; whether that was so."""
    if process.pid != os.getpid() and os.path.exists(f"/proc/{process.pid}"):
        return False  # about to listen, or to leave
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            with _short(process.path) as name:
                sock.connect(name)
    except OSError as error:
        if error.errno == errno.ECONNREFUSED:
            process.path.unlink(missing_ok=True)
            return True
    return False
