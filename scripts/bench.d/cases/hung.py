# SPDX-License-Identifier: GPL-2.0-or-later
"""What healthy users pay while another one hangs: a caller waits for it all the time.

Both sides are ours, with and without the one that hangs; what is compared is the 99th percentile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from model import Bench, Case, Measure, Placement, Sample, Unit
from servers import privfs_mount
from spawn import floor, measure, probe, serving

from privfs.notifier.lane import SOCKET

_PATIENT = ["-o", "t_ack=0"]  # for ever, as in the kernel


def _measure(bench: Bench, placement: Placement, file: Path) -> dict[str, Sample]:
    command = floor(bench.floors, "calls", file, bench.counts.calls, "fallocate")
    found = measure(command, placement.caller)
    return {"healthy_p99": Sample(float(found["punch"]["p99_ns"]))}


@contextlib.contextmanager
def _hanging(mount: Path, placement: Placement) -> Iterator[None]:
    """Keep a user stopped and a caller waiting for it."""
    file = mount / "hung"
    file.touch()
    os.truncate(file, 1 << 20)
    with file.open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, 1 << 20)
    command = probe("light_user", mount / SOCKET, file)
    with serving(command, placement.caller, ready=True) as user:
        user.process.send_signal(signal.SIGSTOP)
        caller = subprocess.Popen(["fallocate", "-p", "-o", "0", "-l", "4096", file])
        try:
            yield
        finally:
            user.process.send_signal(signal.SIGCONT)
            caller.wait(10)


@contextlib.contextmanager
def _side(hangs: bool, bench: Bench, placement: Placement) -> Iterator[Measure]:
    floor(bench.floors, "calls")
    with contextlib.ExitStack() as stack:
        mount = stack.enter_context(privfs_mount(bench, placement, *_PATIENT))
        file = mount / "file"
        file.touch()
        command = probe("light_user", mount / SOCKET, file)
        stack.enter_context(serving(command, placement.caller, ready=True))
        if hangs:
            stack.enter_context(_hanging(mount, placement))
        yield partial(_measure, bench, placement, file)


CASES = (
    Case(
        "healthy_p99", Unit.MICROSECONDS,
        {"healthy_p99": "p99 of punches with a user, while the user of another file hangs"},
        partial(_side, True), partial(_side, False), "privfs without it",
    ),
)  # fmt: skip
