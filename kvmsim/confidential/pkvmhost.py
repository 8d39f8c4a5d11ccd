# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2 of a host, and the machine under it: what a hypervisor's clearing, copying and flushing are
to memory of the arena, and whose leaves they take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from hwemu.encryptedaccess import Technology
from hwemu.pkvm.access import host_reaches
from hwemu.pkvm.hypervisor import Hypervisor
from hwemu.runs import true_runs
from kvmsim.confidential.encryption import Encryption
from kvmsim.confidential.platform import Platform
from kvmsim.uapi import PAGE_SHIFT


class Leaves(Protocol):
    """Who has a VM's second stage."""

    def unmap(self, gfn: int, npages: int) -> None:
        """The hypervisor has taken leaves away."""


@dataclass(slots=True)
class PkvmHost:
    """The hypervisor of one host, and which guard each of its VMs belongs to."""

    platform: Platform
    guards: dict[int, Leaves] = field(default_factory=dict)
    vacated: set[tuple[int, int]] = field(default_factory=set)
    """[start, end) of pfns whose bytes their owner has moved, and that guests still have."""
    hypervisor: Hypervisor = field(init=False)

    def __post_init__(self) -> None:
        base, size = self.platform.ram
        self.hypervisor = Hypervisor(self, [(base >> PAGE_SHIFT, (base + size) >> PAGE_SHIFT)])
        self.platform.hardware(Encryption, Encryption).holders.append(self._holder)

    def _holder(self, hpa: int) -> tuple[Technology, int] | None:
        """Somebody, where the host's stage 2 has nothing."""
        pfn = hpa >> PAGE_SHIFT
        known = self.hypervisor.vmemmap.is_memory(pfn, 1)
        if not known or host_reaches(self.hypervisor, pfn, 1)[0]:
            return None
        return Technology.PKVM, 0

    def zero(self, pfn: int, npages: int) -> None:
        """hyp_poison_page(); where nothing is any more nothing is cleared."""
        for first, count in self._there(pfn, npages):
            self.platform.memory.zero(first << PAGE_SHIFT, count)

    def copy_pages(self, source: int, target: int, npages: int) -> None:
        """EL2's copy, of what its owner has not copied."""
        for first, count in self._there(source, npages):
            for pfn in range(first, first + count):
                self.platform.memory.copy(pfn << PAGE_SHIFT, pfn - source + target << PAGE_SHIFT)

    def _there(self, pfn: int, npages: int) -> Iterator[tuple[int, int]]:
        """Runs (pfn, npages) of what was not vacated."""
        there = np.ones(npages, np.bool_)
        for start, end in self.vacated:
            there[max(start - pfn, 0) : max(end - pfn, 0)] = False
        for first, last in true_runs(there):
            yield pfn + first, last - first

    def flush_host(self, pfn: int, npages: int) -> None:
        """Nothing of the host's is cached: it reaches pages through references alone."""

    def flush_guest(self, handle: int, gfn: int, npages: int) -> None:
        """The leaves go; the vCPUs are told, or are out of guest code already."""
        self.guards[handle].unmap(gfn, npages)


def pfns_of(hpa: int, size: int) -> tuple[int, int]:
    """The pages [start, end) of a range that begins and ends at pages."""
    return hpa >> PAGE_SHIFT, hpa + size >> PAGE_SHIFT
