# SPDX-License-Identifier: GPL-2.0-or-later
"""The TDX module of a host, and the pages of the host's own that it has for a TD."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from hwemu.encryptedaccess import Technology
from hwemu.tdx import TdxModule
from hwemu.tdx.machine import tdmrs
from hwemu.tdx.pamt import PageType
from kvmsim.confidential.encryption import Encryption, ModuleMemory
from kvmsim.confidential.platform import Platform
from kvmsim.kind import ADDRESS_BITS
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE

_LPS: Final = 256


def make_module(platform: Platform) -> TdxModule:
    """The module of a host: one TDMR over its memory; the SHARED bit is bit 39 for all.

    A vCPU stays on the logical processor of its index.
    """
    memory = platform.hardware(ModuleMemory, ModuleMemory)
    module = TdxModule(tdmrs([platform.ram]), memory, gpa_width=ADDRESS_BITS, lps=_LPS)

    def holder(hpa: int) -> tuple[Technology, int] | None:
        """The HKID of the TD that the PAMT names; a TDR is its own."""
        if hpa not in module.pamt or (entry := module.pamt.walk(hpa)).pt <= PageType.RSVD:
            return None
        tdr = hpa & -PAGE_SIZE if entry.pt is PageType.TDR else entry.owner << PAGE_SHIFT
        return Technology.TDX, module.tds[tdr].hkid

    platform.hardware(Encryption, Encryption).holders.append(holder)
    return module


class ModulePages:
    """Pages that the module has for one TD: TDR, TDCS, TDVPS, S-EPT (the platform's lock held)."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._taken: list[int] = []

    def __len__(self) -> int:
        return len(self._taken)

    def take(self) -> int:
        """A page of the host's for the module; MemoryError."""
        hpa = self._platform.pages.take()
        self._taken.append(hpa)
        return hpa

    def give(self, hpa: int) -> None:
        """The module has it no more."""
        self._taken.remove(hpa)
        self._platform.pages.give(hpa)

    def give_all(self) -> None:
        """The module has none any more."""
        while self._taken:
            self._platform.pages.give(self._taken.pop())

    @contextlib.contextmanager
    def page(self, data: bytes) -> Iterator[int]:
        """A page of the host's with this content, for the length of a leaf."""
        hpa = self._platform.pages.take()
        try:
            self._platform.memory.write(hpa, data)
            yield hpa
        finally:
            self._platform.pages.give(hpa)
