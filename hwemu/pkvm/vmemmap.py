# SPDX-License-Identifier: GPL-2.0-or-later
"""What the hypervisor knows of every physical page: struct hyp_page and the host's stage 2.

Columns of numpy, one row a page from the first page of memory to the last. The host's stage 2 is
an identity map, so its entry is a function of the row: a valid leaf, or an invalid entry that
names the owner (host_stage2_set_owner_locked(); the gfn beside it is that of later kernels).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from hwemu.pkvm.state import (
    NO_ORDER,
    PTE_OWNER_SHIFT,
    Component,
    PageState,
    leaf,
)

Pages = npt.NDArray[np.int64]
"""Physical page numbers (pfn)."""

_COLUMNS: Final = (
    "memory", "refcount", "order", "host_state", "hyp_state", "share_count",
    "owner", "handle", "gfn",
)  # fmt: skip


class Vmemmap:
    """Rows of the pages ``memory``, half-open ranges of pfns; all are the host's at first."""

    def __init__(self, memory: Sequence[tuple[int, int]]) -> None:
        if not memory or any(start < 0 or start >= end for start, end in memory):
            raise ValueError(f"memory {memory}: ranges of pfns, none of them empty, are needed")
        self.first = min(start for start, _ in memory)
        size = max(end for _, end in memory) - self.first
        self.memory = np.zeros(size, dtype=np.bool_)
        for start, end in memory:
            self.memory[start - self.first : end - self.first] = True
        self.refcount = np.zeros(size, dtype=np.uint16)
        self.order = np.full(size, NO_ORDER, dtype=np.uint8)
        self.host_state = np.full(size, PageState.OWNED, dtype=np.uint8)
        self.hyp_state = np.full(size, PageState.NOPAGE, dtype=np.uint8)
        self.share_count = np.zeros(size, dtype=np.uint32)
        self.owner = np.full(size, Component.HOST, dtype=np.uint8)
        self.handle = np.zeros(size, dtype=np.uint16)
        self.gfn = np.zeros(size, dtype=np.int64)

    @property
    def end(self) -> int:
        """First pfn behind memory."""
        return self.first + len(self.memory)

    def is_memory(self, pfn: int, npages: int) -> bool:
        """Whether all of a range is (range_is_memory())."""
        if npages < 1 or pfn < self.first or pfn + npages > self.end:
            return False
        return bool(self.memory[pfn - self.first : pfn - self.first + npages].all())

    def rows(self, pfns: Pages) -> Pages:
        """Where the columns have ``pfns``."""
        return pfns - self.first

    def host_pte(self, pfn: int) -> int:
        """The host's stage-2 entry: a leaf, or the owner's id in an invalid one."""
        row = pfn - self.first
        state = PageState(int(self.host_state[row]))
        if state is PageState.NOPAGE:
            return int(self.owner[row]) << PTE_OWNER_SHIFT
        return leaf(pfn, state)

    def set_host(
        self,
        rows: Pages,
        state: PageState,
        owner: Component = Component.HOST,
        handle: int = 0,
        gfns: Pages | None = None,
    ) -> None:
        """Give the host ``state``; where that is NOPAGE the entries name the owner."""
        self.host_state[rows] = state
        self.owner[rows] = owner
        self.handle[rows] = handle
        self.gfn[rows] = 0 if gfns is None else gfns

    def set_hyp(self, rows: Pages, state: PageState) -> None:
        """Give the hypervisor ``state``. It has no pools here: what it owns has order 0."""
        self.hyp_state[rows] = state
        self.order[rows] = 0 if state is PageState.OWNED else NO_ORDER

    def key(self) -> Hashable:
        """The whole state as a hashable value."""
        return (self.first, *(getattr(self, name).tobytes() for name in _COLUMNS))

    def copy(self) -> Self:
        """An independent twin."""
        twin = object.__new__(type(self))
        twin.first = self.first
        for name in _COLUMNS:
            setattr(twin, name, getattr(self, name).copy())
        return twin
