# SPDX-License-Identifier: GPL-2.0-or-later
"""The host of a TD: SEAMCALLs past KVM, and memory without the TD's key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hwemu.tdx import TdxError, TdxModule
from hwemu.tdx.pamt import PageType
from kvmsim.attack.framehost import FrameHost
from kvmsim.attack.guest import FORGED, SECRET, LabGuest
from kvmsim.attack.outcome import AttackError, Layer, Outcome, refused, succeeds
from kvmsim.confidential.platform import Platform
from kvmsim.confidential.tdx import TdxGuard
from kvmsim.confidential.tdxhost import make_module
from kvmsim.guard import GuardRefusal
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE

_WORD: Final = 8
_LARGE: Final = 2 << 20
_SECRET: Final = SECRET.to_bytes(_WORD, "little")
_FORGED: Final = FORGED.to_bytes(_WORD, "little")


class TdxHost(FrameHost):
    """SEAMCALLs by name, on the module that the TD runs on."""

    def __init__(self, guest: LabGuest, platform: Platform) -> None:
        assert isinstance(guest.guard, TdxGuard)
        super().__init__(guest, platform)
        self._module = platform.hardware(TdxModule, make_module)
        self._td = guest.guard.td

    def alias(self, gpa: int, spare: int) -> Outcome:
        """TDH.MEM.PAGE.AUG of a frame that the PAMT has for another gpa."""
        large = self._guest.hpa(gpa) & -_LARGE
        return self._leaf(lambda: self._module.mem_page_aug(
            self._td.hpa, spare & -_LARGE, large, 1
        ))  # fmt: skip

    def claim(self, gpa: int) -> Outcome:
        """TDH.MEM.PAGE.AUG to another TD."""
        running = self._guest.running
        hpa, gfn = self._owned(gpa), gpa >> PAGE_SHIFT
        rival = RunningVm(running.host, 1, "rival", kind=running.vm.kind)
        try:
            guard = TdxGuard(self._platform, rival)
            rival.protect(guard)
            with rival.lock:
                guard.start(1)
                guard.finish(())
                guard.admit(gfn, gfn, gfn + 1, hpa & -PAGE_SIZE, private=True, writable=True)
        except GuardRefusal as refusal:
            if not isinstance(refusal.__cause__, TdxError):
                raise
            return refused(Layer.MODULE, refusal.__cause__.code.name)
        finally:
            rival.close()
        return succeeds("the frame in both TDs")

    def other_side(self, gpa: int) -> Outcome:
        """The shared EPT leads to the frame; the access has no key of the TD's."""
        return self.read(gpa)

    def split(self, gpa: int) -> Outcome:
        """TDH.MEM.PAGE.DEMOTE of a page that was not blocked: vCPUs may have it in a TLB."""
        at = self._td.tree.walk(gpa, 0)
        if at.level != 1:
            raise AttackError(f"gpa {gpa:#x} is mapped at level {at.level}: nothing to split")
        table = self._platform.pages.take()
        try:
            return self._leaf(lambda: self._module.mem_page_demote(
                self._td.hpa, gpa & -_LARGE, 1, table
            ))  # fmt: skip
        finally:
            self._platform.pages.give(table)

    # --- inside ---------------------------------------------------------------------------------

    def _owned(self, gpa: int) -> int:
        """Where the page is; AttackError unless the PAMT says that it is the TD's."""
        hpa = self._guest.hpa(gpa)
        entry = self._module.pamt.walk(hpa)
        if entry.pt is not PageType.REG or entry.owner != self._td.owner:
            raise AttackError(f"hpa {hpa:#x} is {entry.pt.name}, not a page of the TD's")
        return hpa

    def _leaf(self, call: Callable[[], object]) -> Outcome:
        try:
            with self._guest.running.lock, self._platform.lock:
                call()
        except TdxError as error:
            return refused(Layer.MODULE, error.code.name)
        return succeeds("the leaf was done")


def make(guest: LabGuest, platform: Platform) -> TdxHost:
    """The host of ``guest``."""
    return TdxHost(guest, platform)
