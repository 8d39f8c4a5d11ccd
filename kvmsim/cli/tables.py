# SPDX-License-Identifier: GPL-2.0-or-later
"""Columns and sizes for people."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: int) -> str:
    """Return bytes as ls -h does, but exact below ten: ``4K``, ``1.5M``, ``64M``."""
    value = float(count)
    for unit in ("B", "K", "M", "G", "T"):
        if value < 1024 or unit == "T":
            break
        value /= 1024
    digits = 1 if value < 100 and value != int(value) else 0
    return f"{value:.{digits}f}{unit}"


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
