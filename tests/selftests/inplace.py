# SPDX-License-Identifier: GPL-2.0-or-later
"""A file that the host has mapped and that converts in place, with a guest over all of it.

The machine is the one that ships (kvmsim.vm, kvmsim.inplace, kvmsim.hostaccess, hwemu.stage2);
this plays the owner of the pages, the host that touches them, and a vCPU that faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from hwemu.stage2 import Stage2, WalkError
from kvmsim.exits import Exit
from kvmsim.fault import Access, Fault, Installed, LeaveGuest, NeedPage, PageGrant
from kvmsim.hostaccess import HostAccess, HostRefused, Opened
from kvmsim.inplace import Attributes2, ConvertFile, Fill
from kvmsim.kind import KINDS
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    PAGE_SIZE,
)
from kvmsim.vm import Vm

ARENA: Final = 1 << 39
FILE: Final = 7
GPA: Final = 4 << 20
_NOISE: Final = 0x99
PRESERVE: Final = KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE


class GuestLeft(Exception):
    """The guest could not go on; ``exit`` is what KVM_RUN would tell."""

    def __init__(self, exit: Exit) -> None:
        super().__init__(str(exit))
        self.exit = exit


class _Backing:
    """One extent instance, in which page n lies at n; nothing newer than a grant."""

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return start, end

    def hpa(self, instance: int, page: int) -> int | None:
        return ARENA + page * PAGE_SIZE


class File:
    """``npages`` pages; ``flags`` as KVM_CREATE_GUEST_MEMFD has them. Offsets are bytes.

    What the kernel answers by SIGBUS is an OSError here: EFAULT for a private index, EINVAL past
    the end.
    """

    def __init__(self, npages: int, flags: int, kind: str = "sw-protected") -> None:
        self.npages = npages
        self.pages: dict[int, bytearray] = {}
        self._file = PrivateFile(FILE, npages, flags)
        self._table = Stage2(bytearray(64 * PAGE_SIZE), 1 << 28)
        self.vm = Vm(self._table, _Backing(), kind=KINDS[kind], max_level=2, in_place=True)
        slot = Region(0, KVM_MEM_GUEST_MEMFD, GPA, npages * PAGE_SIZE)
        self.vm.set_user_memory_region2(slot, file=self._file)

    def _grant(self, need: NeedPage) -> PageGrant:
        """The owner: allocate the page, and grant it alone."""
        self.pages.setdefault(need.page, bytearray(PAGE_SIZE))
        return PageGrant(need.file, need.page, need.page + 1, 0, 1)

    # --- the host -----------------------------------------------------------------------------

    def pin(self, offset: int, size: int) -> HostAccess:
        """Have pages in hand until ``unpin``; OSError where a touch would be SIGBUS."""
        first, last = offset // PAGE_SIZE, -(-(offset + size) // PAGE_SIZE)
        access = HostAccess(FILE, first, last, write=True)
        effect = access.step(self.vm.mmu)
        while isinstance(effect, NeedPage):
            effect = access.page_arrived(self.vm.mmu, self._grant(effect))
        if isinstance(effect, HostRefused):
            raise OSError(effect.errno, effect.reason)
        assert isinstance(effect, Opened)
        return access

    def unpin(self, access: HostAccess) -> None:
        """Let go."""
        access.close(self.vm.mmu)

    def read(self, offset: int, length: int) -> bytes:
        """Load through the mapping."""
        access = self.pin(offset, length)
        data = b"".join(bytes(page[at:end]) for page, at, end in self._spans(offset, length))
        self.unpin(access)
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Store through the mapping."""
        access = self.pin(offset, len(data))
        for page, at, end in self._spans(offset, len(data)):
            page[at:end], data = data[: end - at], data[end - at :]
        self.unpin(access)

    def _spans(self, offset: int, length: int) -> Iterator[tuple[bytearray, int, int]]:
        end = offset + length
        while offset < end:
            page, at = divmod(offset, PAGE_SIZE)
            size = min(PAGE_SIZE - at, end - offset)
            yield self.pages[page], at, at + size
            offset += size

    # --- the guest ----------------------------------------------------------------------------

    def guest_read(self, offset: int, length: int) -> bytes:
        """Load in the guest; GuestLeft."""
        return b"".join(
            bytes(page[at:end]) for page, at, end in self._guest(offset, length, write=False)
        )

    def guest_write(self, offset: int, data: bytes) -> None:
        """Store in the guest; GuestLeft."""
        for page, at, end in self._guest(offset, len(data), write=True):
            page[at:end], data = data[: end - at], data[end - at :]

    def _guest(
        self, offset: int, length: int, *, write: bool
    ) -> Iterator[tuple[bytearray, int, int]]:
        end = offset + length
        while offset < end:
            gpa, at = GPA + offset, offset % PAGE_SIZE
            size = min(PAGE_SIZE - at, end - offset)
            page = (self._walk(gpa, write=write) - ARENA) // PAGE_SIZE
            yield self.pages[page], at, at + size
            offset += size

    def _walk(self, gpa: int, *, write: bool) -> int:
        while True:
            try:
                return self._table.walk(gpa).hpa
            except WalkError:
                fault = Fault(0, gpa, Access(write=write))
                effect = self.vm.begin_fault(fault)
                if isinstance(effect, NeedPage):
                    effect = self.vm.page_arrived(fault, self._grant(effect))
                if isinstance(effect, LeaveGuest):
                    raise GuestLeft(effect.exit) from None
                assert isinstance(effect, Installed), effect

    # --- the file -----------------------------------------------------------------------------

    def allocate(self, offset: int, size: int) -> None:
        """fallocate(KEEP_SIZE)."""
        for page in range(offset // PAGE_SIZE, (offset + size) // PAGE_SIZE):
            self.pages.setdefault(page, bytearray(PAGE_SIZE))

    def punch(self, offset: int, size: int) -> None:
        """fallocate(PUNCH_HOLE): invalidate, then free."""
        first, last = offset // PAGE_SIZE, (offset + size) // PAGE_SIZE
        self.vm.invalidate_file(FILE, first, last)
        for page in range(first, last):
            self.pages.pop(page, None)
        self.vm.freed(FILE, first, last)

    def is_private(self, page: int) -> bool:
        """The type of an index."""
        known = self.vm.know(self._file)
        assert known is not None
        return known.is_private(page)

    def convert(
        self, offset: int, size: int, *, private: bool, flags: int = PRESERVE,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """KVM_SET_MEMORY_ATTRIBUTES2; ConversionError changes nothing."""
        value = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        asked = Attributes2(offset, size, value, flags)
        begun = self.vm.begin_set_memory_attributes2(self._file, asked)
        assert isinstance(begun.then, ConvertFile)
        if meanwhile is not None:
            meanwhile()
        if begun.then.fill is not Fill.KEEP:
            filled = bytes([_NOISE * (begun.then.fill is Fill.SCRAMBLE)]) * PAGE_SIZE
            for page in range(begun.then.start, begun.then.end):
                if page in self.pages:
                    self.pages[page][:] = filled
        self.vm.end(begun)
