# SPDX-License-Identifier: GPL-2.0-or-later
"""First touches of guest-private pages, a fault each unless the file has them already.

The rival is a C program that maps a memfd and writes a byte to each page.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

from model import Bench, Case, Measure, Placement, Sample, Unit
from servers import privfs_mount
from spawn import floor, measure, probe

_PAGE = 4096
_ROWS = {
    "touch_fresh": "each touch allocates its page at the owner",
    "touch_allocated": "the pages were allocated before: a fault maps those around it too",
}
_serial = count(1)


def _ours(
    row: str, allocated: bool, bench: Bench, placement: Placement, mount: Path
) -> dict[str, Sample]:
    file = mount / f"ram{next(_serial)}"
    size = bench.counts.pages * _PAGE
    with file.open("xb") as stream:
        os.truncate(stream.fileno(), size)
        if allocated:
            os.posix_fallocate(stream.fileno(), 0, size)
    try:
        found = measure(probe("touch", file), placement.caller)
    finally:
        file.unlink()
    return {row: Sample(found["pages_per_second"])}


def _rival(row: str, allocated: bool, bench: Bench, placement: Placement) -> dict[str, Sample]:
    options = ["--allocated"] if allocated else []
    command = floor(bench.floors, "touch_floor", *options, bench.counts.pages, 1)
    return {row: Sample(measure(command, placement.caller)["pages_per_second"])}


@contextlib.contextmanager
def _ours_side(row: str, allocated: bool, bench: Bench, placement: Placement) -> Iterator[Measure]:
    with privfs_mount(bench, placement) as mount:
        yield partial(_ours, row, allocated, bench, placement, mount)


@contextlib.contextmanager
def _rival_side(row: str, allocated: bool, bench: Bench, placement: Placement) -> Iterator[Measure]:
    floor(bench.floors, "touch_floor")
    yield partial(_rival, row, allocated, bench, placement)


CASES = tuple(
    Case(
        row, Unit.PAGES, {row: what},
        partial(_ours_side, row, row == "touch_allocated"),
        partial(_rival_side, row, row == "touch_allocated"),
        "touch_floor",
    )
    for row, what in _ROWS.items()
)  # fmt: skip
