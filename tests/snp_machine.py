# SPDX-License-Identifier: GPL-2.0-or-later
"""A small SEV-SNP machine for tests: some frames, a guest that is being launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hwemu.snp import cpuidpage
from hwemu.snp.firmware import Firmware
from hwemu.snp.fwstatus import FirmwareRefused, FwStatus
from hwemu.snp.guestcontext import Policy
from hwemu.snp.hostops import NewState, rmpupdate
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import PAGE_SIZE

GCTX, PAGE, OTHER, LARGE = 1, 2, 3, 4
POLICY = int(Policy.MUST_BE_ONE | Policy.SMT)
ASID = 5


class Nothing:
    """A memory whose contents nobody looks at."""

    def read(self, pfn: int) -> bytes:
        return bytes(PAGE_SIZE)

    def write(self, pfn: int, contents: bytes) -> None: ...

    def zero(self, pfn: int) -> None: ...

    def copy(self, source: int, target: int) -> None: ...


class Pages:
    """A memory of few pages."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}

    def read(self, pfn: int) -> bytes:
        return self.pages.get(pfn, bytes(PAGE_SIZE))

    def write(self, pfn: int, contents: bytes) -> None:
        assert len(contents) == PAGE_SIZE
        self.pages[pfn] = contents

    def zero(self, pfn: int) -> None:
        self.pages.pop(pfn, None)

    def copy(self, source: int, target: int) -> None:
        self.pages[target] = self.read(source)


def assign(rmp: Rmp, pfn: int, **fields: int) -> None:
    new = NewState(True, fields.get("size", 0), bool(fields.get("immutable", 0)),
                   fields.get("gpa", 0), fields.get("asid", 0))  # fmt: skip
    assert rmpupdate(rmp, pfn, new).ok


def machine(cpuid: cpuidpage.CpuidLimits | None = None) -> tuple[Firmware, Pages]:
    memory = Pages()
    firmware = Firmware(Rmp(16, group=4, max_asid=9), memory, cpuid=cpuid)
    firmware.init()
    return firmware, memory


def launched(cpuid: cpuidpage.CpuidLimits | None = None) -> tuple[Firmware, Pages]:
    """A guest in LAUNCH with an ASID, and a Pre-Guest page for it."""
    firmware, memory = machine(cpuid)
    assign(firmware.rmp, GCTX, immutable=1)
    firmware.gctx_create(GCTX)
    firmware.launch_start(GCTX, POLICY)
    firmware.activate(GCTX, ASID)
    assign(firmware.rmp, PAGE, immutable=1, gpa=0x5000, asid=ASID)
    return firmware, memory


def refused(
    firmware: Firmware, command: Callable[..., object], *operands: Any, **options: Any
) -> FwStatus:
    """The status of a command that must be refused and change nothing."""
    before = firmware.key()
    with pytest.raises(FirmwareRefused) as caught:
        command(*operands, **options)
    assert firmware.key() == before
    assert caught.value.status.name in str(caught.value)
    return caught.value.status
