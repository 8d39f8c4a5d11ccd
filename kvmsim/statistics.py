# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM did so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Self

from kvmsim.memoryuse import MemoryUse


@dataclass(slots=True)
class Counters:
    """What a VM counts as it goes."""

    faults: int = 0
    retries: int = 0
    exits: int = 0
    installed_pages: int = 0
    invalidations: int = 0
    zapped_leaves: int = 0


@dataclass(frozen=True, slots=True)
class VmStatistics:
    """What a VM did so far, and its memory now."""

    faults: int
    retries: int
    exits: int
    installed_pages: int
    invalidations: int
    zapped_leaves: int
    slots: int
    memory: MemoryUse

    @classmethod
    def of(cls, counters: Counters, slots: int, memory: MemoryUse) -> Self:
        """The counters of now."""
        return cls(**asdict(counters), slots=slots, memory=memory)
