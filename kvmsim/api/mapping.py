# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory of this process: mappings that answer errors where a load would end in a signal."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from typing import Final

from hwemu import processmemory
from kvmsim.api.transport import IoctlError
from kvmsim.fallocate import fallocate

_MAP_NORESERVE: Final = 0x4000  # the mmap module has no name for it yet

_Copy = Callable[[int, int, int, int], int]


def allocate_pages(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2); IoctlError."""
    try:
        fallocate(fd, mode, offset, size)
    except OSError as error:
        where = f"fallocate({mode:#x}, {offset:#x}, {size:#x})"
        raise IoctlError(error.errno or errno.EIO, where) from None


class Mapping:
    """A shared mapping: anonymous, or of a file.

    ``careful``: the host may be refused the pages, so every access is a system call that can fail.
    """

    def __init__(self, size: int, fd: int = -1, offset: int = 0, *, careful: bool = False) -> None:
        self.size = size
        self._careful = careful
        flags = mmap.MAP_SHARED | _MAP_NORESERVE | (mmap.MAP_ANONYMOUS if fd < 0 else 0)
        try:
            self._map = mmap.mmap(fd, size, flags=flags, offset=offset)
        except OSError as error:
            raise IoctlError(error.errno or errno.EINVAL, "mmap") from None
        except ValueError as error:  # what Python refuses by itself
            raise IoctlError(errno.EINVAL, "mmap", str(error)) from None
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes."""
        self._check("read", offset, length)
        if not self._careful:
            return self._map[offset : offset + length]
        buffer = (ctypes.c_char * length)()
        self._transfer("process_vm_readv", processmemory.read, buffer, offset)
        return buffer.raw

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes."""
        self._check("write", offset, len(data))
        if not self._careful:
            self._map[offset : offset + len(data)] = data
        else:
            buffer = (ctypes.c_char * len(data)).from_buffer_copy(data)
            self._transfer("process_vm_writev", processmemory.write, buffer, offset)

    def discard(self, offset: int, size: int) -> None:
        """Free pages by MADV_REMOVE, which punches what is mapped."""
        self._check("madvise(MADV_REMOVE)", offset, size)
        try:
            self._map.madvise(mmap.MADV_REMOVE, offset, size)
        except OSError as error:
            raise IoctlError(error.errno or errno.EINVAL, "madvise(MADV_REMOVE)") from None

    def close(self) -> None:
        """Unmap."""
        self._map.close()

    def _check(self, operation: str, offset: int, length: int) -> None:
        if self._map.closed:
            raise IoctlError(errno.EFAULT, operation, "the memory is unmapped")
        if offset < 0 or length < 0 or offset + length > self.size:
            where = f"[{offset:#x}, {offset + length:#x}) of {self.size:#x} bytes"
            raise IoctlError(errno.EFAULT, operation, where)

    def _transfer(
        self, operation: str, call: _Copy, buffer: ctypes.Array[ctypes.c_char], offset: int
    ) -> None:
        """Copy by a system call on ourselves: it answers EFAULT where a load would be SIGBUS."""
        length, number, done = len(buffer), errno.EFAULT, 0
        try:
            done = call(os.getpid(), self.address + offset, ctypes.addressof(buffer), length)
        except OSError as error:
            number = error.errno or errno.EFAULT
        if done != length:
            where = f"guest_memfd mapping [{offset:#x}, {offset + length:#x})"
            raise IoctlError(number, operation, f"{where}: not the host's to touch")
