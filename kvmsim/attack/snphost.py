# SPDX-License-Identifier: GPL-2.0-or-later
"""The host of an SNP guest: RMPUPDATE and the nested tables are its own, the checks are not."""

from __future__ import annotations

from typing import Final

from hwemu.snp.access import GuestAccess, Kind, guest_access
from hwemu.snp.guestops import Leaf, Vcpu
from hwemu.snp.hostops import NewState, rmpupdate
from hwemu.snp.outcome import NestedPageFault, RmpupdateStatus
from kvmsim.attack.framehost import FrameHost
from kvmsim.attack.guest import FORGED, SECRET, LabGuest
from kvmsim.attack.outcome import AttackError, Layer, Outcome, refused, succeeds
from kvmsim.confidential.platform import Platform
from kvmsim.confidential.snp import SnpGuard
from kvmsim.confidential.snphost import SnpHost, make_host
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE

_WORD: Final = 8
_SECRET: Final = SECRET.to_bytes(_WORD, "little")
_FORGED: Final = FORGED.to_bytes(_WORD, "little")


class SnpKernel(FrameHost):
    """The RMP of the machine, and who looks at it."""

    def __init__(self, guest: LabGuest, platform: Platform) -> None:
        assert isinstance(guest.guard, SnpGuard)
        super().__init__(guest, platform)
        self._rmp = platform.hardware(SnpHost, make_host).rmp
        self._asid = guest.guard.asid

    def alias(self, gpa: int, spare: int) -> Outcome:
        """The nested tables lead from ``spare`` to the frame."""
        leaf = Leaf(spare & -PAGE_SIZE, self._owned(gpa) >> PAGE_SHIFT)
        return self._guest_access(Vcpu(self._asid), leaf)

    def claim(self, gpa: int) -> Outcome:
        """The nested tables of another ASID lead to the frame."""
        leaf = Leaf(gpa & -PAGE_SIZE, self._owned(gpa) >> PAGE_SHIFT)
        return self._guest_access(Vcpu(self._asid + 1), leaf)

    def other_side(self, gpa: int) -> Outcome:
        """The nested tables lead there with the C-bit clear: a read has no key, a write faults."""
        leaf = Leaf(gpa & -PAGE_SIZE, self._owned(gpa) >> PAGE_SHIFT)
        written = self._guest_access(Vcpu(self._asid), leaf, private=False, kind=Kind.WRITE)
        if written != refused(Layer.RMP, "#NPF(RMP)"):
            return written
        return self.read(gpa)

    def split(self, gpa: int) -> Outcome:
        """RMPUPDATE of 4 KiB inside an assigned page of 2 MiB."""
        pfn = self._owned(gpa) >> PAGE_SHIFT
        if not self._rmp.entry(pfn).large:
            raise AttackError(f"gpa {gpa:#x} is a page of 4 KiB in the RMP: nothing to split")
        new = NewState(True, gpa=gpa & -PAGE_SIZE, asid=self._asid)
        with self._platform.lock:
            answer = rmpupdate(self._rmp, pfn, new)
        return refused(Layer.RMP, _name(answer.eax)) if not answer.ok else succeeds("RMPUPDATE")

    # --- inside ---------------------------------------------------------------------------------

    def _owned(self, gpa: int) -> int:
        """Where the page is; AttackError unless the RMP says that it is the guest's."""
        hpa = self._guest.hpa(gpa)
        entry = self._rmp.entry(hpa >> PAGE_SHIFT)
        if entry.asid != self._asid or not entry.validated:
            raise AttackError(f"hpa {hpa:#x} is not a validated page of ASID {self._asid}")
        return hpa

    def _guest_access(
        self, vcpu: Vcpu, leaf: Leaf, *, private: bool = True, kind: Kind = Kind.READ
    ) -> Outcome:
        with self._platform.lock:
            found = guest_access(GuestAccess(self._rmp, vcpu, leaf, kind, private))
        if isinstance(found, NestedPageFault):
            return refused(Layer.RMP, "#NPF(RMP)")
        return succeeds(f"{found}")


def _name(eax: int) -> str:
    return RmpupdateStatus(eax).name


def make(guest: LabGuest, platform: Platform) -> SnpKernel:
    """The host of ``guest``."""
    return SnpKernel(guest, platform)
