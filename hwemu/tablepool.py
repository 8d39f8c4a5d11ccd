# SPDX-License-Identifier: GPL-2.0-or-later
"""The pool that second-stage tables are taken from, and the tables that wait to return to it.

A table that became empty is *parked*: an engine may still be reading it in the middle of a walk.
Until `TablePool.reclaim` is called after a drained flush only the same place in the tree may have
it back, where such a walk finds what belongs to its own address.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hwemu.npt import (
    ADDRESS_BITS,
    ADDRESS_MASK,
    ENTRIES,
    NON_LEAF,
    PAGE_SHIFT,
    PAGE_SIZE,
    Stage2Error,
)


class RangeError(Stage2Error, ValueError):
    """A range is misaligned, empty or leaves the address space; nothing was changed."""


class PoolFullError(Stage2Error, MemoryError):
    """The pool has no free table; pages before the failing one stay mapped."""


class TablePool:
    """Tables by index in ``pool``, a writable buffer of whole pages that begins at ``hpa``.

    ``words`` is a 'Q' view of everything, ``rows`` the same bytes as an array (tables, 512), and
    ``live`` the number of present entries of each table, kept by the owner. Table 0 is in use.
    """

    def __init__(self, pool: object, hpa: int) -> None:
        raw = memoryview(pool)  # type: ignore[arg-type]
        if raw.readonly or raw.nbytes < 2 * PAGE_SIZE or raw.nbytes % PAGE_SIZE:
            raise RangeError(
                f"stage-2 pool of {raw.nbytes} bytes: need a writable buffer of whole 4096-byte "
                "pages, at least two"
            )
        if hpa % PAGE_SIZE or hpa < 0 or hpa + raw.nbytes > 1 << ADDRESS_BITS:
            raise RangeError(
                f"stage-2 pool at hpa {hpa:#x}: must be page-aligned and end below 2**40"
            )
        self.hpa = hpa
        self.words = raw.cast("B").cast("Q")
        self.rows: npt.NDArray[np.uint64] = np.frombuffer(raw, dtype=np.uint64).reshape(-1, ENTRIES)
        self.live = [0] * len(self.rows)
        self.rows[0] = 0
        self._fresh = 1
        self._free: list[int] = []
        # (level of the table, gfn prefix) -> table
        self._parked: dict[tuple[int, int], int] = {}

    def entry(self, table: int) -> int:
        """The non-leaf entry that leads to ``table``."""
        return (self.hpa + table * PAGE_SIZE) | NON_LEAF

    def index(self, entry: int) -> int:
        """The table that a non-leaf ``entry`` leads to."""
        return ((entry & ADDRESS_MASK) - self.hpa) >> PAGE_SHIFT

    def take(self, level: int, prefix: int) -> int:
        """An empty table for ``level`` at gfn ``prefix``; raises `PoolFullError`."""
        table = self._parked.pop((level, prefix), None)
        if table is not None:
            return table
        if self._free:
            table = self._free.pop()
        elif self._fresh < len(self.rows):
            table = self._fresh
            self._fresh += 1
        else:
            raise PoolFullError(
                f"stage-2 pool of {len(self.rows)} tables is full ({len(self._parked)} parked): "
                "call reclaim() after a drained flush, or give a larger pool"
            )
        self.rows[table] = 0
        return table

    def park(self, level: int, prefix: int, table: int) -> None:
        """``table`` is empty and no longer linked."""
        self.live[table] = 0
        self._parked[level, prefix] = table

    def reclaim(self) -> int:
        """Give parked tables back; how many."""
        count = len(self._parked)
        self._free.extend(self._parked.values())
        self._parked.clear()
        return count

    def counts(self) -> tuple[int, int, int]:
        """Tables in use, parked, free."""
        parked = len(self._parked)
        used = self._fresh - len(self._free) - parked
        return used, parked, len(self.rows) - used - parked
