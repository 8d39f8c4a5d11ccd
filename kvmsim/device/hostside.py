# SPDX-License-Identifier: GPL-2.0-or-later
"""The shared side of a VM's slots: the caller's memory, as far as it could be mapped here.

KVM walks the caller's page tables at each fault and hears of changes by an mmu_notifier. Here the
ranges behind ``userspace_addr`` are mapped into the arena piece by piece, when a slot is made and
when a guest meets a gap, and dropped when the last slot over a piece goes or when whoever watches
the caller says that its mappings changed.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvmsim.device.caller import Caller, HostPiece
from kvmsim.hostmem import HostMemory
from kvmsim.sortedkeys import SortedKeys
from kvmsim.uapi import PAGE_SHIFT, KvmError

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Placed:
    """Host pages [start, end) at host-physical address ``hpa``, used by slots ``users``."""

    start: int
    end: int
    hpa: int
    writable: bool
    users: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Dropped:
    """What no slot uses any more; to be retired when no vCPU can reach it."""

    ranges: tuple[tuple[int, int], ...] = ()
    """(hpa, length) in bytes."""


class HostSide:
    """Pages are numbered by address: page n is bytes [n << 12, (n + 1) << 12) of the caller.

    Changes belong under the VM's slots_lock; those to the list under its mmu_lock as well, which
    "lock held" means.
    """

    def __init__(self, host: HostMemory) -> None:
        self._host = host
        self._placed: dict[int, _Placed] = {}  # by first page
        self._starts: SortedKeys[int] = SortedKeys()

    def hpa(self, page: int) -> int | None:
        """Host-physical address of a page; None: nothing is there, or not yet (lock held)."""
        start = self._starts.floor(page)
        if start is None or page >= self._placed[start].end:
            return None
        piece = self._placed[start]
        return piece.hpa + (page - piece.start << PAGE_SHIFT)

    def place(
        self, caller: Caller, start: int, end: int, *, writable: bool
    ) -> tuple[list[_Placed], str]:
        """Map what can be had of the gaps in pages [start, end); and what could not, for a log.

        Nothing can reach the pieces before :meth:`add`. Not under the VM's mmu_lock.
        """
        made: list[_Placed] = []
        missing = 0
        try:
            for first, last in list(self._gaps(start, end)):
                at = first
                for piece in caller.host_range(first << PAGE_SHIFT, last - first << PAGE_SHIFT):
                    if writable and not piece.writable:
                        continue  # a store to it would be a signal here
                    page = piece.start >> PAGE_SHIFT
                    missing += page - at
                    made.append(self._map(piece))
                    at = made[-1].end
                missing += last - at
        except BaseException:
            self.discard(made)
            raise
        return made, f"{missing} of {end - start} pages cannot be shared" if missing else ""

    def _map(self, piece: HostPiece) -> _Placed:
        hpa = self._host.place(piece.fd, piece.offset, piece.length, writable=piece.writable)
        page = piece.start >> PAGE_SHIFT
        return _Placed(page, page + (piece.length >> PAGE_SHIFT), hpa, piece.writable)

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the runs of pages of [start, end) that are backed by memory, in order."""
        for piece in list(self._over(start, end)):
            first, last = max(start, piece.start), min(end, piece.end)
            hpa = piece.hpa + (first - piece.start << PAGE_SHIFT)
            for lower, upper in self._host.resident(hpa, last - first << PAGE_SHIFT):
                yield first + lower, first + upper

    def discard(self, pieces: list[_Placed]) -> None:
        """Take back what was placed and never added."""
        for piece in pieces:
            self._host.retire(piece.hpa, piece.end - piece.start << PAGE_SHIFT)

    def check(self, operation: str, start: int, end: int, *, writable: bool) -> None:
        """KvmError if a slot over [start, end) would store to what is mapped read-only."""
        if writable and any(not piece.writable for piece in self._over(start, end)):
            raise KvmError(
                errno.EFAULT, operation, "another slot has this memory read-only",
                start=start << PAGE_SHIFT, size=end - start << PAGE_SHIFT,
            )  # fmt: skip

    def add(self, slot: int, start: int, end: int, made: list[_Placed]) -> None:
        """Let slot ``slot`` use pages [start, end): new pieces and old (lock held)."""
        for piece in made:
            self._placed[piece.start] = piece
            self._starts.add(piece.start)
        for piece in self._over(start, end):
            piece.users.add(slot)

    def remove(self, slot: int, start: int, end: int) -> Dropped:
        """Slot ``slot`` is gone: forget what only it used (lock held)."""

        def unused(piece: _Placed) -> bool:
            piece.users.discard(slot)
            return not piece.users

        return self._drop(start, end, unused)

    def forget(self, start: int, end: int) -> Dropped:
        """The caller's mappings of [start, end) changed: forget every piece there (lock held).

        What was zapped before and is touched again is asked for anew.
        """
        return self._drop(start, end, lambda piece: True)

    def covered(self, start: int, end: int) -> tuple[int, int]:
        """[start, end) widened to whole pieces: what a :meth:`forget` of it takes (lock held)."""
        over = list(self._over(start, end))
        if over:
            start, end = min(start, over[0].start), max(end, over[-1].end)
        return start, end

    def retire(self, dropped: Dropped) -> None:
        """Unmap; no vCPU can reach it any more."""
        for hpa, length in dropped.ranges:
            self._host.retire(hpa, length)

    def close(self) -> None:
        """Unmap everything; the VM's engines are closed."""
        pieces, self._placed, self._starts = self._placed, {}, SortedKeys()
        self.discard(list(pieces.values()))

    def _over(self, start: int, end: int) -> Iterator[_Placed]:
        before = self._starts.floor(start)
        for first in self._starts.since(start if before is None else before):
            if first >= end:
                return
            piece = self._placed[first]
            if piece.end > start:
                yield piece

    def _gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for piece in self._over(start, end):
            if start < piece.start:
                yield start, piece.start
            start = max(start, piece.end)
        if start < end:
            yield start, end

    def _drop(self, start: int, end: int, unused: Callable[[_Placed], bool]) -> Dropped:
        gone = [piece for piece in self._over(start, end) if unused(piece)]
        for piece in gone:
            del self._placed[piece.start]
            self._starts.remove(piece.start)
        return Dropped(tuple((piece.hpa, piece.end - piece.start << PAGE_SHIFT) for piece in gone))
