# SPDX-License-Identifier: GPL-2.0-or-later
"""Gather what a VM's memory holds on both sides, for :mod:`kvmsim.memoryuse` to count.

The owners are asked without any lock, so the picture is one of a moment only while nothing
changes: of a VM at work it is as old as the answer that took longest.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from kvmsim.memoryuse import Allocated, allocated_by_slot
from kvmsim.memslot import Memslot
from kvmsim.mmu import Mmu
from kvmsim.private import PrivateMemory
from kvmsim.region import SharedSide

Runs = tuple[tuple[int, int], ...]


class _Shared(SharedSide, Protocol):
    """The shared side of slots."""

    def runs(self, start: int, end: int) -> Iterable[tuple[int, int]]:
        """The runs of pages of [start, end) that are backed by memory, in order."""


@dataclass(slots=True)
class Gathered:
    """Runs of pages by what was asked for; a slot that came later holds nothing."""

    private: dict[tuple[int, int, int], Runs] = field(default_factory=dict)
    shared: dict[tuple[int, int], Runs] = field(default_factory=dict)

    def private_runs(self, file: int, start: int, end: int) -> Iterable[tuple[int, int]]:
        """Allocated pages of a private file."""
        return self.private.get((file, start, end), ())

    def shared_runs(self, slot: Memslot, start: int, end: int) -> Iterable[tuple[int, int]]:
        """Allocated pages of a slot's shared side."""
        return self.shared.get((start, end), ())


def held(
    lock: threading.Lock, mmu: Mmu, private: PrivateMemory, ram: _Shared
) -> dict[int, Allocated]:
    """Return what every slot holds, in pages, by slot id; no lock may be held.

    LinkError if an owner does not answer.
    """
    with lock:
        slots = list(mmu.slots)
    gathered = Gathered()
    for slot in slots:
        if slot.file is not None:
            start, end = slot.file_page, slot.file_page + slot.npages
            gathered.private[slot.file, start, end] = private.runs(slot.file, start, end)
        if slot.shared is ram:
            start = slot.shared_page(slot.base_gfn)
            end = start + slot.npages
            gathered.shared[start, end] = tuple(ram.runs(start, end))
    with lock:
        return allocated_by_slot(mmu, gathered)
