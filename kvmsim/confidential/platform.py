# SPDX-License-Identifier: GPL-2.0-or-later
"""The confidential hardware of one host: one TDX module, one RMP, one hypervisor at EL2.

An emulator process is one host, so what its VMs share is here; the arena is its physical memory.
Each is made when the first guest of its kind needs it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from hwemu.encryption import Buffer
from kvmsim.hostmem import HostMemory
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE

_T = TypeVar("_T")
_POOL_SIZE: Final = 64 << 20
_COVERED: Final = 64 << 30


class HpaMemory:
    """Contents of the arena by host-physical address in bytes, past any fence around them."""

    def __init__(self, host: HostMemory) -> None:
        self._host = host
        self._copied = (0, 0, 0)  #: from, to, bytes

    def read(self, hpa: int, size: int) -> bytes:
        """Bytes at ``hpa``."""
        self._open(hpa, size)
        return self._host.read(hpa, size)

    def write(self, hpa: int, data: Buffer) -> None:
        """Store bytes at ``hpa``."""
        self._open(hpa, len(data))
        self._host.write(hpa, bytes(data))

    def zero(self, hpa: int, npages: int) -> None:
        """Clear ``npages`` pages."""
        self.write(hpa, bytes(npages * PAGE_SIZE))

    def copy(self, source: int, target: int) -> None:
        """Copy one page, unless it was `copied`."""
        old, new, size = self._copied
        if not (old <= source < old + size and target - source == new - old):
            self.write(target, self.read(source, PAGE_SIZE))

    @contextlib.contextmanager
    def copied(self, old: int, new: int, npages: int) -> Iterator[None]:
        """What lay at ``old`` lies at ``new`` already: its owner has moved it, and nobody can read
        the old place any more. Exactly these copies are not made meanwhile.
        """
        self._copied = old, new, npages * PAGE_SIZE
        try:
            yield
        finally:
            self._copied = 0, 0, 0

    def _open(self, hpa: int, size: int) -> None:
        """Granted pages may be touched before a leaf maps them: they are loaded and zeroed."""
        first = hpa & -PAGE_SIZE
        self._host.admit(first, -(-(hpa + size - first) // PAGE_SIZE) * PAGE_SIZE)


class FrameMemory:
    """The same by frame: pages of 4096 bytes, named by their pfn."""

    def __init__(self, memory: HpaMemory) -> None:
        self._memory = memory

    def read(self, pfn: int) -> bytes:
        """The 4096 bytes of a frame."""
        return self._memory.read(pfn << PAGE_SHIFT, PAGE_SIZE)

    def write(self, pfn: int, contents: bytes) -> None:
        """Replace the bytes of a frame."""
        self._memory.write(pfn << PAGE_SHIFT, contents)

    def zero(self, pfn: int) -> None:
        """Clear a frame."""
        self._memory.zero(pfn << PAGE_SHIFT, 1)

    def copy(self, source: int, target: int) -> None:
        """Copy one frame over another."""
        self._memory.copy(source << PAGE_SHIFT, target << PAGE_SHIFT)


class HostPages:
    """Pages of the host's own that it gives to firmware and modules: TDRs, S-EPT pages, VMSAs."""

    def __init__(self, host: HostMemory, size: int = _POOL_SIZE) -> None:
        fd = os.memfd_create("kvmsim host pages", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            self.base: Final = host.place(fd, 0, size)
        finally:
            os.close(fd)
        self.size: Final = size
        self._free = list(range(self.base + size - PAGE_SIZE, self.base - 1, -PAGE_SIZE))
        assert self.base % mmap.PAGESIZE == 0

    def take(self) -> int:
        """The hpa of a page that nobody uses; MemoryError if there is none."""
        if not self._free:
            raise MemoryError(f"none of {self.size >> PAGE_SHIFT} host pages for firmware is free")
        return self._free.pop()

    def give(self, hpa: int) -> None:
        """Take one back."""
        if not self.base <= hpa < self.base + self.size or hpa % PAGE_SIZE:
            raise ValueError(f"hpa {hpa:#x} is none of the host pages for firmware")
        self._free.append(hpa)

    @property
    def used(self) -> int:
        """How many are taken."""
        return (self.size >> PAGE_SHIFT) - len(self._free)


class Platform:
    """The hardware under ``host``. ``lock`` is held over every call into any of it.

    Order of locks: a VM's ``mmu_lock`` first, then this.
    """

    def __init__(self, host: HostMemory) -> None:
        self.host = host
        host.arena.covered = min(host.arena.size, _COVERED)  # what moves must stay in there
        self.memory = HpaMemory(host)
        self.frames = FrameMemory(self.memory)
        self.lock = threading.RLock()
        self._pages: HostPages | None = None
        self._made: dict[type, object] = {}

    @property
    def pages(self) -> HostPages:
        """The host's pages for firmware."""
        with self.lock:
            if self._pages is None:
                self._pages = HostPages(self.host)
            return self._pages

    @property
    def ram(self) -> tuple[int, int]:
        """(first hpa, bytes) of the memory that the hardware's tables cover.

        The arena prefers it; what lies behind is no guest's whom they protect.
        """
        arena = self.host.arena
        return arena.hpa_base, arena.covered

    def hardware(self, kind: type[_T], make: Callable[[Platform], _T]) -> _T:
        """What this host has of ``kind``, made at its first use by ``make``."""
        with self.lock:
            found = self._made.get(kind)
            if not isinstance(found, kind):
                self._made[kind] = found = make(self)
            return found
