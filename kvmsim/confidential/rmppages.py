# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM does to entries of the RMP that lie behind memory of a file: lent, moved, taken back.

A page that is to *move* is lent to the AMD-SP (RMPUPDATE, immutable: Guest-Valid becomes Pre-Swap,
Guest-Invalid Pre-Guest), so that no access passes while its owner copies it. Then the new frames
are lent as well, SNP_PAGE_MOVE gives them gpa, Validated and the permissions, and the old ones are
the hypervisor's. Pages of 2 MiB move as such where the new frames allow it, else they are broken
first: SNP_PAGE_RECLAIM and PSMASH, which takes no immutable page.

KVM (arch/x86/kvm/svm/sev.c, v6.18) moves nothing; its sev_gmem_invalidate() is `take_back`. Units:
frames by number, ranges by their first and their length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from hwemu.snp.firmware import Firmware
from hwemu.snp.fwstatus import FirmwareRefused
from hwemu.snp.hostops import HYPERVISOR, NewState, psmash, rmpupdate, rmpupdate_range
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import PAGE_SHIFT, STATES, PageSize, PageState

_LENT: Final = (PageState.PRE_GUEST, PageState.PRE_SWAP)
_NUMBERS: Final = [number for number, row in enumerate(STATES) if row.state in _LENT]
_HYPERVISOR: Final = next(n for n, row in enumerate(STATES) if row.state is PageState.HYPERVISOR)


class Lost(NamedTuple):
    """Pages of a guest that could not be moved, and are its no more."""

    gpa: int
    npages: int
    why: str


@dataclass(frozen=True, slots=True)
class Part:
    """Pages of one owner and size with consecutive gpas; ``lends`` if any is the AMD-SP's."""

    pfn: int
    npages: int
    size: int
    gpa: int
    asid: int
    lends: bool

    @property
    def lent(self) -> NewState:
        """As the AMD-SP is lent them."""
        return NewState(True, self.size, True, self.gpa, self.asid)


class RmpPages:
    """The entries of one host (its lock held)."""

    def __init__(self, rmp: Rmp, firmware: Firmware) -> None:
        self._rmp = rmp
        self._firmware = firmware

    def any_of(self, asid: int, pfn: int, npages: int) -> bool:
        """Whether a frame of the range is the guest's."""
        return len(self._rmp.pfns_of(asid, pfn, npages)) > 0

    def lend(self, asid: int, pfn: int, npages: int) -> None:
        """Lend what is the guest's there. What RMPUPDATE refuses, SNP_PAGE_MOVE will, too."""
        for run in self._runs(pfn, npages):
            if run.asid == asid and not run.lends:
                for part in self._parts(run):
                    self._update(part.pfn, part.npages, part.lent)

    def move(self, gctx: int, asid: int, pfn: int, target: int, npages: int) -> Iterator[Lost]:
        """Give the frames from ``target`` on what the guest has from ``pfn`` on.

        The bytes follow by the memory of the AMD-SP. Yields what is lost: it is the hypervisor's,
        at both places.
        """
        for run in self._runs(pfn, npages):
            if run.asid != asid:
                continue
            for part in self._parts(run):
                new = part.pfn - pfn + target
                if part.size and (new % part.npages or self._rmp.assigned(new, part.npages)):
                    self._smash(part.pfn)
                    part = replace(part, size=PageSize.SIZE_4K)
                done, why = self._move(gctx, part, new)
                self._update(part.pfn, done, replace(HYPERVISOR, size=part.size))
                if done < part.npages:
                    self.take_back(part.pfn + done, part.npages - done)
                    yield Lost(part.gpa + (done << PAGE_SHIFT), part.npages - done, why)

    def _move(self, gctx: int, part: Part, new: int) -> tuple[int, str]:
        """How many are moved, and what stopped it; of the others nothing is the guest's there."""
        ready, why = self._update(new, part.npages, part.lent)
        if not part.size:
            done, refused = self._firmware.page_move_range(gctx, part.pfn, new, ready)
        else:
            done, refused = ready, None
            try:
                if ready:
                    self._firmware.page_move(gctx, part.pfn, new, part.size)
            except FirmwareRefused as error:
                done, refused = 0, error
        self.take_back(new + done, ready - done)
        return done, str(refused or why)

    def take_back(self, pfn: int, npages: int) -> None:
        """Make all of it the hypervisor's, whosever it is, large pages broken where they must."""
        for run in self._runs(pfn, npages):
            for part in self._parts(run):
                if run.lends and part.size:
                    self._firmware.page_reclaim(part.pfn, part.size)
                elif run.lends:
                    self._firmware.page_reclaim_range(part.pfn, part.npages)
                new = replace(HYPERVISOR, size=part.size)
                done, why = self._update(part.pfn, part.npages, new)
                if done < part.npages:
                    raise RuntimeError(f"RMPUPDATE of frame {part.pfn + done:#x}: {why}")

    # --- inside ---------------------------------------------------------------------------------

    def _runs(self, pfn: int, npages: int) -> Iterator[Part]:
        """What is not the hypervisor's of a range, as it was at first, validated or not."""
        found = self._rmp.columns(np.arange(pfn, pfn + npages, dtype=np.int64))
        lent = np.isin(found.state, _NUMBERS)
        host = (found.state == _HYPERVISOR) | (found.state == 255)
        cut = (np.diff(found.asid.astype(np.int64)) != 0) | (np.diff(found.large) != 0)
        cut |= (np.diff(host) != 0) | (np.diff(lent) != 0) | (~host[1:] & (np.diff(found.gfn) != 1))
        for start, end in pairwise([0, *(np.flatnonzero(cut) + 1).tolist(), npages]):
            if end > start and not host[start]:
                gpa = int(found.gfn[start]) << PAGE_SHIFT
                yield Part(pfn + start, end - start, int(found.large[start]), gpa,
                           int(found.asid[start]), bool(lent[start]))  # fmt: skip

    def _parts(self, run: Part) -> Iterator[Part]:
        """The pages of a run; those of 2 MiB singly, and broken where they reach out of it."""
        at, end = run.pfn, run.pfn + run.npages
        while at < end:
            page, group = self._rmp.page(at), self._rmp.group
            size, count = PageSize.SIZE_4K, end - at
            if run.size:
                count = min(end, page + group) - at
                if count == group:
                    size = PageSize.SIZE_2M
                else:
                    self._smash(page)
            gpa = run.gpa + (at - run.pfn << PAGE_SHIFT)
            yield replace(run, pfn=at, npages=count, size=size, gpa=gpa)
            at += count

    def _smash(self, page: int) -> None:
        """PSMASH; a page that is lent is so afterwards, too."""
        entry = self._rmp.raw(page)
        if entry.immutable:
            self._firmware.page_reclaim(page, PageSize.SIZE_2M)
        answer = psmash(self._rmp, page)
        if not answer.ok:
            raise RuntimeError(f"PSMASH of frame {page:#x}: {answer}")
        if entry.immutable:
            small = NewState(True, PageSize.SIZE_4K, True, entry.gpa, entry.asid)
            self._update(page, self._rmp.group, small)

    def _update(self, pfn: int, npages: int, new: NewState) -> tuple[int, str]:
        """RMPUPDATE of one page of 2 MiB, or of small ones: how many frames, what stopped it."""
        if new.size:
            answer = rmpupdate(self._rmp, pfn, new)
            return (npages if answer.ok else 0), answer.why
        done, answer = rmpupdate_range(self._rmp, pfn, npages, new)
        return done, answer.why
