# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls on a file of a mount: what their caller waits for.

Both sides run the same C program, ``calls``, against their own mount.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from model import Bench, Case, Measure, Placement, Sample, Side, Unit
from servers import floor_mount, privfs_mount
from spawn import floor, latency, measure, probe, serving

from privfs.notifier.lane import SOCKET

_GROUPS: Mapping[str, Mapping[str, str]] = {
    "fstat": {"fstat": "fstat(2), no attributes cached"},
    "ftruncate": {
        "ftruncate_up": "ftruncate(2), 1 MiB to 2 MiB",
        "ftruncate_down": "ftruncate(2), 2 MiB to 1 MiB, no page between",
    },
    "fallocate": {
        "punch": "fallocate(2) PUNCH_HOLE of an allocated page",
        "allocate": "fallocate(2) KEEP_SIZE of a page that is a hole",
    },
}


def _measure(bench: Bench, placement: Placement, file: Path, group: str) -> dict[str, Sample]:
    command = floor(bench.floors, "calls", file, bench.counts.calls, group)
    found = measure(command, placement.caller)
    return {row: latency(found[row]) for row in _GROUPS[group]}


@contextlib.contextmanager
def _privfs(group: str, user: bool, bench: Bench, placement: Placement) -> Iterator[Measure]:
    floor(bench.floors, "calls")  # both sides are measured by it
    with contextlib.ExitStack() as stack:
        mount = stack.enter_context(privfs_mount(bench, placement))
        file = mount / "file"
        file.touch()
        if user:
            command = probe("light_user", mount / SOCKET, file)
            stack.enter_context(serving(command, placement.caller, ready=True))
        yield partial(_measure, bench, placement, file, group)


@contextlib.contextmanager
def _floor(group: str, user: bool, bench: Bench, placement: Placement) -> Iterator[Measure]:
    with floor_mount(bench, placement, user=user) as mount:
        yield partial(_measure, bench, placement, mount / "file", group)


def _sides(group: str, *, user: bool = False) -> tuple[Side, Side]:
    return partial(_privfs, group, user), partial(_floor, group, user)


def _rows_with_user(measured: Measure) -> dict[str, Sample]:
    return {"punch_with_user": measured()["punch"]}


@contextlib.contextmanager
def _only_punch(side: Side, bench: Bench, placement: Placement) -> Iterator[Measure]:
    with side(bench, placement) as measured:
        yield partial(_rows_with_user, measured)


_PRIVFS_USER, _FLOOR_USER = _sides("fallocate", user=True)

CASES = (
    *(
        Case(name, Unit.MICROSECONDS, rows, *_sides(name), "fuse_floor")
        for name, rows in _GROUPS.items()
    ),
    Case(
        "punch_with_user", Unit.MICROSECONDS,
        {"punch_with_user": "the same punch; one user must acknowledge before the page is freed"},
        partial(_only_punch, _PRIVFS_USER), partial(_only_punch, _FLOOR_USER),
        "fuse_floor, echo_floor",
    ),
)  # fmt: skip
