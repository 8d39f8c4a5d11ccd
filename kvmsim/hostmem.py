# SPDX-License-Identifier: GPL-2.0-or-later
"""Host memory of an emulator process: the one arena, and the ordinary RAM of its VMs.

An emulator process is one host: all its VMs share one arena, and the address of a page in it is
its host-physical address.  The arena's bookkeeping is guarded by one lock, held for no longer
than a map or unmap takes.  Private memory lies behind the process's one fence.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Iterator

import numpy as np

from hwemu.arena import Arena
from hwemu.runs import true_runs
from kvmsim.bindings import Bindings
from kvmsim.dataruns import data_runs
from kvmsim.fallocate import punch
from kvmsim.fence import Kind, Trespass, make_fence
from kvmsim.migration import MOVABLE, UNMOVABLE
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE

_libc = ctypes.CDLL(None)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class HostMemory:
    """The arena of this process, and what fences the private memory in it.

    ``arena`` itself is for engines.  ``fence`` is one of :data:`kvmsim.fence.CHOICES`; FenceError
    if it cannot be had.  ``movable`` is whether owners may move the memory of its VMs (``purpose``
    of REGISTER): KVM asks that they do not.
    """

    def __init__(self, fence: str = "auto", *, movable: bool = False) -> None:
        self.purpose = MOVABLE if movable else UNMOVABLE
        self.arena = Arena()
        self.bindings = Bindings()
        self._lock = threading.Lock()
        try:
            self.fence = make_fence(fence, self.arena.address, self.arena.size)
            self.arena.careful = self.fence.kind is Kind.UFFD
        except BaseException:
            self.arena.close()
            raise

    def place(self, fd: int, offset: int, length: int, *, writable: bool = True) -> int:
        """Map part of a memfd; return its host-physical address."""
        with self._lock:
            return self.arena.place(fd, offset, length, writable=writable)

    def place_private(
        self, fd: int, offset: int, length: int, on_trespass: Trespass, *, writable: bool
    ) -> int:
        """Map part of an extent, behind the fence; nothing of it may be touched yet.

        Memory that may not be written is not fenced: userfaultfd does not take it, and its owner
        does not rely on that.
        """
        hpa = self.place(fd, offset, length, writable=writable)
        if writable:
            try:
                self.fence.cover(self._address(hpa), length, fd, on_trespass)
            except BaseException:
                self.retire(hpa, length)
                raise
        return hpa

    def admit(self, hpa: int, length: int) -> None:
        """Let placed pages be touched, before a leaf for them is stored."""
        self.fence.admit(self._address(hpa), length)

    def shut(self, hpa: int, length: int) -> None:
        """Let them be touched no more, after the last leaf for them was zapped and flushed."""
        self.fence.shut(self._address(hpa), length)

    def retire(self, hpa: int, length: int) -> None:
        """Unmap a range that no vCPU can reach any more."""
        with self._lock:
            self.arena.retire(hpa, length)
            self.fence.uncover(self._address(hpa), length)

    def vacate(self, hpa: int, length: int) -> None:
        """Let go of the file behind a range that no vCPU can reach; its addresses stay taken.

        :meth:`retire` gives them back.
        """
        with self._lock:
            self.arena.vacate(hpa, length)
            self.fence.uncover(self._address(hpa), length)

    def resident(self, hpa: int, length: int) -> list[tuple[int, int]]:
        """The runs of pages of a placed range whose file has them in memory: mincore(2).

        Pages are counted from ``hpa``. Nothing is touched.
        """
        found = np.zeros(length >> PAGE_SHIFT, np.uint8)
        with self._lock:  # what is retired meanwhile is counted as not there
            if _libc.mincore(self._address(hpa), length, found.ctypes.data):
                return []
        return list(true_runs(found & 1))

    def read(self, hpa: int, length: int) -> bytes:
        """Read as a device does."""
        with self._lock:
            return self.arena.read(hpa, length)

    def write(self, hpa: int, data: bytes) -> None:
        """Write as a device does."""
        with self._lock:
            self.arena.write(hpa, data)

    def close(self) -> None:
        """Unmap everything; every engine must be closed."""
        self.arena.close()
        self.fence.close()

    def _address(self, hpa: int) -> int:
        return self.arena.address + hpa - self.arena.hpa_base


class SharedRam:
    """Ordinary memory of a VM: the shared side of its slots.

    ``size`` in bytes.  Pages are counted from its beginning (a slot's ``userspace_addr`` is an
    offset in it), allocated by first touch and given back by :meth:`discard`.
    """

    def __init__(self, host: HostMemory, size: int, name: str) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise ValueError(f"shared RAM of {size} bytes: must be a multiple of {PAGE_SIZE}")
        self.size = size
        self._host = host
        self._fd = os.memfd_create(f"kvmsim:{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._hpa = host.place(self._fd, 0, size)
        except BaseException:
            os.close(self._fd)
            raise

    def hpa(self, page: int) -> int | None:
        """Host-physical address of a page, None beyond the end (the protocol of a shared side)."""
        return self._hpa + page * PAGE_SIZE if 0 <= page * PAGE_SIZE < self.size else None

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes as a device does."""
        self._check(offset, length)
        return self._host.read(self._hpa + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes as a device does."""
        self._check(offset, len(data))
        self._host.write(self._hpa + offset, data)

    def discard(self, offset: int, length: int) -> None:
        """Give pages back (QEMU's ``ram_block_discard_range``); no leaf may point at them."""
        self._check(offset, length)
        try:
            punch(self._fd, offset, length)
        except OSError as error:
            where = f"discard of shared [{offset:#x}, {offset + length:#x})"
            raise OSError(error.errno, where) from None

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the runs of pages of [start, end) that are backed by memory, in order."""
        at, limit = start * PAGE_SIZE, min(end * PAGE_SIZE, self.size)
        for first, last in data_runs(self._fd, at, limit):
            yield first // PAGE_SIZE, last // PAGE_SIZE

    @property
    def resident(self) -> int:
        """Bytes that are backed by memory."""
        return os.fstat(self._fd).st_blocks * 512

    def close(self) -> None:
        """Give everything back; the VM's engines must have stopped."""
        self._host.retire(self._hpa, self.size)
        os.close(self._fd)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(
                errno.EFAULT,
                f"shared RAM has {self.size:#x} bytes, not [{offset:#x}, {offset + length:#x})",
            )
