# SPDX-License-Identifier: GPL-2.0-or-later
"""All rows, in the order in which they are shown."""

from __future__ import annotations

from typing import Final

from privfs.testing.conformance import (
    rows_fd,
    rows_io,
    rows_map,
    rows_memory,
    rows_meta,
    rows_places,
)
from privfs.testing.conformance.row import Row

ROWS: Final[tuple[Row, ...]] = (
    *rows_fd.ROWS,
    *rows_io.ROWS,
    *rows_map.ROWS,
    *rows_memory.ROWS,
    *rows_meta.ROWS,
    *rows_places.ROWS,
)

_names = [row.name for row in ROWS]
if len(set(_names)) != len(_names):
    twice = sorted({name for name in _names if _names.count(name) > 1})
    raise ValueError(f"rows of the same name: {', '.join(twice)}")
