# SPDX-License-Identifier: GPL-2.0-or-later
"""How the API reaches a KVM: handles, ioctls, the memory of struct kvm_run, memory of the host.

Two transports exist, :mod:`kvmsim.api.real` for /dev/kvm and :mod:`kvmsim.api.simulated` for the
simulator's device. What is above them does not know which one it has.
"""

from __future__ import annotations

import errno
import os
from typing import Literal, Protocol, Self

from kvmsim import uapi


class IoctlError(OSError):
    """A call on a KVM handle that was refused; nothing was changed.

    ``errno`` is what the kernel answers, ``operation`` the name of the ioctl or system call.
    """

    def __init__(self, number: int, operation: str, reason: str = "") -> None:
        if reason.startswith(operation):  # it tells of slot and range as well
            super().__init__(number, reason)
            self.operation = operation
            return
        name = errno.errorcode.get(number, str(number)).replace("ENOTSUP", "EOPNOTSUPP")
        super().__init__(number, f"{operation}: {name}: {reason or os.strerror(number)}")
        self.operation = operation


class Memory(Protocol):
    """Memory of the VMM's process; ``address`` is what a slot's ``userspace_addr`` may be."""

    address: int
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes; IoctlError with EFAULT where the host may not touch the memory."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes; IoctlError with EFAULT where the host may not touch the memory."""
        ...

    def discard(self, offset: int, size: int) -> None:
        """Give pages back: they read as zeros from here on (page-aligned bytes)."""
        ...

    def close(self) -> None:
        """Unmap. Idempotent."""
        ...


class Pin(Protocol):
    """Bytes of a guest_memfd in the host's hand; offsets are those of the file."""

    @property
    def held(self) -> bool:
        """Whether they still are: neither closed nor punched."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes; IoctlError with EFAULT if they are not in hand (any more)."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes; IoctlError with EFAULT if they are not in hand (any more)."""
        ...

    def close(self) -> None:
        """Let go. Idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class Transport(Protocol):
    """A KVM device and the process that uses it. Handles are small integers, as fds are.

    ``hypercall`` is the instruction of its processor that calls the host.
    """

    name: str
    abi: uapi.Abi
    hypercall: Literal["vmcall", "vmmcall"]

    def open(self) -> int:
        """Open the device; OSError if it cannot be."""
        ...

    def ioctl(self, handle: int, request: int, argument: int | bytearray = 0) -> int:
        """Make an ioctl; its result, or a new handle. A bytearray may be written to."""
        ...

    def shared_bit(self, type: int) -> int:
        """The gpa bit by which a guest of this VM type selects the shared side; 0: no bit does."""
        ...

    def open_file(self, path: str | os.PathLike[str]) -> int:
        """Open a private file that has a name; OSError."""
        ...

    def map_run(self, vcpu: int, size: int) -> memoryview:
        """Map struct kvm_run and what follows it; valid until the handle is closed."""
        ...

    def run(self, vcpu: int) -> int:
        """KVM_RUN: 0 or -errno. Only one thread at a time for each vCPU."""
        ...

    def finish(self, vcpu: int) -> None:
        """KVM_RUN with immediate_exit set: complete what the last exit left, run no guest code."""
        ...

    def cancel(self, vcpu: int) -> None:
        """From any thread: the KVM_RUN under way, else the next one, answers -EINTR."""
        ...

    def allocate(self, size: int) -> Memory:
        """Allocate ordinary memory of the process, page-aligned and zero."""
        ...

    def map_file(self, file: int, offset: int, size: int) -> Memory:
        """Map part of a guest_memfd (GUEST_MEMFD_FLAG_MMAP)."""
        ...

    def pin_file(self, file: int, offset: int, size: int) -> Pin:
        """Have bytes of a guest_memfd in hand, as a device that was given its pages has."""
        ...

    def fallocate(self, file: int, mode: int, offset: int, size: int) -> None:
        """fallocate(2) of a guest_memfd: allocation, or a punch."""
        ...

    def fileno(self, file: int) -> int:
        """The file descriptor of a guest_memfd, of this process; it stays the transport's."""
        ...

    def close_handle(self, handle: int) -> None:
        """Close a handle."""
        ...

    def close(self) -> None:
        """Give back whatever is still open. Idempotent."""
        ...
