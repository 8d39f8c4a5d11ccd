# SPDX-License-Identifier: GPL-2.0-or-later
"""What the calls of a confidential guest need of its VM, without an engine: MSRs, shared pages."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvmsim.confidential.guestview import NotShared
from kvmsim.kind import KINDS, VmKind
from kvmsim.uapi import PAGE_SIZE


class Msrs:
    """A CPU of which only MSRs are looked at: 0x10 is there, 0x11 cannot be written."""

    def __init__(self) -> None:
        self.msrs = {0x10: 0x1122_3344_5566_7788, 0x11: 1}

    def get_msr(self, index: int) -> int | None:
        return self.msrs.get(index)

    def set_msr(self, index: int, value: int) -> bool:
        if index != 0x10:
            return False
        self.msrs[index] = value
        return True


@dataclass
class FakeVcpu:
    cpu: Msrs = field(default_factory=Msrs)
    interrupted: bool = False


@dataclass
class FakeVm:
    kind: VmKind


class FakeRunning:
    """A VM of ``kind`` as far as `TdVmCalls` and `VmgExits` look at it."""

    def __init__(self, kind: str, vcpus: int = 2) -> None:
        self.vm = FakeVm(KINDS[kind])
        self.vcpus = [FakeVcpu() for _ in range(vcpus)]
        self.batches = False


class SharedPages:
    """Shared memory by page; what is not in ``pages`` is private."""

    def __init__(self, *gpas: int) -> None:
        self.pages = {gpa: bytearray(PAGE_SIZE) for gpa in gpas}

    def _at(self, gpa: int, size: int) -> tuple[bytearray, int]:
        page, at = self.pages.get(gpa & -PAGE_SIZE), gpa % PAGE_SIZE
        if page is None or at + size > PAGE_SIZE:
            raise NotShared(f"gpa {gpa:#x}+{size:#x}")
        return page, at

    def read(self, gpa: int, size: int) -> bytes:
        page, at = self._at(gpa, size)
        return bytes(page[at : at + size])

    def write(self, gpa: int, data: bytes) -> None:
        page, at = self._at(gpa, len(data))
        page[at : at + len(data)] = data
