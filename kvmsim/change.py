# SPDX-License-Identifier: GPL-2.0-or-later
"""What takes memory away from a guest: a bracket that was begun, and what its end has to do."""

from __future__ import annotations

from dataclasses import dataclass

from kvmsim.inplace import ConvertFile
from kvmsim.memslot import SlotChange
from kvmsim.mmu import Zapped


@dataclass(frozen=True, slots=True)
class StoreAttributes:
    """Gfns [start, end) get attributes ``value``."""

    start: int
    end: int
    value: int


@dataclass(frozen=True, slots=True)
class ReleaseFile:
    """The slots of ``file`` lose it (kvm_gmem_release())."""

    file: int


@dataclass(frozen=True, slots=True)
class PoisonPage:
    """The memory of ``page`` of ``file`` failed (kvm_gmem_error_folio())."""

    file: int
    page: int


Then = SlotChange | StoreAttributes | ConvertFile | ReleaseFile | PoisonPage


@dataclass(frozen=True, slots=True)
class Invalidation:
    """An open bracket: what was zapped, and what the end has still to do."""

    zapped: Zapped
    bracketed: bool
    then: Then | None = None
