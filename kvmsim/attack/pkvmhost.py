# SPDX-License-Identifier: GPL-2.0-or-later
"""The host under pKVM: hypercalls to EL2, and a stage 2 of its own that lacks what it gave away."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from hwemu.pkvm.state import PkvmError
from kvmsim.attack.framehost import FrameHost
from kvmsim.attack.guest import FORGED, LabGuest
from kvmsim.attack.outcome import NONE, AttackError, Layer, Outcome, refused, succeeds
from kvmsim.confidential.pkvm import PkvmGuard
from kvmsim.confidential.pkvmhost import PkvmHost
from kvmsim.confidential.platform import Platform
from kvmsim.uapi import PAGE_SHIFT

_FORGED: Final = FORGED.to_bytes(8, "little")


def make(guest: LabGuest, platform: Platform) -> PkvmKernel:
    """The host of ``guest``."""
    return PkvmKernel(guest, platform)


class PkvmKernel(FrameHost):
    """What EL1 may ask, and what it meets at a page that it donated."""

    def __init__(self, guest: LabGuest, platform: Platform) -> None:
        assert isinstance(guest.guard, PkvmGuard)
        super().__init__(guest, platform)
        self._hyp = platform.hardware(PkvmHost, PkvmHost).hypervisor
        self._handle: int = guest.guard.describe()["handle"]

    def alias(self, gpa: int, spare: int) -> Outcome:
        """Donate the frame once more, for another gfn."""
        pfn = self._pfn(gpa)
        gfn = spare >> PAGE_SHIFT
        return self._asked(lambda: self._hyp.host_donate_guest(self._handle, pfn, gfn))

    def claim(self, gpa: int) -> Outcome:
        """Donate it to another protected VM."""
        pfn, gfn = self._pfn(gpa), gpa >> PAGE_SHIFT
        with self._platform.lock:
            rival = self._hyp.create_vm(gfn + 1)
        try:
            return self._asked(lambda: self._hyp.host_donate_guest(rival, pfn, gfn))
        finally:
            with self._platform.lock:
                self._hyp.teardown(rival)

    def other_side(self, gpa: int) -> Outcome:
        """There are no sides: the hypervisor knows what is shared."""
        return NONE

    def split(self, gpa: int) -> Outcome:
        """Reclaim one page of a VM that lives."""
        gfn = gpa >> PAGE_SHIFT
        return self._asked(lambda: self._hyp.host_reclaim_guest(self._handle, gfn))

    # --- inside ---------------------------------------------------------------------------------

    def _owned(self, gpa: int) -> int:
        return self._pfn(gpa) << PAGE_SHIFT

    def _pfn(self, gpa: int) -> int:
        """The frame; AttackError unless it is where the hypervisor has it."""
        pfn = self._guest.hpa(gpa) >> PAGE_SHIFT
        known = self._hyp.vms.get("attack", self._handle).pfns(gpa >> PAGE_SHIFT, 1)[0]
        if known != pfn:
            raise AttackError(f"gpa {gpa:#x} leads to {pfn:#x}, the hypervisor has {known:#x}")
        return pfn

    def _asked(self, call: Callable[[], None]) -> Outcome:
        try:
            with self._guest.running.lock, self._platform.lock:
                call()
        except PkvmError as error:
            return refused(Layer.EL2, errno.errorcode[error.errno or errno.EIO])
        return succeeds("the hypercall was done")
