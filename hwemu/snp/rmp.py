# SPDX-License-Identifier: GPL-2.0-or-later
"""The reverse map table of one host: for every physical frame, whose it is and at which address.

Columns over 4 KiB frames, no object a page.  A page of 2 MiB has its entry at its first frame; the
frames behind it are marked assigned, with ASID 0, as the AMD-SP leaves them: whoever wants to know
of such a frame asks `Rmp.entry`, which finds the entry that counts (``snp_lookup_rmpentry`` in
``arch/x86/virt/svm/sev.c``).

Nothing here decides; the rules are in `hwemu.snp.hostops`, `guestops`, `access` and `firmware`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hwemu.snp.rmpentry import (
    ASID_BITS,
    GROUP,
    PAGE_SHIFT,
    STATES,
    Entry,
    PageSize,
    PageState,
    state_of,
)

_COLUMNS = (
    "_assigned", "_large", "_immutable", "_vmsa", "_validated", "_gfn", "_asid", "_permissions",
)  # fmt: skip


class NotCovered(Exception):
    """A frame without an entry: it is the hypervisor's for good."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring frames that are alike: ``npages`` from frame ``pfn`` on."""

    pfn: int
    npages: int
    state: PageState
    asid: int
    gpa: int
    size: int

    def __str__(self) -> str:
        whose = f" asid {self.asid} gpa {self.gpa:#x}" if self.asid else ""
        kind = "2M" if self.size else "4K"
        return f"[{self.pfn:#x}, {self.pfn + self.npages:#x}) {self.state}{whose} {kind}"


class Columns(NamedTuple):
    """The entries that count for some frames, an element a frame: a copy.

    ``state`` uint8, an index into `STATES`, 255 for a frame without an entry; ``asid`` uint16;
    ``gfn`` int64 that belongs to the frame; ``large`` bool.
    """

    state: npt.NDArray[np.uint8]
    asid: npt.NDArray[np.uint16]
    gfn: npt.NDArray[np.int64]
    large: npt.NDArray[np.bool_]


class Rmp:
    """Entries for ``frames`` frames from frame number ``start`` on, all of them the hypervisor's.

    ``group`` frames are one page of 2 MiB (a power of two; smaller than 512 only in small worlds)
    and ``start`` is a multiple of it.  ASIDs go from 1 to ``max_asid``.
    """

    def __init__(
        self, frames: int, *, start: int = 0, group: int = GROUP, max_asid: int = 1006
    ) -> None:
        if group < 2 or group & (group - 1) or frames < 0 or start < 0 or start % group:
            raise ValueError(
                f"RMP of {frames} frames from {start:#x} on in groups of {group}: a group is a "
                "power of two, and the first frame begins one"
            )
        if not 0 < max_asid < 1 << ASID_BITS:
            raise ValueError(f"RMP with ASIDs up to {max_asid}: the field has {ASID_BITS} bits")
        self.start = start
        self.frames = frames
        self.group = group
        self.max_asid = max_asid
        self._assigned = np.zeros(frames, np.bool_)
        self._large = np.zeros(frames, np.bool_)
        self._immutable = np.zeros(frames, np.bool_)
        self._vmsa = np.zeros(frames, np.bool_)
        self._validated = np.zeros(frames, np.bool_)
        self._gfn = np.zeros(frames, np.uint64)
        self._asid = np.zeros(frames, np.uint16)
        self._permissions = np.zeros((frames, 4), np.uint8)
        self._held: dict[int, int] = {}

    # -- where ------------------------------------------------------------------------------------

    def covered(self, pfn: int, npages: int = 1) -> bool:
        """Whether all of these frames have entries."""
        return self.start <= pfn and pfn + npages <= self.start + self.frames

    def first(self, pfn: int) -> int:
        """Return the first frame of the group of 2 MiB around ``pfn``."""
        return pfn - pfn % self.group

    def page(self, pfn: int) -> int:
        """Return the frame whose entry counts for ``pfn``."""
        at = self._index(pfn)
        behind = pfn % self.group
        return pfn - behind if self._large[at - behind] else pfn

    def pages(self, size: int) -> int:
        """Return the frames of a page of ``size``."""
        return self.group if size == PageSize.SIZE_2M else 1

    def _index(self, pfn: int) -> int:
        if not self.covered(pfn):
            raise NotCovered(
                f"frame {pfn:#x} has no RMP entry: they are for "
                f"[{self.start:#x}, {self.start + self.frames:#x})"
            )
        return pfn - self.start

    # -- reading ----------------------------------------------------------------------------------

    def raw(self, pfn: int) -> Entry:
        """Return what is written for this very frame."""
        at = self._index(pfn)
        read, write, user, supervisor = self._permissions[at].tolist()
        return Entry(
            assigned=bool(self._assigned[at]),
            size=int(self._large[at]),
            immutable=bool(self._immutable[at]),
            gpa=int(self._gfn[at]) << PAGE_SHIFT,
            asid=int(self._asid[at]),
            vmsa=bool(self._vmsa[at]),
            validated=bool(self._validated[at]),
            permissions=(read, write, user, supervisor),
        )

    def entry(self, pfn: int) -> Entry:
        """Return the entry that counts for a frame: its own or that of the large page around it."""
        return self.raw(self.page(pfn))

    def gpa(self, pfn: int) -> int:
        """Return the guest-physical address that belongs to a frame, in bytes."""
        page = self.page(pfn)
        return int(self._gfn[self._index(page)]) + pfn - page << PAGE_SHIFT

    def state(self, pfn: int) -> PageState:
        """Return the state of the page around a frame."""
        return state_of(self.entry(pfn))

    def assigned(self, pfn: int, npages: int = 1) -> bool:
        """Whether any of these frames is assigned; frames without an entry never are."""
        low, high = max(pfn, self.start), min(pfn + npages, self.start + self.frames)
        return bool(self._assigned[low - self.start : max(high, low) - self.start].any())

    def other_size(self, pfn: int, size: int) -> bool:
        """Whether an assigned page of the other size overlaps the page of ``size`` at ``pfn``."""
        first = self._index(self.first(pfn))
        if size == PageSize.SIZE_4K:
            return bool(self._large[first])
        group = slice(first, first + self.group)
        return bool(self._assigned[group].any()) and not bool(self._large[first])

    def frames_of(self, asid: int) -> int:
        """Return how many frames are assigned to an ASID; the AMD-SP's counter (firmware ABI)."""
        mine = self._mine(asid, 0, self.frames)
        return len(mine) + int(np.count_nonzero(self._large[mine])) * (self.group - 1)

    def _mine(self, asid: int, low: int, high: int) -> npt.NDArray[np.int64]:
        """Indices in [low, high) whose own entry is assigned to an ASID, in order.

        Few entries of many are assigned; these are found first, in one byte a frame.
        """
        found = np.flatnonzero(self._assigned[low:high]) + low
        mine: npt.NDArray[np.int64] = found[self._asid[found] == asid]
        return mine

    def _counting(self, low: int, high: int) -> npt.NDArray[np.int64]:
        """Indices of the entries that count for the frames at indices [low, high)."""
        at = np.arange(low, high, dtype=np.int64)
        first = at - at % self.group
        return np.where(self._large[first], first, at)

    def states(self, pfn: int, npages: int) -> npt.NDArray[np.uint8]:
        """Return the states of a range as indices into `STATES`, uint8."""
        self._index(pfn)
        self._index(pfn + npages - 1)
        return self._states(self._counting(pfn - self.start, pfn - self.start + npages))

    def _states(self, at: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Indices into `STATES` of the entries at indices ``at``."""
        found = np.full(len(at), 255, np.uint8)
        guest, gpa = self._asid[at] > 0, self._gfn[at] > 0
        for number, row in enumerate(STATES):
            fits = (self._assigned[at] == row.assigned) & (guest == row.guest) & (found == 255)
            fits &= (self._immutable[at] == row.immutable) & (self._validated[at] == row.validated)
            if row.gpa is not None:
                fits &= gpa == row.gpa
            if row.vmsa is not None:
                fits &= self._vmsa[at] == row.vmsa
            found[fits] = number
        return found

    def runs(self, pfn: int, npages: int) -> Iterator[Run]:
        """Neighbouring frames of one state, owner, size and consecutive addresses, in order."""
        if not npages:
            return
        states = self.states(pfn, npages)
        low = pfn - self.start
        at = self._counting(low, low + npages)
        gfn = self._gfn[at].astype(np.int64) + np.arange(low, low + npages) - at
        asid, size = self._asid[at], self._large[at]
        owned = asid > 0
        cut = (np.diff(states) != 0) | (np.diff(asid.astype(np.int64)) != 0)
        cut |= (np.diff(size.astype(np.int8)) != 0) | (owned[1:] & (np.diff(gfn) != 1))
        edges = [0, *(np.flatnonzero(cut) + 1).tolist(), npages]
        for start, end in pairwise(edges):
            state = STATES[states[start]].state
            gpa = int(gfn[start]) << PAGE_SHIFT if owned[start] else 0
            yield Run(pfn + start, end - start, state, int(asid[start]), gpa, int(size[start]))

    def columns(self, pfns: npt.NDArray[np.int64]) -> Columns:
        """What counts for the frames ``pfns``, which may lie anywhere."""
        found = Columns(
            np.full(len(pfns), 255, np.uint8), np.zeros(len(pfns), np.uint16),
            np.zeros(len(pfns), np.int64), np.zeros(len(pfns), np.bool_),
        )  # fmt: skip
        covered = np.flatnonzero((pfns >= self.start) & (pfns < self.start + self.frames))
        index = pfns[covered] - self.start
        first = index - index % self.group
        at = np.where(self._large[first], first, index)
        found.state[covered] = self._states(at)
        found.asid[covered] = self._asid[at]
        found.gfn[covered] = self._gfn[at].astype(np.int64) + index - at
        found.large[covered] = self._large[at]
        return found

    def pfns_of(self, asid: int, pfn: int, npages: int) -> npt.NDArray[np.int64]:
        """Return the frames of a range that are assigned to an ASID, in order."""
        low, high = max(pfn - self.start, 0), min(pfn + npages - self.start, self.frames)
        if low >= high:
            return np.zeros(0, np.int64)
        low -= low % self.group  # where the entry of a large page lies
        found = self._mine(asid, low, high)
        large = found[self._large[found]]
        behind = (large[:, None] + np.arange(1, self.group)).ravel()
        found = np.concatenate((found, behind)) + self.start
        return np.sort(found[(found >= pfn) & (found < pfn + npages)])

    # -- writing (for those who have asked the rules) ----------------------------------------------

    def store(self, pfn: int, entry: Entry) -> None:
        """Write the entry of a page, and what its size means for the frames behind it."""
        at = self._index(pfn)
        was_large = bool(self._large[at])
        self._put(at, entry)
        if entry.large or was_large:
            self._put(slice(at + 1, at + self.group), Entry(assigned=entry.large))

    def store_run(self, pfn: int, npages: int, entry: Entry) -> None:
        """Write entries of small pages with consecutive guest-physical addresses.

        None of the frames may belong to a large page, but for those of a group that is written
        as a whole.
        """
        at = slice(self._index(pfn), self._index(pfn + npages - 1) + 1)
        self._put(at, entry)
        if entry.asid:
            self._gfn[at] += np.arange(npages, dtype=np.uint64)

    def _put(self, at: int | slice, entry: Entry) -> None:
        self._assigned[at] = entry.assigned
        self._large[at] = entry.large
        self._immutable[at] = entry.immutable
        self._vmsa[at] = entry.vmsa
        self._validated[at] = entry.validated
        self._gfn[at] = entry.gpa >> PAGE_SHIFT
        self._asid[at] = entry.asid
        self._permissions[at] = entry.permissions

    def freeze(self, pfn: int, npages: int, *, immutable: bool) -> None:
        """Write nothing but Immutable of entries of small pages."""
        self._immutable[self._index(pfn) : self._index(pfn + npages - 1) + 1] = immutable

    def move_run(self, pfn: int, target: int, npages: int) -> None:
        """Write the entries of small pages for other frames, mutable both; the old ones are
        validated no more.  The ranges do not overlap.
        """
        old = slice(self._index(pfn), self._index(pfn + npages - 1) + 1)
        new = slice(self._index(target), self._index(target + npages - 1) + 1)
        for name in _COLUMNS:
            column = getattr(self, name)
            column[new] = column[old]
        self._immutable[old] = self._immutable[new] = self._validated[old] = False

    def holds(self, pfn: int, npages: int, asid: int, gpa: int) -> npt.NDArray[np.bool_]:
        """Which of these small pages are ``asid``'s, one behind the other from ``gpa`` on."""
        at = slice(self._index(pfn), self._index(pfn + npages - 1) + 1)
        gfns = np.arange(npages, dtype=np.uint64) + np.uint64(gpa >> PAGE_SHIFT)
        mine = self._assigned[at] & (self._asid[at] == asid) & (self._gfn[at] == gfns)
        return mine if asid else np.zeros(npages, np.bool_)

    def plain(self, pfn: int, npages: int) -> bool:
        """Whether a range is covered, mutable, not held, and touches no large page."""
        if npages < 1 or not self.covered(pfn, npages):
            return False
        low = self._index(self.first(pfn))
        at = slice(pfn - self.start, pfn - self.start + npages)
        if self._immutable[at].any() or self._large[low : at.stop].any():
            return False
        return not any(pfn <= held < pfn + npages for held in self._held)

    # -- in use -----------------------------------------------------------------------------------

    def hold(self, pfn: int) -> None:
        """Mark a frame in use, as VMRUN does with VMCB, VMSA and AVIC pages (APM 15.36.12)."""
        self._index(pfn)
        self._held[pfn] = self._held.get(pfn, 0) + 1

    def release(self, pfn: int) -> None:
        """Take one mark back, as #VMEXIT does; ValueError if there is none."""
        if pfn not in self._held:
            raise ValueError(f"release of frame {pfn:#x}: it is not in use")
        self._held[pfn] -= 1
        if not self._held[pfn]:
            del self._held[pfn]

    def held(self, pfn: int, npages: int = 1) -> bool:
        """Whether any of these frames is in use."""
        return bool(self._held) and any(pfn <= frame < pfn + npages for frame in self._held)

    # -- small worlds -----------------------------------------------------------------------------

    def key(self) -> tuple[object, ...]:
        """Return a hashable value, equal for tables that behave alike."""
        columns = tuple(getattr(self, name).tobytes() for name in _COLUMNS)
        return (*columns, tuple(sorted(self._held.items())))

    def copy(self) -> Rmp:
        """Return an independent copy."""
        other = Rmp.__new__(Rmp)
        other.__dict__.update(self.__dict__)
        for name in _COLUMNS:
            setattr(other, name, getattr(self, name).copy())
        other._held = dict(self._held)
        return other
