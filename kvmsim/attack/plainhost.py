# SPDX-License-Identifier: GPL-2.0-or-later
"""The host of a VM without such hardware: the direct map and the second stage are all its own.

What KVM promises to a KVM_X86_SW_PROTECTED_VM, it promises about programs, not about itself
(Documentation/virt/kvm/api.rst, KVM_CREATE_VM: "for development and testing").
"""

from __future__ import annotations

from typing import Final

from kvmsim.attack.guest import FORGED, SECRET, LabGuest
from kvmsim.attack.outcome import NONE, AttackError, Layer, Outcome, concealed, succeeds
from kvmsim.confidential.platform import Platform
from kvmsim.mmu import Zapped
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SIZE

_WORD: Final = 8


def make(guest: LabGuest, platform: Platform) -> PlainHost:
    """The host of ``guest``."""
    return PlainHost(guest, platform)


class PlainHost:
    """Frames are read and written as the kernel does by its direct map."""

    def __init__(self, guest: LabGuest, platform: Platform) -> None:
        self._guest = guest
        self._memory = platform.memory

    def read(self, gpa: int) -> Outcome:
        """The direct map."""
        return self._seen(self._word(gpa), "the guest's bytes")

    def write(self, gpa: int) -> Outcome:
        """The direct map."""
        self._memory.write(self._guest.hpa(gpa), FORGED.to_bytes(_WORD, "little"))
        return self._seen(self._guest.peek(gpa), "the host's bytes", FORGED)

    def replay(self, gpa: int) -> Outcome:
        """The direct map."""
        hpa = self._guest.hpa(gpa)
        old = self._memory.read(hpa, PAGE_SIZE)
        self._guest.poke(gpa, FORGED)
        self._memory.write(hpa, old)
        return self._seen(self._guest.peek(gpa), "the old content")

    def dma(self, gpa: int) -> Outcome:
        """A device without an IOMMU between, or with the host's own mapping in it."""
        return self.write(gpa)

    def alias(self, gpa: int, spare: int) -> Outcome:
        """A second leaf."""
        self._map(spare | self._guest.half(), self._guest.hpa(gpa))
        seen = self._guest.peek(spare)
        self._zap(spare | self._guest.half(), 1)
        return self._seen(seen, "the page at both gpas")

    def claim(self, gpa: int) -> Outcome:
        """A leaf in another VM's second stage."""
        running = self._guest.running
        rival = RunningVm(running.host, 1, "rival", kind=running.vm.kind)
        try:
            with rival.lock:
                rival.stage2.map(gpa, self._guest.hpa(gpa), 1, writable=True, executable=False)
                hpa = rival.stage2.walk(gpa).hpa
            return self._seen(self._load(hpa), "the guest's bytes")
        finally:
            rival.close()

    def other_side(self, gpa: int) -> Outcome:
        """A leaf on the shared side."""
        guest = self._guest
        if guest.half(private=True) == guest.half(private=False):
            return NONE
        shared = gpa | guest.half(private=False)
        self._map(shared, guest.hpa(gpa))
        seen = guest.peek(gpa, "shared")
        self._zap(shared, 1)
        return self._seen(seen, "the private page as a shared one")

    def split(self, gpa: int) -> Outcome:
        """Another frame's leaf in the middle."""
        guest = self._guest
        guest.poke(gpa + PAGE_SIZE, FORGED)
        frame = guest.hpa(gpa + PAGE_SIZE)
        with guest.running.lock:
            whole = guest.running.stage2.whole_leaves(gpa | guest.half(), 1)
        if whole[1] == 1:
            raise AttackError(f"gpa {gpa:#x} is not mapped by 2 MiB: there is nothing to split")
        self._zap(*whole)
        self._map(gpa | guest.half(), frame)
        seen = guest.peek(gpa)
        self._zap(gpa | guest.half(), 1)
        return self._seen(seen, "another page's content", FORGED)

    # --- inside ---------------------------------------------------------------------------------

    def _word(self, gpa: int) -> int:
        return self._load(self._guest.hpa(gpa))

    def _load(self, hpa: int) -> int:
        return int.from_bytes(self._memory.read(hpa, _WORD), "little")

    def _map(self, gpa: int, hpa: int) -> None:
        running = self._guest.running
        with running.lock:
            running.stage2.map(gpa, hpa, 1, writable=True, executable=False)

    def _zap(self, gpa: int, npages: int) -> None:
        running = self._guest.running
        with running.lock:
            leaves = running.stage2.zap(gpa, npages)
        running.flush_zapped(Zapped(((gpa, npages),), leaves))

    def _seen(self, value: int, what: str, wanted: int = SECRET) -> Outcome:
        return succeeds(what) if value == wanted else concealed(Layer.KVM, f"{value:#x}")
