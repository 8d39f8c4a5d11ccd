# SPDX-License-Identifier: GPL-2.0-or-later
"""Helper processes of the integration tests: lines in, lines out, and an end that is watched."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Seconds until a test gives up; nothing should ever take so long.
PATIENCE = 60.0


class Actor:
    """``PROGRAM.py ARGUMENTS`` of this directory, or another PROGRAM by its path.

    Its output is collected as it comes.
    """

    def __init__(self, program: str | Path, *arguments: str | os.PathLike[str]) -> None:
        paths = os.pathsep.join([str(ROOT), str(HERE)])
        named = [sys.executable, HERE / f"{program}.py"]
        self.process = subprocess.Popen(
            [*([program] if isinstance(program, Path) else named), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": paths},
        )  # fmt: skip
        self.text = ""
        self._seen = 0
        self._ended = False
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, name=f"reader of {program}")
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 65536):
            with self._more:
                self.text += data.decode(errors="replace")
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def expect(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Wait for a match behind the last one; the end of the process is a failure."""
        deadline = time.monotonic() + timeout
        with self._more:
            while True:
                match = re.compile(pattern, re.MULTILINE).search(self.text, self._seen)
                if match:
                    self._seen = match.end()
                    return match
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    raise AssertionError(f"no {pattern!r} in {self.text[self._seen :]!r}")
                self._more.wait(left)

    def ask(self, line: str, pattern: str = r"(?:ok|error) .*") -> str:
        """Send a line and return its answer."""
        self.send(line)
        return self.expect(pattern).group(0)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end; the exit status, -n for a death by signal n."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        """SIGSTOP it; when this returns, no thread of it runs."""
        self.process.send_signal(signal.SIGSTOP)
        until(lambda: self.states() == {"T"}, "stopped")

    def states(self) -> set[str]:
        """Return the states of its threads, as in proc_pid_stat(5)."""
        found = set()
        for stat in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            try:
                found.add(stat.read_text().rpartition(")")[2].split()[0])
            except OSError:
                continue  # it has just ended
        return found

    def kill(self) -> None:
        """End it with SIGKILL, and see that it ends: a process in state D would not."""
        self.process.kill()
        assert self.wait() == -signal.SIGKILL

    def close(self) -> None:
        """End what is left of it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue  # lines that nobody will read


Cast = Callable[..., Actor]


def until(condition: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
    """Poll something that cannot be waited for."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        threading.Event().wait(0.005)
