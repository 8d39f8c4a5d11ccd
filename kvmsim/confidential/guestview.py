# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM itself reads and writes of a confidential guest: shared pages, by gpa.

kvm_vcpu_map() and kvm_write_guest() of virt/kvm/kvm_main.c: through the slot's userspace side, and
never where the gfn is private. Bytes; a page at a time.
"""

from __future__ import annotations

from hwemu.stage2 import Stage2Error
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE


class NotShared(Exception):
    """No shared memory is at that gpa."""


class GuestView:
    """The shared side of a VM's memory (its lock held)."""

    def __init__(self, running: RunningVm) -> None:
        self._running = running

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes at ``gpa``, within one page; NotShared if they are not there."""
        return self._running.host.read(self._hpa(gpa, size), size)

    def write(self, gpa: int, data: bytes) -> None:
        """Store bytes at ``gpa``, within one page; NotShared if they are not there."""
        self._running.host.write(self._hpa(gpa, len(data)), data)

    def word(self, gpa: int) -> int | None:
        """The 8 bytes at ``gpa`` as the guest's page-table walker finds them, on either side."""
        try:
            hpa = self._running.stage2.walk(gpa).hpa
        except Stage2Error:
            return None
        return int.from_bytes(self._running.host.read(hpa, 8), "little")

    def _hpa(self, gpa: int, size: int) -> int:
        mmu, gfn = self._running.vm.mmu, gpa >> PAGE_SHIFT
        slot = mmu.slots.find(gfn)
        inside = gpa % PAGE_SIZE + size <= PAGE_SIZE
        if not inside or slot is None or slot.shared is None or mmu.is_private(gfn, slot):
            raise NotShared(f"gpa {gpa:#x}+{size:#x}: not in one shared page")
        hpa = slot.shared.hpa(slot.shared_page(gfn))
        if hpa is None:
            raise NotShared(f"gpa {gpa:#x}: nothing is behind its userspace address")
        return hpa + gpa % PAGE_SIZE
