# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulator's device in this process, behind the calls that /dev/kvm has."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from kvmsim.api.hostside import InHand, SharedIndices
from kvmsim.api.mapping import Mapping, allocate_pages
from kvmsim.api.transport import IoctlError, Memory, Pin
from kvmsim.device.capabilities import VM_TYPES
from kvmsim.device.local import HostRange, LocalCaller, LocalProcess
from kvmsim.device.results import Begun, Failure, Pending, Value
from kvmsim.device.system import KvmDevice
from kvmsim.device.table import request_name
from kvmsim.emulator import prepare_process
from kvmsim.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from kvmsim.running import RunningVm
from kvmsim.tracedvm import traced
from kvmsim.tracefile import TraceFile
from kvmsim.uapi import KVM_CREATE_GUEST_MEMFD, KVM_RUN, Abi


class SharedMemory:
    """Memory of this process that the device can map."""

    def __init__(self, process: LocalProcess, size: int) -> None:
        self._process = process
        try:
            self._range: HostRange | None = process.ranges.allocate(size)
        except ValueError as error:
            raise IoctlError(errno.EINVAL, "mmap", str(error)) from None
        self.address = self._range.address
        self.size = size

    def _open(self, operation: str, offset: int, length: int) -> HostRange:
        if self._range is None:
            raise IoctlError(errno.EFAULT, operation, "the memory is unmapped")
        if offset < 0 or length < 0 or offset + length > self.size:
            where = f"[{offset:#x}, {offset + length:#x}) of {self.size:#x} bytes"
            raise IoctlError(errno.EFAULT, operation, where)
        return self._range

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes."""
        return self._open("read", offset, length).read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes."""
        self._open("write", offset, len(data)).write(offset, data)

    def discard(self, offset: int, size: int) -> None:
        """Punch the memfd behind it."""
        found = self._open("discard", offset, size)
        allocate_pages(found.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)

    def close(self) -> None:
        """Unmap."""
        found, self._range = self._range, None
        if found is not None:
            self._process.ranges.free(found)


class _Child(LocalCaller):
    """A process that was forked from ours: the same descriptors, another address space."""

    @property
    def mm(self) -> Hashable:
        """Not ours."""
        return self


@dataclass(slots=True)
class _Runner:
    """KVM_RUN of a vCPU, if it is under way, and whether it is to end."""

    view: memoryview  #: its struct kvm_run, as the API sees it
    lock: threading.Lock = field(default_factory=threading.Lock)
    pending: Pending | None = None
    cancelled: bool = False


class Simulation:
    """A transport over :mod:`kvmsim.device`; ``directory`` lies on a privfs mount.

    Elsewhere there are no guest_memfds: KVM_CAP_GUEST_MEMFD is 0, and what refuses one says how to
    mount. All else is there.

    What its private files answer is the mount's business: mount with
    ``-o personality=guest_memfd`` for a VMM of today.  ``trace`` is a file for what happens in the
    VMs (docs/traces.md).  ``in_place``: guest_memfds convert in place (docs/inplace.md).
    """

    hypercall: Literal["vmcall", "vmmcall"] = "vmmcall"

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        abi: Abi = "upstream",
        in_place: bool = False,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        self.name = "simulated"
        self.abi: Abi = abi
        self._directory = directory
        self._in_place = in_place
        self._trace_path = trace
        self._trace: TraceFile | None = None
        self._device: KvmDevice | None = None
        self._process: LocalProcess | None = None
        self._files: set[int] = set()
        self._runners: dict[int, _Runner] = {}
        self._interval = sys.getswitchinterval()

    @property
    def process(self) -> LocalProcess:
        """Our descriptors and memory; IoctlError (EBADF) when closed."""
        if self._process is None:
            raise IoctlError(errno.EBADF, self.name, "not open")
        return self._process

    def open(self) -> int:
        """Open the device: a host of its own, in this process."""
        if self._device is None:
            running = RunningVm
            if self._trace_path is not None:
                self._trace = TraceFile(os.fspath(self._trace_path))
                running = traced(self._trace)
            prepare_process()
            self._device = KvmDevice(
                self._directory, abi=self.abi, running=running, in_place=self._in_place
            )
            self._process = LocalProcess(self._device)
        return self.process.open()

    # --- ioctls -------------------------------------------------------------------------------

    def ioctl(self, handle: int, request: int, argument: int | bytearray = 0) -> int:
        """Make an ioctl of this process."""
        name = request_name(request)
        if isinstance(argument, bytearray):
            pointer = ctypes.c_char.from_buffer(argument)  # holds the bytes where they are
            argument = ctypes.addressof(pointer)
        try:
            result = self.process.ioctl(handle, request, argument)
        except OSError as error:
            raise IoctlError(error.errno or errno.EIO, name, error.strerror or "") from None
        if request == KVM_CREATE_GUEST_MEMFD:
            self._files.add(result)
        return result

    def shared_bit(self, type: int) -> int:
        """Where the kind of VM has one."""
        kind = VM_TYPES[self.abi].get(type)
        return 0 if kind is None or not kind.shared_bit else kind.shared_bit.bit_length() - 1

    def open_file(self, path: str | os.PathLike[str]) -> int:
        """Open a private file of a mount: v7's memfd_create(MFD_INACCESSIBLE)."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._files.add(fd)
        return fd

    # --- vCPUs --------------------------------------------------------------------------------

    def map_run(self, vcpu: int, size: int) -> memoryview:
        """What was mapped when the vCPU was made."""
        view = self.process.mmap(vcpu)
        self._runners[vcpu] = _Runner(view)
        return view

    def run(self, vcpu: int) -> int:
        """KVM_RUN; if a signal handler raises meanwhile, it ends first."""
        runner = self._runners[vcpu]
        caller = self.process.caller
        with runner.lock:
            if runner.cancelled:
                runner.cancelled = False
                return -errno.EINTR
            result = caller.objects[vcpu].ioctl(KVM_RUN, 0, caller)
            if isinstance(result, Begun):
                runner.pending = result.pending
        code: int = -errno.EINTR
        try:
            outcome = _wait(result.pending) if isinstance(result, Begun) else result
            assert isinstance(outcome, Value | Failure)
            code = outcome.value if isinstance(outcome, Value) else -outcome.errno
        finally:
            with runner.lock:
                runner.pending = None
                if code == -errno.EINTR:  # else another exit came first: it is for the next run
                    runner.cancelled = False
        return code

    def finish(self, vcpu: int) -> None:
        """KVM_RUN, which answers EINTR then."""
        try:
            self.ioctl(vcpu, KVM_RUN)
        except IoctlError as error:
            if error.errno != errno.EINTR:
                raise

    def cancel(self, vcpu: int) -> None:
        """End KVM_RUN as a signal would."""
        runner = self._runners[vcpu]
        with runner.lock:
            runner.cancelled = True
            pending = runner.pending
        if pending is not None:
            pending.cancel()

    # --- memory -------------------------------------------------------------------------------

    def allocate(self, size: int) -> SharedMemory:
        """A memfd, mapped here and known to the device."""
        return SharedMemory(self.process, size)

    def map_file(self, file: int, offset: int, size: int) -> Memory:
        """Map a private file; where files convert in place, what stands for a mapping."""
        if self._in_place:
            return SharedIndices(self.process.private_file, file, offset, size)
        return Mapping(size, file, offset, careful=True)

    def pin_file(self, file: int, offset: int, size: int) -> Pin:
        """Have bytes of a private file in hand; where files convert in place."""
        found = self.process.private_file(file)
        if not self._in_place or found is None:
            raise IoctlError(errno.EOPNOTSUPP, "pin", "files do not convert in place here")
        return InHand(found, offset, size)

    def fallocate(self, file: int, mode: int, offset: int, size: int) -> None:
        """fallocate(2) of a private file."""
        allocate_pages(file, mode, offset, size)

    def fileno(self, file: int) -> int:
        """A private file is a descriptor of this process."""
        return file

    # --- life ---------------------------------------------------------------------------------

    def as_another_process(self) -> contextlib.AbstractContextManager[None]:
        """Make calls as a child of this process would, which has its descriptors (EIO)."""
        return self._as(_Child(self.process.ranges, self.process.caller.objects))

    @contextlib.contextmanager
    def _as(self, caller: LocalCaller) -> Iterator[None]:
        before, self.process.caller = self.process.caller, caller
        try:
            yield
        finally:
            self.process.caller = before

    def close_handle(self, handle: int) -> None:
        """Close a handle."""
        if handle in self._runners:
            self._runners.pop(handle).view.release()
        if handle in self._files:
            self._files.remove(handle)
            os.close(handle)
        else:
            self.process.close(handle)

    def close(self) -> None:
        """Close every handle, vCPUs before their VMs, and the host."""
        for handle in [*self._files, *self._runners]:
            self.close_handle(handle)
        process, self._process = self._process, None
        if process is not None:
            process.close_all()
        device, self._device = self._device, None
        if device is not None:
            device.close()
            sys.setswitchinterval(self._interval)
        if self._trace is not None:
            self._trace.close()


def _wait(pending: Pending) -> Value | Failure:
    try:
        outcome = pending.wait()
    except BaseException:
        pending.cancel()
        pending.wait()
        raise
    assert outcome is not None
    return outcome
