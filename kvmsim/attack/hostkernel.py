# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host's kernel can do to a guest's page, past its own good manners."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

from kvmsim.attack.guest import LabGuest
from kvmsim.attack.outcome import Outcome
from kvmsim.confidential.platform import Platform


class HostKernel(Protocol):
    """Deeds against the private page at ``gpa``, in which `SECRET` is.

    Other pages are as they were afterwards; a guest that has met a poisoned one has ended.
    """

    def read(self, gpa: int) -> Outcome:
        """Read the frame through the host's own mapping."""

    def write(self, gpa: int) -> Outcome:
        """Write it."""

    def replay(self, gpa: int) -> Outcome:
        """Note what it holds, wait until the guest has changed it, put it back."""

    def dma(self, gpa: int) -> Outcome:
        """Have a device write it."""

    def alias(self, gpa: int, spare: int) -> Outcome:
        """Map the frame at another gpa of the guest as well."""

    def claim(self, gpa: int) -> Outcome:
        """Map the frame into another guest."""

    def other_side(self, gpa: int) -> Outcome:
        """Map the frame where the guest looks for shared memory."""

    def split(self, gpa: int) -> Outcome:
        """Take 4 KiB out of the guest's page of 2 MiB while it uses it."""


_MODULES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tdx": "kvmsim.attack.tdxhost",
        "snp": "kvmsim.attack.snphost",
        "pkvm": "kvmsim.attack.pkvmhost",
        "sw-protected": "kvmsim.attack.plainhost",
        "shared-bit": "kvmsim.attack.plainhost",
    }
)


def make_kernel(kind: str, guest: LabGuest, platform: Platform) -> HostKernel:
    """The host of ``guest``, on the hardware of its kind."""
    kernel: HostKernel = importlib.import_module(_MODULES[kind]).make(guest, platform)
    return kernel
