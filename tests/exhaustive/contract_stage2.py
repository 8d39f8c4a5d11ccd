# SPDX-License-Identifier: GPL-2.0-or-later
"""What a user's VM stands on: second stage, extents, the shared side, all of them played."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from contract_values import Page

from kvmsim.kind import SHARED_BIT
from kvmsim.uapi import PAGE_SIZE
from privfs.notifier.user import User

INSTANCES, PAGES = 64, 64  # of the host-physical addresses here
SHARED = SHARED_BIT // PAGE_SIZE


class Ram:
    """The shared side: always there, below all private addresses."""

    def hpa(self, page: int) -> int | None:
        return page * PAGE_SIZE


RAM = Ram()


class Leaf(NamedTuple):
    """A second-stage leaf or a TLB entry: page of the gpa, and the file page behind it."""

    at: int
    page: Page | None  #: None: shared memory


class Extent(NamedTuple):
    """A memfd that is here, with the file pages that it holds."""

    ino: int
    instance: int
    start: int
    end: int


class Process(Protocol):
    """What table and backing belong to."""

    user: User
    leaves: frozenset[Leaf]
    extents: frozenset[Extent]
    ranges: tuple[tuple[int, int], ...]

    def page_at(self, frame: int) -> Page | None:
        """Say what lies at a host-physical frame."""

    def wrong(self, problem: str) -> None:
        """Report a broken invariant."""


class Table:
    """The second stage of a VM; it knows for which generation a leaf was made."""

    def __init__(self, guest: Process) -> None:
        self._guest = guest

    def map(self, gpa: int, hpa: int, npages: int, *, writable: bool, executable: bool) -> None:
        guest, at, frame = self._guest, gpa // PAGE_SIZE, hpa // PAGE_SIZE
        leaves = {leaf for leaf in guest.leaves if not at <= leaf.at < at + npages}
        for i in range(npages):
            gfn = at % SHARED + i
            if any(low <= gfn < high for low, high in guest.ranges):
                guest.wrong(f"gfn {gfn} is installed while it is being invalidated")
            leaves.add(Leaf(at + i, guest.page_at(frame + i)))
        guest.leaves = frozenset(leaves)

    def zap(self, gpa: int, npages: int) -> int:
        guest, at = self._guest, gpa // PAGE_SIZE
        kept = frozenset([leaf for leaf in guest.leaves if not at <= leaf.at < at + npages])
        gone = len(guest.leaves) - len(kept)
        guest.leaves = kept
        return gone


class Backing:
    """What the fault path asks of the session."""

    def __init__(self, guest: Process) -> None:
        self._guest = guest

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return self._guest.user.installable(file, page, start, end, seq)

    def hpa(self, instance: int, page: int) -> int | None:
        for extent in self._guest.extents:
            if extent_id(extent.ino, extent.instance) == instance:
                held = extent.start <= page < extent.end
                return (instance * PAGES + page) * PAGE_SIZE if held else None
        return None


def extent_id(ino: int, instance: int) -> int:
    """Name an extent instance of a file within the VM."""
    return ino * INSTANCES + instance
