# SPDX-License-Identifier: GPL-2.0-or-later
"""What second-stage tables map, as runs: neighbours in both address spaces are one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from hwemu.npt import ADDRESS_MASK, ENTRIES, LARGE, PAGE_SHIFT, PAGE_SIZE, PRESENT, ROOT_LEVEL
from hwemu.tablepool import TablePool

Run = tuple[int, int, int]
"""First gfn, its hpa, pages."""


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
