# SPDX-License-Identifier: GPL-2.0-or-later
"""The host at a guest_memfd that converts in place, over the simulator's device.

No file of a mount can be mapped once its indices may become private, so what a mapping is to a
VMM of the kernel's is here a :class:`SharedIndices`: each access asks for its pages and lets go.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Self, TypeVar

from kvmsim.api.mapping import allocate_pages
from kvmsim.api.transport import IoctlError
from kvmsim.device.gmemfile import GmemFile
from kvmsim.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from kvmsim.hostpages import HostPin
from kvmsim.uapi import KvmError
from privfs.notifier.lane import LinkError

_T = TypeVar("_T")


class InHand:
    """Bytes of a file that stay in the host's hand (:class:`kvmsim.api.transport.Pin`)."""

    def __init__(self, file: GmemFile, offset: int, size: int) -> None:
        self._pin: HostPin = _asked("pin", lambda: file.pin(offset, size))

    @property
    def held(self) -> bool:
        """Whether they are still there: neither closed nor punched."""
        return self._pin.held

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes of the file; IoctlError."""
        return _asked("read", lambda: self._pin.read(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes of the file; IoctlError."""
        _asked("write", lambda: self._pin.write(offset, data))

    def close(self) -> None:
        """Let go. Idempotent."""
        self._pin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class SharedIndices:
    """Bytes [offset, offset + size) of a file, as far as they are shared.

    ``find`` gives what answers for a descriptor. It keeps the file, as a mapping does.
    """

    address = 0  #: no slot needs one: the file serves both types of its accesses

    def __init__(
        self, find: Callable[[int], GmemFile | None], fd: int, offset: int, size: int
    ) -> None:
        if offset < 0 or size <= 0 or offset + size > os.fstat(fd).st_size:
            raise IoctlError(errno.EINVAL, "mmap", f"[{offset:#x}, {offset + size:#x}) of the file")
        self.size = size
        self._find = find
        self._offset = offset
        self._fd = os.dup(fd)
        try:
            file = self._file("mmap")
            _asked("mmap", file.require_mappable)
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes; IoctlError with EFAULT where an index is private."""
        at = self._at("read", offset, length)
        with InHand(self._file("read"), at, length) as pages:
            return pages.read(at, length)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes; IoctlError with EFAULT where an index is private."""
        at = self._at("write", offset, len(data))
        with InHand(self._file("write"), at, len(data)) as pages:
            pages.write(at, data)

    def discard(self, offset: int, size: int) -> None:
        """Punch."""
        at = self._at("discard", offset, size)
        allocate_pages(self._fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, at, size)

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _at(self, operation: str, offset: int, length: int) -> int:
        if self._fd < 0:
            raise IoctlError(errno.EFAULT, operation, "it is unmapped")
        if offset < 0 or length <= 0 or offset + length > self.size:
            where = f"[{offset:#x}, {offset + length:#x}) of {self.size:#x} bytes"
            raise IoctlError(errno.EFAULT, operation, where)
        return self._offset + offset

    def _file(self, operation: str) -> GmemFile:
        file = self._find(self._fd)
        if file is None:
            raise IoctlError(errno.EFAULT, operation, "its VM is gone")
        return file


def _asked(operation: str, call: Callable[[], _T]) -> _T:
    """Let the device's errors be the API's."""
    try:
        return call()
    except KvmError as error:
        raise IoctlError(error.errno, operation, error.reason) from error
    except LinkError as error:
        raise IoctlError(error.errno or errno.EIO, operation, str(error)) from error
