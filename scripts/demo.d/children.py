# SPDX-License-Identifier: GPL-2.0-or-later
"""The processes of the demonstration: the mount, and guests with their consoles."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

from stage import Differs

BIN = Path(sys.executable).parent
PRIVFS, KVMSIM = str(BIN / "privfs"), str(BIN / "kvmsim")
_PATIENCE = 10.0
_PROMPT = re.compile(r"^(?:> )+")


class Child:
    """A child process whose lines are read as they come; its input stays open."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to handle, in the right order
        )
        self.seen: list[str] = []
        self._fresh: deque[str] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def _read(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = _PROMPT.sub("", raw.decode("utf-8", "replace").rstrip())
            with self._changed:
                self.seen.append(line)
                self._fresh.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def until(self, pattern: str, seconds: float = _PATIENCE) -> str:
        """Wait for a line, after those that were waited for before."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                while self._fresh:
                    line = self._fresh.popleft()
                    if re.search(pattern, line):
                        return line
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    last = self.seen[-1] if self.seen else "nothing"
                    why = "ended" if self._ended else f"was silent for {seconds:g} s"
                    raise Differs(f"{self.name} {why} before it said {pattern!r}; last: {last}")
                self._changed.wait(left)

    def type(self, line: str) -> None:
        """Type a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Differs(f"{self.name} has ended; last: {self.seen[-1:]}") from None

    def wait(self, seconds: float = _PATIENCE) -> int:
        """Wait for its end; its status, negative for a signal."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Differs(f"{self.name} did not end in {seconds:g} s") from None
        self._reader.join(_PATIENCE)
        return status

    def end(self) -> None:
        """End it if it has not ended: SIGTERM, and SIGKILL if that is not enough."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(_PATIENCE)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class Guest(Child):
    """A VM in a process of its own: ``kvmsim boot``."""

    def __init__(self, name: str, memory: str, vcpus: int) -> None:
        arguments = ["boot", "--memory", memory, "--vcpus", str(vcpus), "--name", name]
        super().__init__(name, [KVMSIM, *arguments])

    def ask(self, line: str, seconds: float = _PATIENCE) -> str:
        """Type a command; its answer, which must begin with ok."""
        self.type(line)
        answer = self.until("^(ok|error|panic)", seconds)
        if not answer.startswith("ok"):
            raise Differs(f"guest {self.name}: {line!r} answered {answer!r}")
        return answer

    def kill(self) -> None:
        """SIGKILL, without a chance to say good-bye."""
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait(_PATIENCE)


def fields(answer: str) -> dict[str, int]:
    """Return the numbers among ``name=value`` of a guest's answer."""
    found = {}
    for name, value in re.findall(r"(\S+)=(\S+)", answer):
        with contextlib.suppress(ValueError):
            found[name] = int(value, 0)
    return found


def traces_of(directory: str) -> list[str]:
    """Return what in this system still has to do with ``directory``."""
    found = []
    if os.path.lexists(directory):
        found.append(f"directory {directory}")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if directory in line:
            found.append(f"mount: {line}")
    for line in Path("/proc/net/unix").read_text().splitlines():
        if directory in line:
            found.append(f"socket: {line.split()[-1]}")
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = process.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if directory in command:
                found.append(f"process {process.parent.name}: {command.strip()}")
    return found
