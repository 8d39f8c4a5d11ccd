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
from typing import Final, NamedTuple

from hwemu.snp.firmware import Firmware
from hwemu.snp.fwstatus import FirmwareRefused
from hwemu.snp.hostops import HYPERVISOR, NewState, psmash, rmpupdate, rmpupdate_range
from hwemu.snp.rmp import Rmp, Run
from hwemu.snp.rmpentry import PageSize, PageState

_LENT: Final = frozenset((PageState.PRE_GUEST, PageState.PRE_SWAP))
_PAGE: Final = 4096


class Lost(NamedTuple):
    """Pages of a guest that could not be moved, and are its no more."""

    gpa: int
    npages: int
    why: str


@dataclass(frozen=True, slots=True)
class Part:
    """Pages of one size, one behind the other, or one of 2 MiB."""

    pfn: int
    npages: int
    size: int
    gpa: int

    def lent(self, asid: int) -> NewState:
        """As the AMD-SP is lent them."""
        return NewState(True, self.size, True, self.gpa, asid)


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
            if run.asid == asid and run.state not in _LENT:
                for part in self._parts(run):
                    self._update(part.pfn, part.npages, part.lent(asid))

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
                done, why = self._move(gctx, asid, part, new)
                self._update(part.pfn, done, replace(HYPERVISOR, size=part.size))
                if done < part.npages:
                    self.take_back(part.pfn + done, part.npages - done)
                    yield Lost(part.gpa + done * _PAGE, part.npages - done, why)

    def _move(self, gctx: int, asid: int, part: Part, new: int) -> tuple[int, str]:
        """How many are moved, and what stopped it; of the others nothing is the guest's there."""
        ready, why = self._update(new, part.npages, part.lent(asid))
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
            if run.state is PageState.HYPERVISOR:
                continue
            for part in self._parts(run):
                if run.state in _LENT:
                    for page in range(part.pfn, part.pfn + part.npages, self._rmp.pages(part.size)):
                        self._firmware.page_reclaim(page, part.size)
                new = replace(HYPERVISOR, size=part.size)
                done, why = self._update(part.pfn, part.npages, new)
                if done < part.npages:
                    raise RuntimeError(f"RMPUPDATE of frame {part.pfn + done:#x}: {why}")

    # --- inside ---------------------------------------------------------------------------------

    def _runs(self, pfn: int, npages: int) -> Iterator[Run]:
        """What the table says of a range, as far as it reaches; as it was at first."""
        low = max(pfn, self._rmp.start)
        high = min(pfn + npages, self._rmp.start + self._rmp.frames)
        return self._rmp.runs(low, max(high - low, 0))

    def _parts(self, run: Run) -> Iterator[Part]:
        """The pages of a run; those of 2 MiB that reach out of it are broken."""
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
            yield Part(at, count, size, run.gpa + (at - run.pfn) * _PAGE)
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
