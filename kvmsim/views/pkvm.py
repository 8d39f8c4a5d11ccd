# SPDX-License-Identifier: GPL-2.0-or-later
"""Who owns a protected VM's pages under pKVM, as columns: its stage 2 against the host's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from hwemu.leafruns import LeafColumns
from hwemu.pkvm.guest import Guest
from hwemu.pkvm.hypervisor import Hypervisor
from hwemu.pkvm.state import PAGE_SHIFT, Component, PageState
from kvmsim.views.columns import (
    NO_STATE,
    Entries,
    Frames,
    Holder,
    Lock,
    Vocabulary,
    Words,
    no_entries,
)

WORDS: Final = Vocabulary(
    "pKVM", "pKVM", ("pkvm",), tuple(state.name for state in PageState),
    mapped=frozenset(state for state in PageState if state is not PageState.NOPAGE),
    sized=False,
)  # fmt: skip


class PkvmTables:
    """One VM of the hypervisor's; ``handle`` None where it has none (any more)."""

    def __init__(self, lock: Lock, hypervisor: Hypervisor, handle: int | None) -> None:
        self._lock, self._hyp, self._handle = lock, hypervisor, handle

    @property
    def words(self) -> Vocabulary:
        """Page states."""
        return WORDS

    @property
    def shadowed(self) -> bool:
        """Whether leaves lead to shadow pages."""
        return False

    @property
    def frame_words(self) -> Vocabulary:
        """The same."""
        return WORDS

    def prepare(self) -> None:
        """Nothing has to be looked for."""

    def _guest(self) -> Guest | None:
        return next((guest for guest in self._hyp.vms if guest.handle == self._handle), None)

    def entries(self, gfn: int, leaves: LeafColumns) -> Entries:
        """The guest's leaf of each page, and whose the host's stage 2 says the frame is."""
        found = no_entries(len(leaves.hpa))
        with self._lock:
            guest = self._guest()
            here = 0 if guest is None else max(0, min(guest.npages - gfn, len(leaves.hpa)))
            if guest is None or not here:
                return found
            valid = guest.valid(gfn, here)
            states, blocks = guest.states(gfn, here), guest.blocks(gfn, here)
            pfns = np.where(valid, guest.pfns(gfn, here), self._hyp.vmemmap.first)
            rows = self._hyp.vmemmap.rows(pfns)
            memory = (rows >= 0) & (rows < len(self._hyp.vmemmap.memory))
            rows = np.where(memory, rows, 0)
            state, owner = self._hyp.vmemmap.host_state[rows], self._hyp.vmemmap.owner[rows]
            handle, at = self._hyp.vmemmap.handle[rows], self._hyp.vmemmap.gfn[rows]
        mine = (owner == Component.GUEST) & (handle == self._handle)
        mine &= at == np.arange(gfn, gfn + here)
        lent = state == PageState.SHARED_BORROWED  # the guest has shared it with the host
        holder = np.where(owner == Component.HOST, Holder.HOST, Holder.OTHER)
        holder = np.where((mine | lent) & memory, Holder.GUEST, holder)
        found.state[:here] = np.where(valid, states, NO_STATE)
        found.level[:here] = np.where(valid, 1 + blocks, 0)
        found.hpa[:here] = np.where(valid, pfns << PAGE_SHIFT, -1)
        found.holder[:here] = np.where(valid, holder, Holder.NONE)
        return found

    def frames(self, table: str, reached: Words, slots: list[tuple[int, int]]) -> Iterator[Frames]:
        """Entries say all there is: the host's stage 2 is an identity map."""
        return iter(())
