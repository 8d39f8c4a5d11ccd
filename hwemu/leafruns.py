# SPDX-License-Identifier: GPL-2.0-or-later
"""What second-stage tables map, as runs (neighbours in both address spaces are one) or columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hwemu.npt import (
    ADDRESS_MASK,
    ENTRIES,
    LARGE,
    PAGE_SHIFT,
    PAGE_SIZE,
    PRESENT,
    ROOT_LEVEL,
    WRITABLE,
)
from hwemu.tablepool import TablePool

Run = tuple[int, int, int]
"""First gfn, its hpa, pages."""


class LeafColumns(NamedTuple):
    """The leaves of gfns in a row, an element a page: a copy that no lock guards.

    ``hpa`` int64 in bytes, -1 where nothing is mapped; ``level`` uint8, 1 for 4 KiB to 3 for 1 GiB
    and 0 for none; ``writable`` bool.
    """

    hpa: npt.NDArray[np.int64]
    level: npt.NDArray[np.uint8]
    writable: npt.NDArray[np.bool_]


def leaf_columns(pool: TablePool, start: int, end: int) -> LeafColumns:
    """The leaves of gfns [start, end); the cost follows tables and width, not leaves."""
    size = end - start
    found = LeafColumns(
        np.full(size, -1, np.int64), np.zeros(size, np.uint8), np.zeros(size, np.bool_)
    )
    _copy(pool, 0, ROOT_LEVEL, 0, start, end, found)
    return found


def _copy(
    pool: TablePool, table: int, level: int, base: int, start: int, end: int, into: LeafColumns
) -> None:
    """Copy the leaves of gfns [start, end) below ``table``, whose first entry maps ``base``."""
    row, shift = pool.rows[table], 9 * (level - 1)
    first = max(start - base, 0) >> shift
    last = min((end - base + (1 << shift) - 1) >> shift, ENTRIES)
    if level == 1:
        words = row[first:last].copy()
        here = slice(base + first - start, base + last - start)
        present = words & np.uint64(PRESENT) != 0
        into.hpa[here] = np.where(present, (words & np.uint64(ADDRESS_MASK)).astype(np.int64), -1)
        into.level[here] = present
        into.writable[here] = present & (words & np.uint64(WRITABLE) != 0)
        return
    for index in (np.flatnonzero(row[first:last] & np.uint64(PRESENT)) + first).tolist():
        entry, span = int(row[index]), base + (index << shift)
        if not entry & LARGE:
            _copy(pool, pool.index(entry), level - 1, span, start, end, into)
            continue
        lower, upper = max(start, span), min(end, span + (1 << shift))
        here = slice(lower - start, upper - start)
        hpa = entry & ADDRESS_MASK & ~((1 << (shift + PAGE_SHIFT)) - 1)
        into.hpa[here] = hpa + (np.arange(lower, upper, dtype=np.int64) - span) * PAGE_SIZE
        into.level[here] = level
        into.writable[here] = bool(entry & WRITABLE)


def leaf_runs(pool: TablePool, start: int, end: int) -> Iterator[Run]:
    """The runs mapped in gfns [start, end) below the root, in order and as long as they can be."""
    pending: Run | None = None
    for gfn, hpa, count in _leaves(pool, 0, ROOT_LEVEL, 0, start, end):
        if (
            pending
            and pending[0] + pending[2] == gfn
            and (pending[1] + pending[2] * PAGE_SIZE == hpa)
        ):
            pending = (pending[0], pending[1], pending[2] + count)
            continue
        if pending:
            yield pending
        pending = (gfn, hpa, count)
    if pending:
        yield pending


def _leaves(
    pool: TablePool, table: int, level: int, base: int, start: int, end: int
) -> Iterator[Run]:
    """Runs within each table below ``table``, whose first entry maps gfn ``base``."""
    row = pool.rows[table]
    shift = 9 * (level - 1)
    first = max(start - base, 0) >> shift
    last = min((end - base + (1 << shift) - 1) >> shift, ENTRIES)
    present = np.flatnonzero(row[first:last] & np.uint64(PRESENT)) + first
    if level == 1:
        if len(present) == 0:
            return
        hpas = row[present] & np.uint64(ADDRESS_MASK)
        breaks = np.flatnonzero((np.diff(present) != 1) | (np.diff(hpas) != np.uint64(PAGE_SIZE)))
        edges = [0, *(breaks + 1).tolist(), len(present)]
        for left, right in itertools.pairwise(edges):
            yield base + int(present[left]), int(hpas[left]), right - left
        return
    for index in present.tolist():
        entry = pool.words[table * ENTRIES + index]
        span = base + (index << shift)
        if not entry & LARGE:
            yield from _leaves(pool, pool.index(entry), level - 1, span, start, end)
            continue
        lower, upper = max(start, span), min(end, span + (1 << shift))
        hpa = entry & ADDRESS_MASK & ~((1 << (shift + PAGE_SHIFT)) - 1)
        yield lower, hpa + (lower - span) * PAGE_SIZE, upper - lower
