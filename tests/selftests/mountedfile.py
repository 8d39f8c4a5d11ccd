# SPDX-License-Identifier: GPL-2.0-or-later
"""The same file as in :mod:`selftests.inplace`, over a mount, with a guest that runs.

The device, its ioctl, the owner of the pages and a vCPU are the ones that ship.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

from device_program import HIGH, PAGE, TEXT, Program

from kvmsim.device.gmemfile import GmemFile
from kvmsim.hostpages import HostPin
from kvmsim.inplace import Attributes2, ConversionError
from kvmsim.uapi import (
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    KVM_X86_SW_PROTECTED_VM,
    MEMORY_ATTRIBUTES2,
    KvmError,
)
from privfs import control

_COPY: Final = bytes.fromhex("f3a4" + "e404")  # rep movsb; in al, 4
_ROOM: Final = 1 << 20  #: gpa in RAM that the guest copies from and to


class MountedFile:
    """``npages`` pages over a slot of a guest. Offsets are bytes; errors as ``inplace.File``'s."""

    def __init__(self, folder: Path, npages: int, flags: int) -> None:
        self._folder = folder
        self._npages = npages
        self._program = program = Program(folder, type=KVM_X86_SW_PROTECTED_VM, in_place=True)
        program.boot(_COPY)
        self._fd = program.guest_memfd(npages * PAGE, flags)
        program.slot(1, HIGH, npages * PAGE, 0, gmem=self._fd)

    @property
    def pages(self) -> dict[int, None]:
        """Those that are allocated, as the owner says."""
        ino = os.fstat(self._fd).st_ino
        rows = control.ask(self._folder, "map", ino=ino, start=0)["rows"]
        return {
            page: None
            for row in rows
            if row["state"] != "hole"
            for page in range(row["start"] // PAGE, min(row["end"] // PAGE, self._npages))
        }

    # --- the host -----------------------------------------------------------------------------

    def pin(self, offset: int, size: int) -> HostPin:
        """Have pages in hand until ``unpin``; OSError where a touch would be SIGBUS."""
        file = self._program.process.private_file(self._fd)
        assert isinstance(file, GmemFile)
        try:
            return file.pin(offset, size)
        except KvmError as error:
            raise OSError(error.errno, error.reason) from error

    def unpin(self, pin: HostPin) -> None:
        """Let go."""
        pin.close()

    def read(self, offset: int, length: int) -> bytes:
        """Load."""
        with self.pin(offset, length) as pages:
            return pages.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Store."""
        with self.pin(offset, len(data)) as pages:
            pages.write(offset, data)

    # --- the guest ----------------------------------------------------------------------------

    def guest_read(self, offset: int, length: int) -> bytes:
        """Load in the guest."""
        self._copy(HIGH + offset, _ROOM, length)
        assert self._program.ram is not None
        return self._program.ram.read(_ROOM, length)

    def guest_write(self, offset: int, data: bytes) -> None:
        """Store in the guest."""
        assert self._program.ram is not None
        self._program.ram.write(_ROOM, data)
        self._copy(_ROOM, HIGH + offset, len(data))

    def _copy(self, source: int, target: int, length: int) -> None:
        vcpu = self._program.vcpus[0]
        self._program.set_regs(vcpu, rip=TEXT, rsi=source, rdi=target, rcx=length)
        assert self._program.ucall(vcpu) == target + length

    # --- the file -----------------------------------------------------------------------------

    def punch(self, offset: int, size: int) -> None:
        """fallocate(PUNCH_HOLE)."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if libc.fallocate(self._fd, 3, offset, size):
            raise OSError(ctypes.get_errno(), "punch")

    def is_private(self, page: int) -> bool:
        """The type of an index."""
        device = self._program.process.caller.objects[self._program.vm]
        (known,) = device.running.vm.mmu.files.values()  # type: ignore[attr-defined]
        return bool(known.is_private(page))

    def convert(
        self, offset: int, size: int, *, private: bool,
        flags: int = KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    ) -> None:  # fmt: skip
        """KVM_SET_MEMORY_ATTRIBUTES2; ConversionError changes nothing."""
        asked = Attributes2(offset, size, KVM_MEMORY_ATTRIBUTE_PRIVATE * private, flags)
        space = ctypes.create_string_buffer(asked.to_bytes(), MEMORY_ATTRIBUTES2.size)
        try:
            self._program.process.ioctl(self._fd, KVM_SET_MEMORY_ATTRIBUTES2, space)
        except OSError as error:
            at = MEMORY_ATTRIBUTES2.unpack(space.raw)[4]
            raise ConversionError(error.errno or -1, error.strerror or "", asked, at) from error

    def close(self) -> None:
        """End the guest."""
        self._program.close()
