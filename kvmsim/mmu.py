# SPDX-License-Identifier: GPL-2.0-or-later
"""What a fault stands on: the VM's maps, its second stage and its source of private pages.

The Protocols are what the core needs of its surroundings; hwemu's table and the notifier's user
side satisfy them without knowing of each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvmsim.attributes import Attributes
from kvmsim.invalidate import MmuInvalidate
from kvmsim.kind import VmKind
from kvmsim.memslot import Memslots
from kvmsim.uapi import Abi


class SecondStage(Protocol):
    """The second-stage table of one VM. Addresses are bytes, page-aligned; counts are pages."""

    def map(self, gpa: int, hpa: int, npages: int, *, writable: bool, executable: bool) -> object:
        """Store leaves for a contiguous range over whatever was there; MemoryError: no table."""

    def zap(self, gpa: int, npages: int) -> int:
        """Clear the leaves of a range; how many there were."""


class Backing(Protocol):
    """The user's half of the contract with the owner of private files."""

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        """The part of [start, end) around ``page`` that a grant with ``seq`` still allows.

        Empty if an invalidation of ``page`` newer than ``seq`` was processed here.
        """

    def hpa(self, instance: int, page: int) -> int | None:
        """Host-physical address of ``page`` in an extent instance; None: not here (any more).

        Linear within an instance: what lies between two pages that are here is here.
        """


@dataclass(slots=True)
class Mmu:
    """What a fault looks at and changes, all under the VM's lock."""

    slots: Memslots
    attributes: Attributes
    invalidate: MmuInvalidate
    stage2: SecondStage
    backing: Backing
    abi: Abi = "upstream"
    around: int = 16
    """Pages, a power of two: the aligned block of shared memory that one fault maps."""
    window: int = 512
    """Pages, a power of two: the aligned block of private memory that one request may name."""

    @property
    def kind(self) -> VmKind:
        """What makes an access private here."""
        return self.slots.kind
