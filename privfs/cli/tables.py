# SPDX-License-Identifier: GPL-2.0-or-later
"""Columns, sizes and durations for people."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: int) -> str:
    """Return bytes as lsmem(1) and ls -h do, but exact below ten: ``4K``, ``1.5M``, ``64M``."""
    value = float(count)
    for unit in ("B", "K", "M", "G", "T"):
        if value < 1024 or unit == "T":
            break
        value /= 1024
    digits = 1 if value < 100 and value != int(value) else 0
    return f"{value:.{digits}f}{unit}"


def gib(count: int) -> str:
    """Return bytes in words of the reader: ``11.8 GiB``."""
    text = size(count)
    number, unit = text[:-1], text[-1]
    return f"{number} B" if unit == "B" else f"{number} {unit}iB"


def microseconds(value: float) -> str:
    """Return a duration: ``87 µs``, ``1.3 ms``, ``2.00 s``."""
    if value < 1000:
        return f"{value:.0f} µs"
    if value < 1_000_000:
        return f"{value / 1000:.1f} ms"
    return f"{value / 1_000_000:.2f} s"


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> list[str]:
    """Return aligned lines; ``right`` holds ``>`` at the columns that align to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [
            f"{cell:{'>' if right[i : i + 1] == '>' else '<'}{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(" ".join(cells).rstrip())
    return lines
