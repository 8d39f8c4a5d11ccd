# SPDX-License-Identifier: GPL-2.0-or-later
"""The own process as a caller of the device: its memory, and descriptors that are its own.

For scripts and tests. A pointer is an address of this process; memory for slots comes from
:class:`HostRanges`, since only memory behind a descriptor can be shared with a guest.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import threading
from bisect import bisect_right, insort
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from kvmsim.device.caller import Fd, HostPiece, NotOurs, PrivateFd
from kvmsim.device.copying import fetch, store
from kvmsim.device.results import (
    Begun,
    DeviceObject,
    Failure,
    FdKind,
    MappableObject,
    NewFd,
    Pending,
    Value,
)
from kvmsim.uapi import PAGE_SIZE
from kvmsim.whichfile import which_file

if TYPE_CHECKING:
    from kvmsim.device.gmemfile import GmemFile
    from kvmsim.device.system import KvmDevice

_FUSE_SUPER_MAGIC: Final = 0x65735546


_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(order=True, slots=True)
class HostRange:
    """Shared memory of this process: ``size`` bytes at ``address``, backed by ``fd``."""

    address: int
    size: int = field(compare=False)
    fd: int = field(compare=False)
    _map: mmap.mmap = field(compare=False, repr=False)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from ``offset`` on."""
        return bytes(self._map[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        """Store at ``offset``; ValueError beyond the end."""
        self._map[offset : offset + len(data)] = data

    def close(self) -> None:
        """Unmap; :meth:`HostRanges.free` calls it."""
        self._map.close()
        os.close(self.fd)


class HostRanges:
    """Memory for slots: memfds mapped here, found again by address."""

    def __init__(self) -> None:
        self._ranges: list[HostRange] = []
        self._lock = threading.Lock()

    def allocate(self, size: int) -> HostRange:
        """``size`` bytes (page-aligned) of zeros."""
        if size <= 0 or size % PAGE_SIZE:
            raise ValueError(f"host range of {size} bytes: a multiple of {PAGE_SIZE} above 0")
        fd = os.memfd_create("kvmsim:host-range", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            mapped = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_NORESERVE", 0))
        except BaseException:
            os.close(fd)
            raise
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        made = HostRange(address, size, fd, mapped)
        with self._lock:
            insort(self._ranges, made)
        return made

    def free(self, range: HostRange) -> None:
        """Give it back; no slot may be over it."""
        with self._lock:
            self._ranges.remove(range)
        range.close()

    def find(self, start: int, size: int) -> list[HostPiece]:
        """What there is of [start, start + size), ascending."""
        pieces = []
        with self._lock:
            at = max(bisect_right(self._ranges, start, key=lambda range: range.address) - 1, 0)
            for range in self._ranges[at:]:
                first = max(start, range.address)
                last = min(start + size, range.address + range.size)
                if range.address >= start + size:
                    break
                if first < last:
                    offset = first - range.address
                    pieces.append(HostPiece(first, last - first, range.fd, offset))
        return pieces

    def close(self) -> None:
        """Give everything back."""
        for range in self._ranges[:]:
            self.free(range)


class LocalCaller:
    """The own process: ``objects`` are its descriptors of the device, ``ranges`` its memory."""

    def __init__(self, ranges: HostRanges, objects: dict[int, DeviceObject] | None = None) -> None:
        self.ranges = ranges
        self.objects: dict[int, DeviceObject] = {} if objects is None else objects

    @property
    def mm(self) -> Hashable:
        """The process."""
        return os.getpid()

    def read(self, address: int, length: int) -> bytes:
        """See :class:`~kvmsim.device.caller.Caller`."""
        return fetch(os.getpid(), address, length)

    def write(self, address: int, data: bytes) -> None:
        """See :class:`~kvmsim.device.caller.Caller`."""
        store(os.getpid(), address, data)

    def fd(self, number: int) -> Fd:
        """See :class:`~kvmsim.device.caller.Caller`."""
        number = ctypes.c_int(number).value
        if number in self.objects:
            return self.objects[number]
        try:
            status = which_file(number)
        except OSError as error:  # of a mount that is dead, say
            return NotOurs.CLOSED if error.errno == errno.EBADF else NotOurs.OTHER
        regular = stat.S_ISREG(status.st_mode)
        found = regular and on_fuse(number, status.st_dev)
        return PrivateFd(number) if found else NotOurs.OTHER

    def host_range(self, start: int, size: int) -> Sequence[HostPiece]:
        """See :class:`~kvmsim.device.caller.Caller`."""
        return self.ranges.find(start, size)

    def signal_pending(self, mask: int | None) -> bool:
        """Never: whoever waits for KVM_RUN here cancels it."""
        return False


class _Statfs(ctypes.Structure):
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_char * 256))


_fuse: Final[set[int]] = set()


def on_fuse(fd: int, dev: int | None = None) -> bool:
    """Whether a descriptor of this process is on a FUSE filesystem, as all private files are.

    ``dev``, its st_dev, saves all questions but the first: statfs(2) is a request to the mount.
    """
    if dev in _fuse:
        return True
    status = _Statfs()
    if _LIBC.fstatfs(fd, ctypes.byref(status)) or status.f_type != _FUSE_SUPER_MAGIC:
        return False
    if dev is not None:
        _fuse.add(dev)
    return True


class LocalProcess:
    """open, ioctl, mmap and close for a device in this process, on descriptors of its own.

    A descriptor of the device is a memfd of this process, so that numbers are unique and a vCPU's
    can be mapped; only :meth:`close` releases the object behind it.
    """

    def __init__(self, device: KvmDevice, ranges: HostRanges | None = None) -> None:
        self.device = device
        self.ranges = HostRanges() if ranges is None else ranges
        self.caller = LocalCaller(self.ranges)
        self._maps: dict[int, mmap.mmap] = {}
        self._waiting: dict[int, list[Pending]] = {}

    def open(self) -> int:
        """A descriptor of the device."""
        return self._install(self.device, "kvm", 0)

    def ioctl(self, fd: int, request: int, argument: int | ctypes.Array[ctypes.c_char] = 0) -> int:
        """ioctl(2): the result, or a new descriptor; OSError. Waits for KVM_RUN to end.

        A buffer stands for its address.
        """
        address = argument if isinstance(argument, int) else ctypes.addressof(argument)
        device = self.caller.objects.get(fd) or self.private_file(fd)
        if device is None:
            raise OSError(errno.EBADF, f"descriptor {fd} is none of the device")
        result = device.ioctl(request, address, self.caller)
        if isinstance(result, Begun):
            waiting = self._waiting.setdefault(fd, [])
            waiting.append(result.pending)
            try:
                outcome = result.pending.wait()
            except BaseException:
                result.pending.cancel()
                raise
            finally:
                waiting.remove(result.pending)
            assert outcome is not None
            result = outcome
        if isinstance(result, Failure):
            raise OSError(result.errno, result.reason)
        if isinstance(result, NewFd):
            return self._receive(result)
        assert isinstance(result, Value)
        return result.value

    def private_file(self, fd: int) -> GmemFile | None:
        """What answers for a guest_memfd of the device; None: it is none."""
        found = self.caller.fd(fd)
        return self.device.private_file(found.fd) if isinstance(found, PrivateFd) else None

    def interrupt(self, fd: int) -> None:
        """From another thread: a signal for everyone who waits in an ioctl on ``fd``."""
        for pending in list(self._waiting.get(fd, ())):
            pending.cancel()

    def mmap(self, fd: int) -> memoryview:
        """The memory of a vCPU's descriptor (struct kvm_run); valid until :meth:`close`."""
        return memoryview(self._maps[fd])

    def close(self, fd: int) -> None:
        """close(2), as the last reference: a vCPU that runs is interrupted."""
        device = self.caller.objects.pop(fd)
        device.release()
        mapped = self._maps.pop(fd, None)
        if mapped is not None:
            try:
                mapped.close()
            except BufferError:  # someone still looks at it; it goes with the last view
                pass
        os.close(fd)

    def close_all(self) -> None:
        """Close what is left, vCPUs first, and give the memory back."""
        for fd in sorted(self.caller.objects, reverse=True):
            self.close(fd)
        self.ranges.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_all()

    def _receive(self, new: NewFd) -> int:
        if new.kind is FdKind.PRIVATE_FILE:
            return new.fd
        assert new.object is not None
        try:
            return self._install(new.object, new.name, new.size)
        except BaseException:
            new.object.release()
            raise

    def _install(self, device: DeviceObject | MappableObject, name: str, size: int) -> int:
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            if size:
                os.ftruncate(fd, size)
                self._maps[fd] = mapped = mmap.mmap(fd, size)
                device.attach(memoryview(mapped))  # type: ignore[union-attr]
        except BaseException:
            os.close(fd)
            raise
        self.caller.objects[fd] = device
        return fd
