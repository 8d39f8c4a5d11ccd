# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VMM does to the memory of a VM whose files convert in place: one page for both types.

There is nothing to discard, and what the host reads and writes of a shared page it does through
references that a conversion to private would meet (:mod:`kvmsim.hostpages`).
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator

from kvmsim.converting import Conversions
from kvmsim.hostmem import SharedRam
from kvmsim.hostpages import HostPages
from kvmsim.inplace import Attributes2
from kvmsim.region import PrivateFile
from kvmsim.running import RunningVm
from kvmsim.uapi import (
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    PAGE_SHIFT,
    PAGE_SIZE,
    KvmError,
)
from kvmsim.vmmemory import VmMemory


class InPlaceMemory(VmMemory):
    """The ``GuestMemory`` of a VM with ``in_place`` files; threads as of :class:`VmMemory`."""

    def __init__(self, vm: RunningVm, shared: SharedRam) -> None:
        super().__init__(vm, shared)
        self._conversions = Conversions(vm)
        self._pages = HostPages(vm, threading.Lock())

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> bool:
        """KVM_SET_MEMORY_ATTRIBUTES2 of what is bound there, contents kept; whether any changed.

        ConversionError: EAGAIN while somebody of the host's holds a page.
        """
        changed = False
        value = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        for file, first, last in self._parts(gpa, size):
            with self._vm.lock:
                files = self._vm.vm.mmu.files
                run = None if files is None else files[file.id].attributes.run(first)
            if run is not None and run.value == value and last <= run.end:
                continue
            request = Attributes2(
                first << PAGE_SHIFT, last - first << PAGE_SHIFT, value,
                KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
            )  # fmt: skip
            self._conversions.convert(file, request)
            changed = True
        return changed

    def discard_shared(self, gpa: int, size: int) -> None:
        """The shared page is the private one."""

    def discard_private(self, gpa: int, size: int) -> None:
        """The private page is the shared one."""

    def read_shared(self, gpa: int, length: int) -> bytes:
        """Read as a device does; KvmError (EFAULT) where the guest has not shared it."""
        data = b""
        for file, offset, size in self._bytes(gpa, length):
            data += self._copy(file, offset, size)
        return data

    def write_shared(self, gpa: int, data: bytes) -> None:
        """Write as a device does; KvmError (EFAULT) where the guest has not shared it."""
        at = 0
        for file, offset, size in self._bytes(gpa, len(data)):
            self._copy(file, offset, size, data[at : at + size])
            at += size

    def _copy(self, file: PrivateFile, offset: int, size: int, data: bytes | None = None) -> bytes:
        """Read bytes of a file, or store ``data``; again if their owner moves them meanwhile."""
        while True:
            with self._pages.pin(file, offset, size, write=data is not None) as pin:
                try:
                    if data is None:
                        return pin.read(offset, size)
                    pin.write(offset, data)
                except KvmError:
                    if pin.held:
                        raise
                    continue
                return data

    def _parts(self, gpa: int, size: int) -> list[tuple[PrivateFile, int, int]]:
        """The pages [first, last) of files that are bound to a range."""
        start, end = gpa >> PAGE_SHIFT, -(-(gpa + size) // PAGE_SIZE)
        with self._vm.lock:
            slots = self._vm.vm.mmu.slots
            return [
                (PrivateFile(slot.file, slot.private_page(last), in_place=True),
                 slot.private_page(first), slot.private_page(last))
                for slot, first, last in slots.find_range(start, end)
                if slot.file is not None
            ]  # fmt: skip

    def _bytes(self, gpa: int, length: int) -> Iterator[tuple[PrivateFile, int, int]]:
        """(file, offset, bytes) of a range; KvmError where nothing is bound."""
        left, skip = length, gpa % PAGE_SIZE
        for file, first, last in self._parts(gpa, length):
            size = min(left, (last - first << PAGE_SHIFT) - skip)
            yield file, (first << PAGE_SHIFT) + skip, size
            left, skip = left - size, 0
        if left:
            raise KvmError(
                errno.EFAULT, "host access", "no memory is there", start=gpa, size=length
            )
