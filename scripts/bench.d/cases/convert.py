# SPDX-License-Identifier: GPL-2.0-or-later
"""Conversion of private memory to shared, beside a punch of the same ranges by the same process.

The rival is ours, too: a conversion that discards cannot be cheaper than its punch, and should
cost no more a page.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from model import Bench, Case, Measure, Placement, Sample, Unit
from servers import privfs_mount
from spawn import measure, probe

from cases.large import require_memory

_PAGE = 4096


@dataclass(frozen=True, slots=True)
class _Range:
    """Ranges of ``step`` bytes; a round has one at least."""

    step: int
    what: str
    placements: tuple[str, ...] = ("same", "split")
    share: int = 1  #: of the pages of a round: those that go one by one take long

    def ranges(self, bench: Bench) -> int:
        """How many ranges a round converts."""
        return max(bench.counts.pages * _PAGE // self.share // self.step, 1)


_RANGES = {
    "convert_4k": _Range(_PAGE, "pages one by one", share=8),
    "convert_2m": _Range(2 << 20, "ranges of 2 MiB"),
    "convert_1g": _Range(1 << 30, "1 GiB at once", ("split",)),
}
_serial = count(1)


def _round(
    row: str, way: str, bench: Bench, placement: Placement, mount: Path
) -> dict[str, Sample]:
    part = _RANGES[row]
    size = part.step * part.ranges(bench)
    require_memory(max(size >> 30, 1))
    file = mount / f"ram{next(_serial)}"
    with file.open("xb") as stream:
        os.truncate(stream.fileno(), size)
    try:
        found = measure(probe("convert", file, part.step, way), placement.caller)
    finally:
        file.unlink()
    return {row: Sample(found["pages_per_second"])}


@contextlib.contextmanager
def _side(row: str, way: str, bench: Bench, placement: Placement) -> Iterator[Measure]:
    with privfs_mount(bench, placement) as mount:
        yield partial(_round, row, way, bench, placement, mount)


CASES = tuple(
    Case(
        row, Unit.PAGES, {row: f"private memory to shared, mapped and with discard: {part.what}"},
        partial(_side, row, "convert"), partial(_side, row, "punch"), "punch of the same",
        placements=part.placements,
    )
    for row, part in _RANGES.items()
)  # fmt: skip
