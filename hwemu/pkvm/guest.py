# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's stage 2, in whose leaves its page states lie; and the table of VMs.

struct pkvm_hyp_vm and vm_table of arch/arm64/kvm/hyp/nvhe/pkvm.c.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Hashable, Iterator
from typing import Self

import numpy as np
import numpy.typing as npt

from hwemu.pkvm.state import (
    HANDLE_OFFSET,
    MAX_VMS,
    PAGE_SHIFT,
    PTE_ADDRESS,
    PTE_PAGE,
    PTE_STATE_SHIFT,
    PTE_VALID,
    PageState,
    PkvmError,
    leaf,
)
from hwemu.pkvm.vmemmap import Pages

_VALID = np.uint64(PTE_VALID)
_STATE = np.uint64(PTE_STATE_SHIFT)
_BITS = np.uint64(3)


class Guest:
    """One VM: its kind, and entries of the guest-physical pages [0, ``npages``).

    ``pte[gfn]`` is the leaf that maps a gfn, also beneath a block, whose pages all have a leaf of
    the block's kind here. 0 where nothing is mapped.
    """

    def __init__(self, handle: int, npages: int, *, protected: bool) -> None:
        self.handle = handle
        self.protected = protected
        self.dying = False
        self.loaded = 0  #: vCPUs that a CPU has loaded
        self.pte = np.zeros(npages, dtype=np.uint64)

    @property
    def npages(self) -> int:
        """Width of the guest-physical space, in pages."""
        return len(self.pte)

    def valid(self, gfn: int, npages: int) -> npt.NDArray[np.bool_]:
        """Which gfns are mapped."""
        return (self.pte[gfn : gfn + npages] & _VALID).astype(np.bool_)

    def blocks(self, gfn: int, npages: int) -> npt.NDArray[np.bool_]:
        """Which are mapped by a block."""
        row = self.pte[gfn : gfn + npages]
        found: npt.NDArray[np.bool_] = row & np.uint64(PTE_VALID | PTE_PAGE) == _VALID
        return found

    def states(self, gfn: int, npages: int) -> npt.NDArray[np.uint8]:
        """The guest's page states (guest_get_page_state())."""
        row = self.pte[gfn : gfn + npages]
        states = (row >> _STATE & _BITS).astype(np.uint8)
        states[row & _VALID == 0] = PageState.NOPAGE
        return states

    def pfns(self, gfn: int, npages: int) -> Pages:
        """Where they lead; only mapped ones mean anything."""
        address = self.pte[gfn : gfn + npages] & np.uint64(PTE_ADDRESS)
        return (address >> np.uint64(PAGE_SHIFT)).astype(np.int64)

    def map(self, gfn: int, pfns: Pages, state: PageState, *, block: bool = False) -> None:
        """Store leaves."""
        bits = np.uint64(leaf(0, state, block=block))
        self.pte[gfn : gfn + len(pfns)] = pfns.astype(np.uint64) << np.uint64(PAGE_SHIFT) | bits

    def unmap(self, gfn: int, npages: int) -> None:
        """Remove leaves."""
        self.pte[gfn : gfn + npages] = 0

    def runs(self, state: PageState) -> Iterator[tuple[int, int]]:
        """Ranges (gfn, npages) of gfns with ``state``, blocks and pages apart."""
        having = self.states(0, self.npages) == state
        kind = np.where(having, 1 + self.blocks(0, self.npages), 0).astype(np.int8)
        edges = np.flatnonzero(np.diff(kind, prepend=np.int8(0), append=np.int8(0))).tolist()
        for start, end in itertools.pairwise(edges):
            if kind[start]:
                yield start, end - start

    def key(self) -> Hashable:
        """The whole state as a hashable value."""
        return (self.handle, self.protected, self.dying, self.loaded, self.pte.tobytes())

    def copy(self) -> Self:
        """An independent twin."""
        twin = object.__new__(type(self))
        twin.handle, twin.protected = self.handle, self.protected
        twin.dying, twin.loaded = self.dying, self.loaded
        twin.pte = self.pte.copy()
        return twin


class VmTable:
    """Guests by handle. A handle is used again when its VM is gone, the lowest first."""

    def __init__(self, limit: int = MAX_VMS) -> None:
        self._limit = limit
        self._guests: dict[int, Guest] = {}

    def __iter__(self) -> Iterator[Guest]:
        return iter(self._guests.values())

    def get(self, operation: str, handle: int) -> Guest:
        """The VM; ENOENT if there is none (get_vm_by_handle())."""
        guest = self._guests.get(handle)
        if guest is None:
            raise PkvmError(errno.ENOENT, f"{operation}: no VM {handle:#x}")
        return guest

    def insert(self, npages: int, *, protected: bool) -> Guest:
        """A new VM; ENOMEM if the table is full (insert_vm_table_entry()), EINVAL without pages."""
        if npages < 1:
            raise PkvmError(errno.EINVAL, f"create VM of {npages} pages: at least one is needed")
        free = (HANDLE_OFFSET + n for n in range(self._limit))
        handle = next((handle for handle in free if handle not in self._guests), None)
        if handle is None:
            raise PkvmError(errno.ENOMEM, f"create VM: all {self._limit} handles are in use")
        self._guests[handle] = Guest(handle, npages, protected=protected)
        return self._guests[handle]

    def remove(self, guest: Guest) -> None:
        """Forget a VM."""
        del self._guests[guest.handle]

    def key(self) -> Hashable:
        """The whole state as a hashable value."""
        return (self._limit, *(self._guests[handle].key() for handle in sorted(self._guests)))

    def copy(self) -> Self:
        """An independent twin."""
        twin = type(self)(self._limit)
        twin._guests = {handle: guest.copy() for handle, guest in self._guests.items()}
        return twin
