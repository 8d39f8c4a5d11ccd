# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory that is an fd, and the slots that put memory into a VM."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Self

from kvmsim.api.transport import IoctlError, Memory, Pin, Transport
from kvmsim.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from kvmsim.uapi import (
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    MEMORY_ATTRIBUTES2,
)

if TYPE_CHECKING:
    from kvmsim.api.vm import Vm


class ConversionError(IoctlError):
    """A conversion in place that was refused; ``error_offset`` is the byte where."""

    def __init__(self, error: IoctlError, error_offset: int) -> None:
        super().__init__(error.errno or errno.EIO, error.operation, error.strerror or "")
        self.error_offset = error_offset


class GuestMemfd:
    """A guest_memfd (Vm.create_guest_memfd): memory of ``size`` bytes that belongs to the guest.

    It outlives its VM and every slot; what is in it is gone when it is closed and no mapping of it
    is left.
    """

    def __init__(self, transport: Transport, handle: int, size: int, flags: int) -> None:
        self.handle = handle
        self.size = size
        self.flags = flags
        self._transport = transport

    @property
    def mappable(self) -> bool:
        """Whether it was created to be mapped."""
        return bool(self.flags & GUEST_MEMFD_FLAG_MMAP)

    def fileno(self) -> int:
        """Its file descriptor in this process, for fstat(2) and for handing it on."""
        return self._transport.fileno(self.handle)

    def allocate(self, offset: int, size: int) -> None:
        """Allocate pages before the guest touches them (page-aligned bytes)."""
        self._transport.fallocate(self.handle, FALLOC_FL_KEEP_SIZE, offset, size)

    def discard(self, offset: int, size: int) -> None:
        """Punch: when this returns no vCPU reaches the pages, and they are free.

        The guest's next access finds zeros (page-aligned bytes).
        """
        mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        self._transport.fallocate(self.handle, mode, offset, size)

    def map(self, offset: int = 0, size: int | None = None) -> Memory:
        """Map it for the host; IoctlError (ENODEV) if it was not created with FLAG_MMAP.

        Without FLAG_INIT_SHARED the mapping is there and every access to it answers EFAULT.
        """
        if self.handle < 0:
            raise IoctlError(errno.EBADF, "mmap", "the guest_memfd is closed")
        return self._transport.map_file(
            self.handle, offset, self.size - offset if size is None else size
        )

    def pin(self, offset: int, size: int) -> Pin:
        """Have bytes in hand until they are closed, where files convert in place.

        Meanwhile a conversion of them to private is EAGAIN; a punch takes them away. IoctlError:
        EFAULT where an index is private, ENODEV without FLAG_MMAP, EOPNOTSUPP elsewhere.
        """
        if self.handle < 0:
            raise IoctlError(errno.EBADF, "pin", "the guest_memfd is closed")
        return self._transport.pin_file(self.handle, offset, size)

    def convert(
        self, offset: int, size: int, *, private: bool,
        flags: int = KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    ) -> None:  # fmt: skip
        """KVM_SET_MEMORY_ATTRIBUTES2 on bytes of the file, all or nothing.

        ``flags`` says what becomes of contents: KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE or _ZERO, 0
        for no promise. ConversionError: EAGAIN while the host has a page in hand, ENOTTY where
        the VM keeps the types, as every released kernel does.
        """
        value = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        argument = bytearray(MEMORY_ATTRIBUTES2.pack(offset, size, value, flags, *[0] * 12))
        try:
            self._transport.ioctl(self.handle, KVM_SET_MEMORY_ATTRIBUTES2, argument)
        except IoctlError as error:
            raise ConversionError(error, MEMORY_ATTRIBUTES2.unpack(argument)[4]) from None

    def close(self) -> None:
        """Close the fd. Idempotent."""
        handle, self.handle = self.handle, -1  # whose number may become another's
        if handle >= 0:
            self._transport.close_handle(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Memslot:
    """A slot of a VM (Vm.add_slot): guest-physical bytes [gpa, gpa + size).

    ``memory`` from ``memory_offset`` is its shared side, ``guest_memfd`` from ``offset`` its
    private one; a slot may lack either. Without ``memory``, a guest_memfd that can be mapped is
    the shared side as well.
    """

    def __init__(
        self,
        vm: Vm,
        id: int,
        gpa: int,
        size: int,
        flags: int = 0,
        memory: Memory | None = None,
        memory_offset: int = 0,
        guest_memfd: GuestMemfd | None = None,
        offset: int = 0,
    ) -> None:
        self.vm = vm
        self.id = id
        self.gpa = gpa
        self.size = size
        self.flags = flags | (0 if guest_memfd is None else KVM_MEM_GUEST_MEMFD)
        self.memory = memory
        self.guest_memfd = guest_memfd
        self.offset = offset
        self._memory_offset = memory_offset
        self._deleted = False
        self._view: Memory | None = None  #: of a file that serves both sides
        self._set(gpa, size)

    def _set(self, gpa: int, size: int) -> None:
        address = 0 if self.memory is None else self.memory.address + self._memory_offset
        if self.guest_memfd is None:
            self.vm.set_user_memory_region(self.id, gpa, size, address, self.flags)
        else:
            self.vm.set_user_memory_region2(
                self.id, gpa, size, address, self.flags,
                guest_memfd=self.guest_memfd.handle, guest_memfd_offset=self.offset,
            )  # fmt: skip

    def _shared(self, gpa: int, length: int) -> tuple[Memory, int]:
        memory, offset = self.memory, self._memory_offset
        if memory is None and self.guest_memfd is not None and self.guest_memfd.mappable:
            memory, offset = self._view or self.guest_memfd.map(), self.offset
            self._view = memory
        if memory is None:
            raise ValueError(f"slot {self.id} has no shared side")
        if gpa < self.gpa or gpa + length > self.gpa + self.size:
            raise ValueError(
                f"slot {self.id} has gpas [{self.gpa:#x}, {self.gpa + self.size:#x}), "
                f"not [{gpa:#x}, {gpa + length:#x})"
            )
        return memory, gpa - self.gpa + offset

    def read(self, gpa: int, length: int) -> bytes:
        """Read the shared side at a guest-physical address; ValueError outside the slot."""
        memory, offset = self._shared(gpa, length)
        return memory.read(offset, length)

    def write(self, gpa: int, data: bytes) -> None:
        """Write the shared side at a guest-physical address; ValueError outside the slot."""
        memory, offset = self._shared(gpa, len(data))
        memory.write(offset, data)

    def discard(self, gpa: int, size: int, *, private: bool) -> None:
        """Free one side of a range: it reads as zeros from here on (page-aligned bytes)."""
        if not private:
            memory, at = self._shared(gpa, size)
            memory.discard(at, size)
        elif self.guest_memfd is None:
            raise ValueError(f"slot {self.id} has no private side")
        else:
            self.guest_memfd.discard(gpa - self.gpa + self.offset, size)

    def move(self, gpa: int) -> None:
        """Move the slot; IoctlError (EINVAL) for one with a guest_memfd, which never moves."""
        self._set(gpa, self.size)
        self.gpa = gpa

    def delete(self) -> None:
        """Delete the slot; memory and guest_memfd keep what they hold. Idempotent."""
        if not self._deleted:
            self._set(self.gpa, 0)
            self._deleted = True
            self.vm.forget(self)
            self.unmap()

    def unmap(self) -> None:
        """Let go of what :meth:`read` and :meth:`write` mapped; they map it again. Idempotent."""
        view, self._view = self._view, None
        if view is not None:
            view.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.vm.closed:
            self.delete()
