# SPDX-License-Identifier: GPL-2.0-or-later
"""/dev/kvm of the kernel that this program runs on."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import threading
from dataclasses import dataclass, field
from typing import Final, Literal

from kvmsim.api.transport import IoctlError, request_name
from kvmsim.uapi import (
    KVM_CREATE_GUEST_MEMFD,
    KVM_CREATE_VCPU,
    KVM_CREATE_VM,
    KVM_RUN,
    Abi,
)
from kvmsim.uapi.requests import KVM_SET_SIGNAL_MASK

_SIGNAL_MASK: Final = struct.Struct("<IQ")  # len, sigset: what follows the length is not aligned
#: Blocked in the thread that runs a vCPU and let in by KVM_RUN alone: it ends KVM_RUN, stays
#: pending and is taken back there, so no handler is called and none has to be installed.
_KICK: Final = signal.SIGRTMIN

_NEW_FD: Final = frozenset({KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_CREATE_GUEST_MEMFD})

_MAP_NORESERVE: Final = 0x4000  # the mmap module has no name for it yet

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
for _name in ("process_vm_readv", "process_vm_writev"):
    getattr(_libc, _name).restype = ctypes.c_ssize_t


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class Mapping:
    """A shared mapping of this process: anonymous, or of a guest_memfd.

    The host may be refused a guest_memfd's pages.  Accesses to one go through process_vm_readv(2)
    and process_vm_writev(2) on ourselves, which answer EFAULT where a load would end in SIGBUS.
    """

    def __init__(self, size: int, fd: int = -1, offset: int = 0) -> None:
        self.size = size
        self._careful = fd >= 0
        flags = mmap.MAP_SHARED | (0 if fd >= 0 else mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
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
        buffer = ctypes.create_string_buffer(length)
        self._transfer("process_vm_readv", buffer, offset, length)
        return buffer.raw

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes."""
        self._check("write", offset, len(data))
        if not self._careful:
            self._map[offset : offset + len(data)] = data
        else:
            buffer = ctypes.create_string_buffer(data, len(data))
            self._transfer("process_vm_writev", buffer, offset, len(data))

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
        self, operation: str, buffer: ctypes.Array[ctypes.c_char], offset: int, length: int
    ) -> None:
        ours = _IoVec(ctypes.addressof(buffer), length)
        theirs = _IoVec(self.address + offset, length)
        done = getattr(_libc, operation)(
            os.getpid(), ctypes.byref(ours), ctypes.c_ulong(1), ctypes.byref(theirs),
            ctypes.c_ulong(1), ctypes.c_ulong(0),
        )  # fmt: skip
        if done != length:
            number = ctypes.get_errno() if done < 0 else errno.EFAULT
            where = f"guest_memfd mapping [{offset:#x}, {offset + length:#x})"
            raise IoctlError(number, operation, f"{where}: not the host's to touch")


@dataclass(slots=True)
class _Runner:
    """Who runs a vCPU, and whether that is to end."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: int = 0  #: pthread id while inside KVM_RUN
    cancelled: bool = False
    mask: int = -1  #: the signal mask that KVM_RUN was told


def _hypercall() -> Literal["vmcall", "vmmcall"]:
    with open("/proc/cpuinfo") as lines:
        return "vmmcall" if any("AuthenticAMD" in line for line in lines) else "vmcall"


class RealTransport:
    """A transport over the kernel's own device."""

    abi: Abi = "upstream"

    def __init__(self, path: str = "/dev/kvm") -> None:
        self.name = path
        self.hypercall = _hypercall()
        self._handles: set[int] = set()
        self._runs: dict[int, tuple[mmap.mmap, memoryview]] = {}
        self._runners: dict[int, _Runner] = {}

    def open(self) -> int:
        """Open the device."""
        fd = os.open(self.name, os.O_RDWR | os.O_CLOEXEC)
        self._handles.add(fd)
        return fd

    def ioctl(self, handle: int, request: int, argument: int | bytearray = 0) -> int:
        """Make an ioctl, again if a signal interrupted it."""
        while True:
            try:
                result: int = fcntl.ioctl(handle, request, argument)
                break
            except InterruptedError:
                continue
            except OSError as error:
                raise IoctlError(error.errno or errno.EIO, request_name(request)) from None
        if request in _NEW_FD:
            self._handles.add(result)
            os.set_inheritable(result, False)  # KVM_CREATE_GUEST_MEMFD alone leaves it so
        return result

    def map_run(self, vcpu: int, size: int) -> memoryview:
        """Map struct kvm_run."""
        try:
            mapped = mmap.mmap(vcpu, size)
        except OSError as error:
            raise IoctlError(error.errno or errno.EINVAL, "mmap of a vCPU") from None
        self._runs[vcpu] = mapped, memoryview(mapped)
        self._runners[vcpu] = _Runner()
        return self._runs[vcpu][1]

    def run(self, vcpu: int) -> int:
        """KVM_RUN."""
        runner = self._runners[vcpu]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [_KICK])
        try:
            self._let_in_kicks(vcpu, runner, before)
            try:
                with runner.lock:
                    if runner.cancelled:
                        return -errno.EINTR
                    runner.thread = threading.get_ident()
                fcntl.ioctl(vcpu, KVM_RUN, 0)
            except OSError as error:
                return -(error.errno or errno.EIO)
            finally:
                with runner.lock:
                    runner.thread = 0
                    runner.cancelled = False
                    while signal.sigtimedwait([_KICK], 0) is not None:
                        pass
            return 0
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _let_in_kicks(self, vcpu: int, runner: _Runner, before: set[signal.Signals | int]) -> None:
        mask = sum(1 << (number - 1) for number in before if number != _KICK)
        if mask != runner.mask:
            packed = bytearray(_SIGNAL_MASK.pack(_SIGNAL_MASK.size - 4, mask))
            fcntl.ioctl(vcpu, KVM_SET_SIGNAL_MASK, packed)
            runner.mask = mask

    def cancel(self, vcpu: int) -> None:
        """End KVM_RUN by a signal that only KVM_RUN lets in."""
        runner = self._runners[vcpu]
        with runner.lock:
            runner.cancelled = True
            if runner.thread:
                signal.pthread_kill(runner.thread, _KICK)

    def allocate(self, size: int) -> Mapping:
        """Map anonymous memory."""
        return Mapping(size)

    def map_file(self, file: int, offset: int, size: int) -> Mapping:
        """Map a guest_memfd."""
        return Mapping(size, file, offset)

    def fallocate(self, file: int, mode: int, offset: int, size: int) -> None:
        """fallocate(2); a signal interrupts an allocation, and a retry goes on with it."""
        while _libc.fallocate(file, mode, offset, size) != 0:
            if (number := ctypes.get_errno()) != errno.EINTR:
                raise IoctlError(number, f"fallocate({mode:#x}, {offset:#x}, {size:#x})")

    def fileno(self, file: int) -> int:
        """A handle is a descriptor."""
        return file

    def close_handle(self, handle: int) -> None:
        """Close a handle and unmap what was mapped of it."""
        self._runners.pop(handle, None)
        if handle in self._runs:
            mapped, view = self._runs.pop(handle)
            view.release()
            mapped.close()
        if handle in self._handles:
            self._handles.remove(handle)
            os.close(handle)

    def close(self) -> None:
        """Close every handle."""
        for handle in [*self._handles]:
            self.close_handle(handle)
