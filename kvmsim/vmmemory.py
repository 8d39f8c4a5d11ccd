# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VMM does to the memory of its VM, on the real thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvmsim.confidential.base import Confidential
from kvmsim.hostmem import SharedRam
from kvmsim.populate import Populate
from kvmsim.private import PrivateMemory
from kvmsim.running import RunningVm
from kvmsim.uapi import ABIS, PAGE_SHIFT
from kvmsim.vmm.launch import LaunchPage


class VmMemory:
    """What the VMM does to its VM's memory (the ``GuestMemory`` of :mod:`kvmsim.vmm.convert`).

    Every method belongs to the runner thread, or to a VM that does not run: no vCPU is in guest
    code then, and a flush before the next entry is all that a zap needs.
    """

    def __init__(self, vm: RunningVm, shared: SharedRam) -> None:
        self._populate = Populate(vm)
        self._vm = vm
        self._shared = shared

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> bool:
        """KVM_SET_MEMORY_ATTRIBUTES; True if anything changed."""
        vm = self._vm.vm
        value = ABIS[vm.abi].attribute_private if private else 0
        with self._vm.lock:
            zapped = vm.set_memory_attributes(gpa, size, value)
        if zapped.ranges:
            self._vm.flush_zapped(zapped)
        return bool(zapped.ranges)

    def discard_shared(self, gpa: int, size: int) -> None:
        """Zap and free the shared side of a range."""
        start, end = gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT
        with self._vm.lock:
            zapped = self._vm.vm.invalidate_shared(self._shared, start, end)
        self._vm.flush_zapped(zapped)
        self._shared.discard(gpa, size)

    def discard_private(self, gpa: int, size: int) -> None:
        """Punch the private side of a range through its owners."""
        start, end = gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT
        with self._vm.lock:
            parts = [
                (slot.file, slot.private_page(first), slot.private_page(last))
                for slot, first, last in self._vm.vm.mmu.slots.find_range(start, end)
                if slot.file is not None
            ]
        for file, first, last in parts:
            self._vm.private.punch(file, first, last)

    def read_shared(self, gpa: int, length: int) -> bytes:
        """Read the shared side as a device does."""
        return self._shared.read(gpa, length)

    def write_shared(self, gpa: int, data: bytes) -> None:
        """Write the shared side as a device does."""
        self._shared.write(gpa, data)

    def populate(self, gpa: int, source: bytes, *, measure: bool = False) -> None:
        """Fill private pages from source pages, before the VM runs (:mod:`kvmsim.populate`)."""
        self._populate(gpa, source, measure=measure)

    def load(self, page: LaunchPage, guard: Confidential) -> None:
        """Add a page to what a confidential guest starts with (:mod:`kvmsim.populate`)."""
        self._populate.load(page, guard)


@dataclass(frozen=True, slots=True)
class FilePart:
    """File pages ``[start, end)`` of a backend (the ``PrivateSide`` of :mod:`kvmsim.vmm.prealloc`).

    No lock may be held, and no method be called by a lane or a runner.
    """

    private: PrivateMemory
    file: int
    start: int
    end: int

    def holes(self) -> Sequence[tuple[int, int]]:
        """The runs without memory now."""
        holes = []
        at = self.start
        for first, last in self.private.runs(self.file, self.start, self.end):
            if at < first:
                holes.append((at, first))
            at = last
        if at < self.end:
            holes.append((at, self.end))
        return holes

    def allocate(self, start: int, end: int) -> None:
        """Allocate what lacks."""
        self.private.allocate(self.file, start, end)

    def punch(self, start: int, end: int) -> None:
        """Give pages back."""
        self.private.punch(self.file, start, end)

    def alone(self) -> bool:
        """Whether nobody else uses the file."""
        return self.private.alone(self.file)
