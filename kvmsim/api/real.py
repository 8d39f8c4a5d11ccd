# SPDX-License-Identifier: GPL-2.0-or-later
"""/dev/kvm of the kernel that this program runs on."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import struct
import threading
from dataclasses import dataclass, field
from typing import Final, Literal

from kvmsim.api.mapping import Mapping, allocate_pages
from kvmsim.api.transport import IoctlError, Pin
from kvmsim.device.table import request_name
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
        if handle not in self._handles:
            raise IoctlError(errno.EBADF, request_name(request))
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

    def shared_bit(self, type: int) -> int:
        """None: of the types with one, TDX's guests are told by CPUID, which is not set here."""
        return 0

    def open_file(self, path: str | os.PathLike[str]) -> int:
        """Open a file; only its own guest_memfds, which have no names, serve a kernel's KVM."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._handles.add(fd)
        return fd

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
            result = 0
            try:
                with runner.lock:
                    if runner.cancelled:
                        runner.cancelled = False
                        return -errno.EINTR
                    runner.thread = threading.get_ident()
                fcntl.ioctl(vcpu, KVM_RUN, 0)
            except OSError as error:
                result = -(error.errno or errno.EIO)
            finally:
                with runner.lock:
                    runner.thread = 0
                    if result == -errno.EINTR:  # else another exit came first: it is for the next
                        runner.cancelled = False
                    while signal.sigtimedwait([_KICK], 0) is not None:
                        pass
            return result
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def finish(self, vcpu: int) -> None:
        """KVM_RUN, which answers EINTR then."""
        try:
            fcntl.ioctl(vcpu, KVM_RUN, 0)
        except InterruptedError:
            return
        except OSError as error:
            raise IoctlError(error.errno or errno.EIO, "KVM_RUN") from None

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
        return Mapping(size, file, offset, careful=True)

    def pin_file(self, file: int, offset: int, size: int) -> Pin:
        """Nobody of user space pins pages by itself (a device's driver does)."""
        raise IoctlError(errno.EOPNOTSUPP, "pin", "only the simulator's host pins pages")

    def fallocate(self, file: int, mode: int, offset: int, size: int) -> None:
        """fallocate(2)."""
        allocate_pages(file, mode, offset, size)

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
