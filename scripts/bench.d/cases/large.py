# SPDX-License-Identifier: GPL-2.0-or-later
"""One punch of a whole file: a sparse one of 1 TiB, and one with all of its pages.

Both sides run the same C program, ``large``, against their own mount.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from model import Bench, Case, Measure, Placement, Sample, Unavailable, Unit
from servers import floor_mount, privfs_mount
from spawn import floor, measure

_SPARSE_GIB = 1024
#: What the machine must have over the file: half of its memory is a mount's, less some head-room.
_SPARE = 2.5
_ROWS = {
    "punch_sparse": "fallocate(2) PUNCH_HOLE of a file of 1 TiB without a page",
    "punch_resident": "the same of a file with all of its pages (8 GiB, with --quick 1 GiB)",
}


def require_memory(gib: int) -> None:
    """Raise Unavailable where a file of so many GiB has no room."""
    text = Path("/proc/meminfo").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("MemAvailable:")]
    available = int(line.split()[1]) >> 20
    if available < gib * _SPARE:
        raise Unavailable(f"a file of {gib} GiB: only {available} GiB of memory are available")


def _measure(row: str, bench: Bench, placement: Placement, mount: Path) -> dict[str, Sample]:
    resident = row == "punch_resident"
    gib = bench.counts.resident_gib if resident else _SPARSE_GIB
    if resident:
        require_memory(gib)
    file = mount / "large"
    options = ["resident"] if resident else []
    command = floor(bench.floors, "large", file, gib, *options)
    try:
        return {row: Sample(measure(command, placement.caller)["punch_ns"])}
    finally:
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def _ours(row: str, bench: Bench, placement: Placement) -> Iterator[Measure]:
    floor(bench.floors, "large")  # both sides are measured by it
    with privfs_mount(bench, placement) as mount:
        yield partial(_measure, row, bench, placement, mount)


@contextlib.contextmanager
def _rival(row: str, bench: Bench, placement: Placement) -> Iterator[Measure]:
    floor(bench.floors, "large")
    with floor_mount(bench, placement) as mount:
        yield partial(_measure, row, bench, placement, mount)


CASES = tuple(
    Case(
        row, Unit.MILLISECONDS, {row: what}, partial(_ours, row), partial(_rival, row),
        "fuse_floor", placements=("split",),
    )
    for row, what in _ROWS.items()
)  # fmt: skip
