# SPDX-License-Identifier: GPL-2.0-or-later
"""A picture of a guest's memory: a cell for a page, or for a block of pages in a large guest.

Cells go from left to right and down, 512 pages a line: what one second-stage table maps, so that
2 MiB are a line and what is out of order in one is seen. A cell of several pages has the colour
of the most remarkable of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvmsim.uapi import PAGE_SHIFT
from kvmsim.views.odd import MARKS, is_wrong
from kvmsim.views.png import HEIGHT, Pixels, png, write

ACROSS: Final = 512
MAX_LINES: Final = 1024
_MARGIN, _GAP, _SCALE = 12, 6, 2
_SMALL_WIDTH: Final = 1024


@dataclass(frozen=True, slots=True)
class Class:
    """What a cell may be; later ones win where pages of one cell differ."""

    name: str
    colour: tuple[int, int, int]


#: Background, ink, then cells.
CLASSES: Final = (
    Class("no memory", (24, 26, 32)),
    Class("private, no page", (58, 62, 74)),
    Class("shared, not mapped", (120, 104, 60)),
    Class("shared, mapped", (232, 190, 70)),
    Class("private, not the guest's yet", (62, 88, 132)),
    Class("private, not mapped", (74, 132, 196)),
    Class("private, mapped 4K", (108, 190, 240)),
    Class("private, mapped 2M or more", (92, 200, 130)),
    Class("4K in 2M", (176, 148, 224)),
    Class("stale", (224, 128, 64)),
    Class("not accepted", (196, 96, 176)),
    Class("blocked", (240, 240, 240)),
    Class("wrong (see the table)", (236, 48, 48)),
)
_NUMBER: Final = {one.name: number for number, one in enumerate(CLASSES)}
_INK: Final = len(CLASSES)
_PALETTE: Final = (*(one.colour for one in CLASSES), (222, 222, 222))
_MARKED: Final = tuple(one.name for one in MARKS if one.name in _NUMBER)


def classify(row: Mapping[str, Any], *, confidential: bool) -> int:
    """Return the class of a row of the table of all, by number."""
    marked = [_NUMBER[name] for name in row["odd"] if name in _MARKED]
    if any(is_wrong(name) for name in row["odd"]):
        return _NUMBER["wrong (see the table)"]
    if marked:
        return max(marked)
    if row["type"] == "shared":
        mapped = row["shared"] or row["leaf"]
        return _NUMBER["shared, mapped" if mapped else "shared, not mapped"]
    if row["leaf"]:
        large = row["leaf"]["size"] > 4096
        return _NUMBER["private, mapped 2M or more" if large else "private, mapped 4K"]
    if not row["page"]:
        return _NUMBER["private, no page"]
    if confidential and row["state"] is None:
        return _NUMBER["private, not the guest's yet"]
    return _NUMBER["private, not mapped"]


def cells(
    rows: Sequence[Mapping[str, Any]], start: int, end: int, *, confidential: bool
) -> tuple[npt.NDArray[np.uint8], int]:
    """Return the cells of gpas [start, end) (bytes), (lines, 512), and how many pages one has.

    Lines begin at multiples of what a line shows.
    """
    pages = 1
    while (end - start >> PAGE_SHIFT) > ACROSS * MAX_LINES * pages:
        pages *= 2
    line = ACROSS * pages << PAGE_SHIFT
    base = start // line * line
    lines = max(1, -(-(end - base) // line))
    found = np.zeros(lines * ACROSS, np.uint8)
    cell = pages << PAGE_SHIFT
    for row in rows:
        first = max(row["start"], start) - base
        last = min(row["end"], end) - base
        if first < last:
            part = found[first // cell : -(-last // cell)]
            np.maximum(part, classify(row, confidential=confidential), out=part)
    return found.reshape(lines, ACROSS), pages


def picture(vm: Mapping[str, Any], start: int, end: int) -> bytes:
    """Draw the table of all pages of a VM in gpas [start, end) (bytes) as a PNG file."""
    found, pages = cells(vm["rows"], start, end, confidential=bool(vm["technology"]))
    lines = found.shape[0]
    width = _SMALL_WIDTH // ACROSS
    height = max(1, min(16, 512 // lines))
    field = np.repeat(np.repeat(found, height, axis=0), width, axis=1)
    used = [number for number in range(len(CLASSES)) if (found == number).any()]
    step = HEIGHT * _SCALE + _GAP
    top = _MARGIN + 2 * step
    legend = top + field.shape[0] + _MARGIN
    size = (legend + (len(used) + 1) // 2 * step + _MARGIN, field.shape[1] + 2 * _MARGIN)
    image: Pixels = np.zeros(size, np.uint8)
    image[top : top + field.shape[0], _MARGIN : _MARGIN + field.shape[1]] = field
    what = vm["technology"] or "no confidential hardware"
    write(image, _MARGIN, _MARGIN, f"{vm['vm']} (pid {vm['pid']}), {what}", _INK, _SCALE)
    cell, line = _size(pages << PAGE_SHIFT), _size(ACROSS * pages << PAGE_SHIFT)
    scale = f"gpa 0x{start:x} - 0x{end - 1:x}, a dot is {cell}, a line {line}"
    write(image, _MARGIN, _MARGIN + step, scale, _INK, _SCALE)
    for at, number in enumerate(used):
        x = _MARGIN + at % 2 * (size[1] // 2)
        y = legend + at // 2 * step
        box = HEIGHT * _SCALE
        image[y : y + box, x : x + 2 * box] = _INK
        image[y + 1 : y + box - 1, x + 1 : x + 2 * box - 1] = number
        share = _share(found, number, pages)
        write(image, x + 2 * box + 6, y, f"{CLASSES[number].name}: {share}", _INK, _SCALE)
    return png(image, _PALETTE)


def _share(found: npt.NDArray[np.uint8], number: int, pages: int) -> str:
    return _size(int(np.count_nonzero(found == number)) * pages << PAGE_SHIFT)


def _size(count: int) -> str:
    for shift, unit in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if count >> shift:
            whole = count >> shift
            return (
                f"{whole}{unit}" if whole << shift == count else f"{count / (1 << shift):.1f}{unit}"
            )
    return f"{count}B"
