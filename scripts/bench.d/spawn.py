# SPDX-License-Identifier: GPL-2.0-or-later
"""Child processes of a benchmark: pinned to a CPU, bounded in time, never left behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from model import Sample, Unavailable

_PR_SET_PDEATHSIG = 1
_READY_SECONDS = 20.0
_END_SECONDS = 10.0
ROUND_SECONDS = 60.0
"""Time that one round of one side may take."""

_libc = ctypes.CDLL(None, use_errno=True)
PROBES = Path(__file__).parent / "probes"


def probe(name: str, *arguments: object) -> list[str]:
    """Return the command that runs one of our own programs."""
    return [sys.executable, str(PROBES / f"{name}.py"), *map(str, arguments)]


def floor(folder: Path, name: str, *arguments: object) -> list[str]:
    """Return the command that runs a C program; raises Unavailable where it was not built."""
    program = folder / name
    if not os.access(program, os.X_OK):
        raise Unavailable(f"{name} is not built: make -C scripts/bench.d says why")
    return [str(program), *map(str, arguments)]


def _bound_to_us(cpu: int) -> Callable[[], None]:
    """Return what a child does before exec: its CPU, and SIGTERM when we die."""

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        os.sched_setaffinity(0, {cpu})

    return prepare


def pin(pid: int, cpu: int) -> None:
    """Pin every thread of a running process; threads to come inherit it."""
    for _ in range(2):  # a thread may have begun meanwhile
        for tid in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(tid), {cpu})


def _is_probe(command: object) -> bool:
    return isinstance(command, Sequence) and command[0] == sys.executable


def _program(command: Sequence[str]) -> str:
    return Path(command[1] if _is_probe(command) else command[0]).name


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def measure(command: Sequence[str], cpu: int, seconds: float = ROUND_SECONDS) -> dict[str, Any]:
    """Run a program that prints one JSON object; raises Unavailable with what it said instead."""
    name = _program(command)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds,
            preexec_fn=_bound_to_us(cpu),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{name} did not end within {seconds:.0f} s") from None
    if done.returncode:
        raise Unavailable(f"{name} failed ({done.returncode}): {_last_line(done.stderr)}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@dataclass(frozen=True, slots=True)
class Server:
    """A program that keeps running."""

    name: str
    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    def line(self, seconds: float) -> bytes:
        """Return its next line; raises Unavailable if it ends instead, or takes too long."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise Unavailable(f"{self.name} said nothing within {seconds:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(_END_SECONDS)
            raise Unavailable(f"{self.name} ended: {self.said()}")
        return line

    def said(self) -> str:
        """Return the last line of its stderr."""
        self.errors.seek(0)
        return _last_line(self.errors.read())


@contextlib.contextmanager
def serving(command: Sequence[str], cpu: int, *, ready: bool) -> Iterator[Server]:
    """Keep a program running: ours end by the end of their stdin, those in C by SIGTERM.

    With ``ready``, wait for its first line.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            preexec_fn=_bound_to_us(cpu),
        )  # fmt: skip
        try:
            server = Server(_program(command), process, errors)
            if ready:
                server.line(_READY_SECONDS)
            yield server
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process in order if it can be, and wait for it."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        if not _is_probe(process.args):
            process.terminate()
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        process.stdout.close()


def latency(found: dict[str, Any]) -> Sample:
    """Return what the C programs print as a latency."""
    return Sample(float(found["p50_ns"]), float(found["p99_ns"]))
