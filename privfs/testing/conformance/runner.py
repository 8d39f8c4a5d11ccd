# SPDX-License-Identifier: GPL-2.0-or-later
"""Run rows, each in a process of its own: a hang or a signal is an outcome, not the end.

The file is made by the runner (KVM's descriptors belong to the process that made the VM) and
inherited by the process that probes it; that process tells the outcome through a pipe.
"""

from __future__ import annotations

import functools
import os
import re
import resource
import select
import signal
import time
from collections.abc import Container, Iterable, Iterator

from privfs.testing.conformance.rings import Unavailable
from privfs.testing.conformance.row import Outcome, Row
from privfs.testing.conformance.subject import Subject
from privfs.testing.conformance.syscalls import errno_name
from privfs.testing.conformance.targets import Target

#: First word of an outcome that says what the machine lacks.
SKIPPED = "skipped:"
_REAP_SECONDS = 10.0
_PATIENCE, _SHORT = 10.0, 0.5


def run(
    target: Target, rows: Iterable[Row], hanging: Container[str] = (), vast: bool = True
) -> Iterator[tuple[Row, Outcome]]:
    """Yield every row that applies to the column of ``target`` with its outcome, in order.

    ``hanging`` names rows that are known to hang: they are waited for half a second, others ten.
    Without ``vast`` rows that would take a terabyte from a file that allows it are left out.
    """
    for row in rows:
        if target.column in row.want and (vast or not row.vast):
            patience = _SHORT if row.name in hanging else _PATIENCE
            yield row, outcome(target, row, patience)


def outcome(target: Target, row: Row, patience: float = _PATIENCE) -> Outcome:
    """Run one row on a fresh file and return what it said; "hangs" after ``patience`` seconds."""
    if _kernel() < row.since:
        return f"{SKIPPED} Linux {row.since[0]}.{row.since[1]}"
    subject = target.make(row.start)
    try:
        return _in_child(row, subject, patience)
    finally:
        target.discard(subject)


@functools.cache
def _kernel() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _in_child(row: Row, subject: Subject, patience: float) -> Outcome:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(ours)
            _probe(row, subject, theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    try:
        said, in_time = _listen(ours, patience)
        if not in_time:
            os.kill(child, signal.SIGKILL)
        status = _reap(child, row.name)
    finally:
        os.close(ours)
    notes = [line for line in said.decode().split("\n") if line]
    if not in_time:
        notes.append("hangs")
    elif status < 0:
        notes.append(signal.Signals(-status).name)
    return "; ".join(notes)


def _probe(row: Row, subject: Subject, pipe: int) -> None:
    """Probe in the child: nothing of the parent's habits may be left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGBUS):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def note(text: str) -> None:
        os.write(pipe, f"{text}\n".encode())

    try:
        found = row.probe(Subject(subject.fd, subject.path, note), *row.arguments)
        note(str(found))
    except OSError as error:
        note(errno_name(error.errno or 0))
    except Unavailable as missing:
        note(f"{SKIPPED} {missing}")
    except BaseException as defect:
        note(f"defect in the probe: {defect!r}")


def _listen(pipe: int, patience: float) -> tuple[bytes, bool]:
    """Read until the child has closed its end; False when that took longer than ``patience``."""
    said, deadline = b"", time.monotonic() + patience
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return said, False
        chunk = os.read(pipe, 4096)
        if not chunk:
            return said, True
        said += chunk


def _reap(child: int, name: str) -> int:
    """Wait for a child that has ended or was killed; return its exit code."""
    pidfd = os.pidfd_open(child)
    try:
        if not select.select([pidfd], [], [], _REAP_SECONDS)[0]:
            raise TimeoutError(f"row {name!r}: process {child} survives SIGKILL (state D?)")
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
