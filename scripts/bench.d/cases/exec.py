# SPDX-License-Identifier: GPL-2.0-or-later
"""What `kvmsim exec` costs the program that it runs: calls that are answered here, and all others.

The rival of the first is the kernel's own /dev/kvm, that of the others the same without a filter.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from functools import partial

from model import Bench, Case, Measure, Placement, Sample, Side, Unavailable, Unit
from servers import privfs_mount
from spawn import floor, latency, measure

_GROUPS = {
    "kvm": {
        "check_extension": "ioctl(2) KVM_CHECK_EXTENSION, answered by kvmsim exec",
        "get_regs": "ioctl(2) KVM_GET_REGS, answered by kvmsim exec",
        "run": "ioctl(2) KVM_RUN that returns at once (immediate_exit), answered by kvmsim exec",
    },
    "other": {
        "getppid": "getppid(2) under the filter of kvmsim exec",
        "fionread": "ioctl(2) FIONREAD of a pipe under the filter of kvmsim exec",
        "pread": "pread(2) of 64 bytes under the filter of kvmsim exec",
    },
}
_DEVICE = "/dev/kvm"


def _round(
    group: str, before: tuple[str, ...], bench: Bench, placement: Placement
) -> dict[str, Sample]:
    """Run ``ioctls``, which puts itself on the caller's CPU; who answers is on the server's."""
    command = floor(bench.floors, "ioctls", placement.caller, bench.counts.calls, group)
    found = measure([*before, *command], placement.server)
    return {f"exec_{row}": latency(found[row]) for row in _GROUPS[group]}


@contextlib.contextmanager
def _inside(group: str, bench: Bench, placement: Placement) -> Iterator[Measure]:
    floor(bench.floors, "ioctls")  # both sides are measured by it
    with privfs_mount(bench, placement) as mount:
        before = (sys.executable, "-m", "kvmsim", "exec", "--memory", str(mount), "--")
        yield partial(_round, group, before, bench, placement)


@contextlib.contextmanager
def _outside(group: str, bench: Bench, placement: Placement) -> Iterator[Measure]:
    floor(bench.floors, "ioctls")
    if group == "kvm" and not os.access(_DEVICE, os.R_OK | os.W_OK):
        raise Unavailable(f"no {_DEVICE} here that may be opened")
    yield partial(_round, group, (), bench, placement)


def _sides(group: str) -> tuple[Side, Side]:
    return partial(_inside, group), partial(_outside, group)


_RIVALS = {"kvm": _DEVICE, "other": "no filter"}

CASES = tuple(
    Case(
        f"exec_{group}", Unit.MICROSECONDS, {f"exec_{row}": what for row, what in rows.items()},
        *_sides(group), _RIVALS[group],
    )
    for group, rows in _GROUPS.items()
)  # fmt: skip
