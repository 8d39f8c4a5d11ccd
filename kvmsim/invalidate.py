# SPDX-License-Identifier: GPL-2.0-or-later
"""The invalidation counter against which every fault is checked.

A fault looks at slot, attribute and page without the lock and installs later; in between any of
them may change. So it takes a snapshot of ``seq`` first and installs only if :meth:`retry` says
that nothing relevant happened since. Every invalidator brackets its change with :meth:`begin`,
:meth:`range_add` and :meth:`end`.

Names and rules: kvm_mmu_invalidate_begin(), kvm_mmu_invalidate_range_add(),
kvm_mmu_invalidate_end() in virt/kvm/kvm_main.c and mmu_invalidate_retry_gfn() in
include/linux/kvm_host.h. All calls are made under the VM's lock (KVM: mmu_lock).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Self


class InvalidateError(RuntimeError):
    """The brackets are not balanced: a defect of the caller (KVM: WARN_ON, KVM_BUG_ON)."""


class MmuInvalidate:
    """``mmu_invalidate_{seq, in_progress, range_start, range_end}`` of one VM.

    ``range`` is the union, as ``(start_gfn, end_gfn)``, of everything added while at least one
    invalidation was in progress; None before the first range. It never shrinks until all ended.
    """

    __slots__ = ("in_progress", "range", "seq")

    def __init__(self) -> None:
        self.seq = 0
        self.in_progress = 0
        self.range: tuple[int, int] | None = None

    def begin(self) -> None:
        """Open a bracket. From here until the first range every fault retries."""
        self.in_progress += 1
        if self.in_progress == 1:
            self.range = None

    def range_add(self, start: int, end: int) -> None:
        """Add gfns [start, end) to what is being invalidated.

        Tested against "no range yet" and not against ``in_progress == 1``: one bracket may add the
        ranges of several slots, and the second must not replace the first.
        """
        if not 0 <= start < end:
            raise InvalidateError(f"range_add: [{start:#x}, {end:#x}) is empty or negative")
        if self.in_progress == 0:
            raise InvalidateError(f"range_add [{start:#x}, {end:#x}) outside begin and end")
        if self.range is None:
            self.range = (start, end)
        else:
            self.range = (min(self.range[0], start), max(self.range[1], end))

    def end(self) -> None:
        """Close a bracket. ``seq`` moves before ``in_progress`` falls, so no fault misses both."""
        if self.in_progress == 0:
            raise InvalidateError("end without begin")
        if self.range is None:
            raise InvalidateError("end without a range: begin was called for nothing")
        self.seq += 1
        self.in_progress -= 1

    def retry(self, gfn: int, snapshot: int) -> bool:
        """Whether a fault on ``gfn`` that took ``snapshot`` of seq must start again.

        May be true for no need; is never false when the fault's view may be stale.
        """
        if self.in_progress:
            if self.range is None:
                return True
            start, end = self.range
            if start <= gfn < end:
                return True
        return self.seq != snapshot

    def key(self) -> Hashable:
        """The whole state as a hashable value."""
        return (self.seq, self.in_progress, self.range)

    def copy(self) -> Self:
        """An independent twin."""
        twin = type(self)()
        twin.seq, twin.in_progress, twin.range = self.seq, self.in_progress, self.range
        return twin
