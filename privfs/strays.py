# SPDX-License-Identifier: GPL-2.0-or-later
"""Freed memory that somebody touched: found before it could be given out again.

A touch through a mapping that should be gone brings a page back (``shmem_fault`` fills a hole), and
an allocation of that page would hand it on with whatever was written to it.  So before a file
allocates from an extent that it has, what the extent holds is compared with what the file's bitmap
says of it: one fstat(2).  A difference is located, told, and blamed where there is no doubt
(:meth:`~privfs.notifier.owner.Owner.strayed`); pages that hold what they should not are given to
nobody until all who ever had a descriptor of the extent are proven dead.  Then they are given back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

from privfs.backing import Backing
from privfs.backing.shmem import HUGE_PAGE_SIZE, Shmem, huge_setting
from privfs.extents import PAGE_SIZE
from privfs.memfile import MemFile
from privfs.notifier.effects import Effect, Work
from privfs.notifier.owner import Owner
from privfs.operation import OpId, Step

log = logging.getLogger(__name__)

_INVALIDATE = Step.INVALIDATE.value  # changes no memory yet


class Found(NamedTuple):
    """Where an extent and its bitmap differ: ``extra`` pages held, ``runs`` that hold some."""

    extra: int
    runs: tuple[tuple[int, int], ...]

    def meets(self, start: int, end: int) -> bool:
        """Return True if a page of ``[start, end)`` may hold what it should not."""
        located = sum(last - first for first, last in self.runs)
        return self.extra > located or any(a < end and start < b for a, b in self.runs)

    def __str__(self) -> str:
        if not self.runs:
            return f"{abs(self.extra)} pages {'more' if self.extra > 0 else 'fewer'} than accounted"
        return f"{sum(b - a for a, b in self.runs)} pages in {len(self.runs)} runs"


class Strays:
    """What was found in the files of a mount."""

    def __init__(self, owner: Owner, backing: Backing) -> None:
        self._owner = owner
        self._backing = backing
        self._known: dict[tuple[int, int], Found] = {}  #: (inode, extent instance) → what is there

    def before(self, work: Work) -> tuple[bool, list[Effect]]:
        """Look before an ALLOCATE; return whether it must fail, and what follows from it."""
        ino, perform = work
        if self._owner.files[ino].shared:
            return False, []
        refused = False
        effects: list[Effect] = []
        for index, start, end in self._backing.store.layout.split(perform.start, perform.end):
            extra = self._extra(ino, index, perform.op)
            if extra:
                found, more = self._differs(ino, index, extra)
                effects += more
                refused = refused or (found is not None and found.meets(start, end))
        return refused, effects

    def sweep(self, ino: int) -> Iterator[Effect]:
        """Look at all extents of a file, unless its pages are the host's to touch."""
        if self._owner.files[ino].shared:
            return
        for index in list(self._owner.files[ino].instances):
            extra = self._extra(ino, index)
            if extra:
                yield from self._differs(ino, index, extra)[1]

    def _extra(self, ino: int, index: int, op: OpId = None) -> int:
        """Return the pages that an extent holds beyond those of its bitmap.

        0 if that cannot be told: while another operation than ``op`` changes it.
        """
        file = self._owner.files[ino]
        layout = self._backing.store.layout
        instance = file.instances.get(index)
        if instance is None or layout.whole:  # a new one, or one that is never used again
            return 0
        low, high = layout.extent_range(index)
        if op is None or not file.alone:
            for other, step, start, end in file.operations():
                if other != op and step != _INVALIDATE and start < high and low < end:
                    return 0
        held = self._backing.store.held(self._backing.fd(ino, index)) // PAGE_SIZE
        extra = held - file.pages.range_cardinality(low, high)
        if not extra and self._known:
            self._known.pop((ino, instance), None)
        return extra

    def _differs(self, ino: int, index: int, extra: int) -> tuple[Found | None, list[Effect]]:
        file = self._owner.files[ino]
        instance = file.instances[index]
        low, high = self._backing.store.layout.extent_range(index)
        if extra > 0 and self._owner.holders.of((ino, instance)).nobody:
            for start, end in file.holes(low, high):
                self._backing.punch(ino, start, end)
            log.info("inode %d: what the dead left in extent %d was given back", ino, index)
            self._known.pop((ino, instance), None)
            return None, []
        found = Found(extra, tuple(self._runs(file, ino, index)))
        if self._known.get((ino, instance)) == found:
            return found, []
        self._known[ino, instance] = found
        start, end = (found.runs[0][0], found.runs[-1][1]) if found.runs else (low, high)
        certain = bool(found.runs) and not self._may_collapse()
        return found, self._owner.strayed(ino, index, start, end, str(found), certain=certain)

    def _may_collapse(self) -> bool:
        """Whether the kernel itself may fill holes, with huge pages where a user advised them."""
        store = self._backing.store
        small = isinstance(store, Shmem) and store.page_size < HUGE_PAGE_SIZE
        return small and huge_setting() not in ("never", "deny")

    def _runs(self, file: MemFile, ino: int, index: int) -> Iterator[tuple[int, int]]:
        """Yield the touched pages of an extent that its bitmap does not have."""
        extent = self._backing.extent(ino, index)
        for low, high in self._backing.store.touched(extent.fd):
            first, last = extent.start + low // PAGE_SIZE, extent.start + high // PAGE_SIZE
            yield from file.holes(first, last)

    def buried(self, ino: int, instance: int) -> None:
        """An extent has moved: what was touched in the old one is given back."""
        self._known.pop((ino, instance), None)

    def forget(self, ino: int) -> None:
        """A file is gone."""
        for key in [key for key in self._known if key[0] == ino]:
            del self._known[key]

    def view(self) -> list[dict[str, Any]]:
        """Return what is known now, ranges in bytes."""
        return [
            {
                "inode": ino,
                "pages": found.extra,
                "runs": [[start * PAGE_SIZE, end * PAGE_SIZE] for start, end in found.runs],
                "users": sorted(
                    self._owner.sessions[sid].name
                    for sid in self._owner.holders.of((ino, instance)).alive
                ),
            }
            for (ino, instance), found in self._known.items()
        ]
