# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that a program fills and then closes for good: a file that turns inaccessible.

What pKVM's authors asked of the fd-based series in 2022 ("mmap, fill, munmap, then fcntl"): one
file, no second copy, the initial image goes to the guest in place. They would have gone without a
check, since the hypervisor stops the host anyway; here it is made, so that a program learns of a
mapping that was forgotten before it dies of it.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Final, Self

from hwemu.pkvm.hypervisor import Hypervisor
from hwemu.pkvm.state import Component, PkvmError


class Phase(enum.Enum):
    """Where a file is in its life."""

    FILLING = "open to the host"
    INACCESSIBLE = "closed to the host"


class Step(enum.Enum):
    """What may be asked of it."""

    OPEN = "open an access of the host"
    CLOSE_FOR_GOOD = "make inaccessible"
    DONATE = "donate to a guest"


#: The phase after it, or the errno of the refusal.
STEPS: Final[Mapping[tuple[Phase, Step], Phase | int]] = MappingProxyType(
    {
        (Phase.FILLING, Step.OPEN): Phase.FILLING,
        (Phase.FILLING, Step.CLOSE_FOR_GOOD): Phase.INACCESSIBLE,
        (Phase.FILLING, Step.DONATE): errno.EPERM,
        (Phase.INACCESSIBLE, Step.OPEN): errno.EPERM,
        (Phase.INACCESSIBLE, Step.CLOSE_FOR_GOOD): errno.EPERM,
        (Phase.INACCESSIBLE, Step.DONATE): Phase.INACCESSIBLE,
    }
)


class FillableFile:
    """``npages`` of the host's memory from ``pfn``, for guests. Pages count from 0."""

    def __init__(self, hyp: Hypervisor, pfn: int, npages: int) -> None:
        hyp.rows("file", pfn, npages)
        self._hyp = hyp
        self.pfn = pfn
        self.npages = npages
        self.phase = Phase.FILLING
        self._open: dict[int, tuple[int, int]] = {}
        self._next = 0

    def _after(self, step: Step) -> Phase:
        after = STEPS[self.phase, step]
        if not isinstance(after, Phase):
            raise PkvmError(after, f"{step.value}: file at pfn {self.pfn:#x} is {self.phase.value}")
        return after

    def _check(self, step: Step, start: int, end: int) -> None:
        if not 0 <= start < end <= self.npages:
            raise PkvmError(
                errno.EINVAL,
                f"{step.value}: pages [{start:#x}, {end:#x}) of a file of {self.npages:#x}",
            )

    def open(self, start: int, end: int) -> int:
        """The host maps pages [start, end), or has them pinned; the access's number.

        EPERM when the file is inaccessible or a page is not the host's alone.
        """
        self._after(Step.OPEN)
        self._check(Step.OPEN, start, end)
        self._hyp.pin(Component.HOST, self.pfn + start, end - start)
        self._next += 1
        self._open[self._next] = (start, end)
        return self._next

    def close(self, access: int) -> None:
        """And no longer."""
        start, end = self._open.pop(access)
        self._hyp.unpin(self.pfn + start, end - start)

    def make_inaccessible(self) -> None:
        """Close the file to the host; EBUSY, naming the first page, while an access is open.

        EPERM the second time: as everywhere in pKVM, what is so already is refused.
        """
        after = self._after(Step.CLOSE_FOR_GOOD)
        held = min((start for start, _ in self._open.values()), default=None)
        if held is not None:
            raise PkvmError(
                errno.EBUSY,
                f"{Step.CLOSE_FOR_GOOD.value}: file at pfn {self.pfn:#x}: the host has "
                f"{len(self._open)} accesses open, the first at page {held:#x}; unmap it",
            )
        self.phase = after

    def donate(self, handle: int, page: int, gfn: int, npages: int = 1) -> None:
        """What a guest's fault leads to; contents go along. EPERM before the file is closed."""
        self._after(Step.DONATE)
        self._check(Step.DONATE, page, page + npages)
        self._hyp.host_donate_guest(handle, self.pfn + page, gfn, npages)

    def key(self) -> Hashable:
        """The file's own state; pages are the hypervisor's."""
        return (self.pfn, self.npages, self.phase, tuple(sorted(self._open.values())))

    def copy(self, hyp: Hypervisor) -> Self:
        """An independent twin on a copy of the hypervisor."""
        twin = object.__new__(type(self))
        twin._hyp, twin.pfn, twin.npages, twin.phase = hyp, self.pfn, self.npages, self.phase
        twin._open, twin._next = self._open.copy(), self._next
        return twin
