# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pages of a slot the guest wrote: KVM_MEM_LOG_DIRTY_PAGES and KVM_GET_DIRTY_LOG.

As kvm_get_dirty_log_protect() of virt/kvm/kvm_main.c has it (v6.18): in a slot that logs, a leaf
may be written only after a write fault marked its page; reading the log takes the marks and the
leaves of marked pages, so that the next write faults again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hwemu.runs import true_runs
from kvmsim.memslot import Memslot
from kvmsim.mmu import SecondStage
from kvmsim.uapi import KVM_MEM_LOG_DIRTY_PAGES, PAGE_SHIFT

_LONG_BITS = 64


@dataclass(slots=True)
class _Logged:
    """One slot: gfns [base, base + npages) and a byte per page."""

    base: int
    npages: int
    marks: np.ndarray[tuple[int], np.dtype[np.uint8]] = field(init=False)

    def __post_init__(self) -> None:
        self.marks = np.zeros(self.npages, dtype=np.uint8)


class DirtyLog:
    """The logs of one VM, by slot id; every method under the VM's lock."""

    def __init__(self) -> None:
        self._slots: dict[int, _Logged] = {}

    def follow(self, id: int, new: Memslot | None) -> bool:
        """Slot ``id`` is ``new`` from now on; True if it begins to log."""
        if new is None or not new.flags & KVM_MEM_LOG_DIRTY_PAGES:
            self._slots.pop(id, None)
            return False
        known = self._slots.get(id)
        if known is not None:
            known.base = new.base_gfn
            return False
        self._slots[id] = _Logged(new.base_gfn, new.npages)
        return True

    def __bool__(self) -> bool:
        """Whether any slot logs."""
        return bool(self._slots)

    def logs(self, gfn: int) -> bool:
        """Whether ``gfn`` lies in a slot that logs."""
        return any(slot.base <= gfn < slot.base + slot.npages for slot in self._slots.values())

    def mark(self, gfn: int) -> None:
        """The guest may write ``gfn`` from now on (mark_page_dirty_in_slot())."""
        for slot in self._slots.values():
            if slot.base <= gfn < slot.base + slot.npages:
                slot.marks[gfn - slot.base] = 1

    def take(self, id: int) -> tuple[bytes, list[tuple[int, int]]] | None:
        """The bitmap, whole u64 words, and the gfns [start, end) that it marks; None: no log.

        Nothing is marked afterwards.
        """
        slot = self._slots.get(id)
        if slot is None:
            return None
        marks, slot.marks = slot.marks, np.zeros_like(slot.marks)
        words = -(-slot.npages // _LONG_BITS)
        bitmap = np.packbits(marks, bitorder="little").tobytes().ljust(words * 8, b"\0")
        return bitmap, [(slot.base + start, slot.base + end) for start, end in true_runs(marks)]


class LoggingStage2:
    """A second stage in which slots that log have read-only leaves until they are written.

    ``store()`` gives the gpa of the write fault at work, without ``side_bit``, None if there is
    none.
    """

    def __init__(
        self,
        inner: SecondStage,
        log: DirtyLog,
        side_bit: int,
        store: Callable[[], int | None],
    ) -> None:
        self._inner = inner
        self._log = log
        self._side_bit = side_bit
        self._store = store

    def map(
        self, gpa: int, hpa: int, npages: int, *, writable: bool, executable: bool, level: int = 1
    ) -> None:
        """Store leaves; in a slot that logs only the page that is written is writable."""
        gfn = (gpa & ~self._side_bit) >> PAGE_SHIFT
        logs = writable and self._log.logs(gfn)
        self._inner.map(
            gpa, hpa, npages, writable=writable and not logs, executable=executable, level=level
        )
        store = self._store()
        if logs and store is not None and gfn <= store >> PAGE_SHIFT < gfn + npages:
            offset = (store >> PAGE_SHIFT) - gfn << PAGE_SHIFT
            self._inner.map(gpa + offset, hpa + offset, 1, writable=True, executable=executable)
            self._log.mark(store >> PAGE_SHIFT)

    def zap(self, gpa: int, npages: int) -> int:
        """Clear the leaves of a range; how many there were."""
        return self._inner.zap(gpa, npages)

    def mark(self, gfn: int) -> None:
        """Somebody other than the guest wrote there (kvm_gpc_mark_dirty_in_slot())."""
        self._log.mark(gfn)

    def whole_leaves(self, gpa: int, npages: int) -> tuple[int, int]:
        """The range widened to the large leaves that reach out of it."""
        return self._inner.whole_leaves(gpa, npages)
