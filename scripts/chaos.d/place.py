# SPDX-License-Identifier: GPL-2.0-or-later
"""The mount that chaos happens on: started, asked, killed, cleared."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from privfs import control

PAGE = 4096
T_ACK = 2.0
QUOTA_PAGES = 12_288  #: 48 MiB
BUDGET_PAGES = 65_536  #: 256 MiB
OPTIONS = ("size=256M", "quota=48M", f"t_ack={T_ACK}")
HERE = Path(__file__).parent
_READY = 60.0
_END = 30.0
_LOOKS = 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Breach(Exception):
    """A rule was broken."""


def until(condition: Callable[[], bool], what: str, timeout: float) -> None:
    """Poll what cannot be waited for; Breach when it never comes."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise Breach(f"not within {timeout:.0f} s: {what}")
        time.sleep(0.01)


class Place:
    """A mount at a directory of its own, served by mount.py."""

    def __init__(self, folder: Path, mutant: str) -> None:
        self.path = folder / "mount"
        self.log_path = folder / "mount.log"
        self.punches = self.moves = 0  #: of all mounts so far, as the last looks saw them
        self._clock = folder / "clock"
        self._counted = (0, 0)
        self._mutant = mutant
        self.path.mkdir()
        self.log_path.touch()
        self.process: subprocess.Popen[bytes] | None = None
        self.fds = self.threads = self.children = 0  #: of a mount that nobody uses

    def start(self) -> None:
        """Mount; a dead mount that lies there is cleared by the program itself."""
        ready, theirs = os.pipe()
        with open(self.log_path, "ab") as log, open(ready, "rb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, HERE / "mount.py", self._mutant, self._clock, "mount",
                 f"--ready-fd={theirs}", *[f"-o{option}" for option in OPTIONS], "--", self.path],
                pass_fds=[theirs], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
            os.close(theirs)
            answered = select.select([stream], [], [], _READY)[0]
            if not answered or not json.loads(stream.readline() or b"null"):
                raise Breach(f"the mount did not come up: {self.log()[-500:]}")
        self._counted = (0, 0)
        self.ask("audit")
        seen = []
        for _ in range(_LOOKS):  # the connection that asked may not be closed yet
            seen.append(self.counts())
            time.sleep(0.02)
        self.fds, self.threads, self.children = (min(counts) for counts in zip(*seen, strict=True))

    def counts(self) -> tuple[int, int, int]:
        """Return descriptors, threads and children of the process."""
        assert self.process is not None
        process = psutil.Process(self.process.pid)
        return process.num_fds(), process.num_threads(), len(process.children(recursive=True))

    def descriptors(self) -> str:
        """Say what descriptors it has, for people."""
        assert self.process is not None
        kinds: Counter[str] = Counter()
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                kinds[re.sub(r"[0-9]+", "N", os.readlink(fd))] += 1
        return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))

    def count(self) -> None:
        """Add what has been punched and moved since the last look."""
        status = self.ask("status")
        punches, moves = status["invalidations"]["total"], status["moves"]
        self.punches += punches - self._counted[0]
        self.moves += moves - self._counted[1]
        self._counted = (punches, moves)

    def freeze(self, seconds: float) -> None:
        """Let it stand still for a while: for itself, time jumps."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            self.process.send_signal(signal.SIGCONT)

    def move_clock(self, seconds: int) -> None:
        """Move the time of day that it sees."""
        assert self.process is not None
        self._clock.write_text(str(seconds))
        self.process.send_signal(signal.SIGUSR2)

    @contextlib.contextmanager
    def no_descriptors(self, spare: int) -> Iterator[None]:
        """Leave it ``spare`` descriptors for a while."""
        assert self.process is not None
        process = psutil.Process(self.process.pid)
        soft, hard = process.rlimit(psutil.RLIMIT_NOFILE)
        process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + spare, hard))
        try:
            yield
        finally:
            process.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))

    def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        """Ask the control socket; a mount that does not answer is a Breach."""
        try:
            return control.ask(self.path, question, **arguments)
        except control.ControlError as error:
            raise Breach(f"{question}: {error}; its log: {self.log()[-500:]}") from error

    def log(self) -> str:
        """Return what it has said."""
        return self.log_path.read_text(errors="replace")

    def kill(self) -> None:
        """End it with SIGKILL; the dead mount stays."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(_END)

    def end(self) -> None:
        """End it in order."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(_END)
        except subprocess.TimeoutExpired:
            raise Breach(f"the mount did not end within {_END:.0f} s of SIGTERM") from None
        if code:
            raise Breach(f"the mount ended with {code}: {self.log()[-500:]}")
        if self.mounted():
            raise Breach("the mount ended and is still there")

    def mounted(self) -> bool:
        """Whether the mount table has it."""
        with open("/proc/self/mountinfo") as table:
            return any(line.split()[4] == str(self.path) for line in table)

    def clear(self) -> None:
        """Leave nothing of it, whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        while self.mounted():
            if subprocess.run(["umount", "-l", self.path], check=False).returncode:
                break

    # --- files --------------------------------------------------------------------------------

    def create(self, name: str, pages: int) -> Path:
        """Make a file."""
        path = self.path / name
        path.touch()
        os.truncate(path, pages * PAGE)
        return path

    def allocate(self, name: str, pages: int) -> int:
        """Allocate the first pages of a file; the errno."""
        fd = os.open(self.path / name, os.O_RDWR | os.O_CLOEXEC)
        try:
            return ctypes.get_errno() if _libc.fallocate(fd, 0, 0, pages * PAGE) else 0
        finally:
            os.close(fd)
