# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest_memfd's descriptor where files convert in place: its ioctl, and the host's access.

kvm_gmem_ioctl() of the series "guest_memfd: In-place conversion support" (virt/kvm/guest_memfd.c
there). The descriptor is a file of the mount and no object of the device, so a :class:`GmemFile`
lives for as long as one call does; what is kept of a file is its flags and its types.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from kvmsim.converting import Conversions
from kvmsim.device.caller import Caller
from kvmsim.device.results import Result
from kvmsim.device.table import Call, Level, Row, dispatch, table
from kvmsim.hostpages import HostPages, HostPin
from kvmsim.inplace import Attributes2, ConversionError
from kvmsim.region import PrivateFile
from kvmsim.uapi import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_SET_MEMORY_ATTRIBUTES2,
    MEMORY_ATTRIBUTES2,
    PAGE_SIZE,
    KvmError,
)

if TYPE_CHECKING:
    from kvmsim.device.memory import VmMemory
    from kvmsim.device.vm import VmDevice

Identity = tuple[int, int]
"""st_dev and st_ino."""

IN_PLACE_FLAGS: Final = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
"""What KVM_CREATE_GUEST_MEMFD takes. A mount's files cannot be mapped: MMAP lets the host at the
shared indices by :meth:`GmemFile.pin`, and INIT_SHARED is the type that all begin with."""


class GmemFiles:
    """The private files of one VM in which files keep the types.

    ``changes`` is KVM's slots_lock: held over each conversion and change of slots.
    """

    def __init__(self, memory: VmMemory, vm: VmDevice, changes: threading.Lock) -> None:
        self._memory = memory
        self._running = vm.running
        self._changes = changes
        self._conversions = Conversions(vm.running)
        self._pages = HostPages(vm.running, changes)
        self._flags: dict[Identity, int] = {}
        self._uses: Counter[int] = Counter()

    def add(self, key: Identity, flags: int) -> None:
        """A file was made with these GUEST_MEMFD_FLAG_*."""
        self._flags[key] = flags

    def describe(self, file: PrivateFile, key: Identity) -> PrivateFile:
        """A file that was resolved, with the flags it was made with, and known to the core."""
        file = replace(file, flags=self._flags.get(key, 0), in_place=True)
        with self._running.lock:
            self._running.vm.know(file)
        return file

    def uses(self, file: int) -> bool:
        """Whether the host is at work on a file, slots or not (``changes`` held)."""
        return self._uses[file] > 0

    def convert(self, fd: int, request: Attributes2) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES2: ConversionError, KvmError, LinkError."""
        with self._use(fd) as file, self._changes:
            self._conversions.convert(file, request)

    def require_mappable(self, fd: int) -> None:
        """KvmError (ENODEV) for a file that was made without GUEST_MEMFD_FLAG_MMAP."""
        status = os.fstat(fd)
        if not self._flags.get((status.st_dev, status.st_ino), 0) & GUEST_MEMFD_FLAG_MMAP:
            raise KvmError(errno.ENODEV, "host access", "made without GUEST_MEMFD_FLAG_MMAP")

    def pin(self, fd: int, offset: int, size: int) -> HostPin:
        """Have bytes of a file in hand (:meth:`kvmsim.hostpages.HostPages.pin`).

        KvmError (ENODEV): the file was not made to be mapped.
        """
        self.require_mappable(fd)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(self._use(fd))
            pin = self._pages.pin(file, offset, size)
            pin.on_close(stack.pop_all().close)
            return pin

    def read_slot(self, file: int, page: int, at: int, length: int) -> bytes:
        """Bytes at ``at`` of a page of a file that a slot is bound to; KvmError."""
        known = PrivateFile(file, page + 1, GUEST_MEMFD_FLAG_MMAP, in_place=True)
        offset = page * PAGE_SIZE + at
        with self._pages.pin(known, offset, length) as pin:
            return pin.read(offset, length)

    @contextlib.contextmanager
    def _use(self, fd: int) -> Iterator[PrivateFile]:
        """Be a user of the file behind a descriptor, whether a slot is bound to it or not."""
        with self._changes:
            status = os.fstat(fd)
            file = self._running.private.open_fd(fd)
            file = self.describe(file, (status.st_dev, status.st_ino))
            self._uses[file.id] += 1
        try:
            yield file
        finally:
            with self._changes:
                self._uses[file.id] -= 1
                self._memory.forget_unused(file)


class GmemFile:
    """The private file behind a descriptor of this process that stays open; ``vm`` made it."""

    def __init__(self, vm: VmDevice, fd: int) -> None:
        self._vm = vm
        self._fd = fd

    def ioctl(self, request: int, argument: int, caller: Caller) -> Result:
        """One ioctl on the descriptor, by whatever process has it."""
        return dispatch(self, Level.FILE, TABLE, request, argument, caller)

    def pin(self, offset: int, size: int) -> HostPin:
        """Have bytes in hand, as a mapping's pages are; KvmError."""
        return self._files("host access").pin(self._fd, offset, size)

    def require_mappable(self) -> None:
        """KvmError (ENODEV) if it was not made to be mapped."""
        self._files("mmap").require_mappable(self._fd)

    def set_memory_attributes2(self, call: Call) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES2: where it is refused is written back."""
        files = self._files(call.name)
        request = Attributes2.from_bytes(call.fetch(MEMORY_ATTRIBUTES2.size))
        try:
            files.convert(self._fd, request)
        except ConversionError as error:
            call.write(request.to_bytes(error.error_offset))
            raise

    def _files(self, operation: str) -> GmemFiles:
        files = self._vm.memory.files
        if files is None:
            raise KvmError(errno.ENOTTY, operation, "files do not convert in place here")
        if self._vm.dead:
            raise KvmError(errno.EIO, operation, self._vm.dead)
        return files


TABLE: Final = table(
    (
        Row(KVM_SET_MEMORY_ATTRIBUTES2, GmemFile.set_memory_attributes2,
            "where files convert in place; flags: contents become zeros, stay, or neither",
            "ENOTTY: elsewhere; EINVAL: flags, reserved, attributes that this VM type lacks, size "
            "0, wrap, not aligned, outside the file; EOPNOTSUPP: contents cannot be kept so; "
            "EAGAIN: the host has a page in hand; error_offset says where"),
    )
)  # fmt: skip
"""By request number."""
