# SPDX-License-Identifier: GPL-2.0-or-later
"""What the RMP says of an SNP guest, turned round: by guest-physical address, as columns.

The RMP is a table of frames. Which of them is at a gfn KVM knows where its second stage had a
leaf; for the others, and for whatever KVM does not know of, the table is searched for the ASID.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

import numpy as np

from hwemu.leafruns import LeafColumns
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import PAGE_SHIFT, STATES, PageState
from kvmsim.confidential.frames import FrameMap
from kvmsim.views.columns import NO_STATE, Entries, Frames, Holder, Lock, Vocabulary, Words
from kvmsim.views.odd import Odd

_PIECE: Final = 1 << 20
_CHECKED: Final = 1 << 18


def _numbers(*states: PageState) -> frozenset[int]:
    return frozenset(number for number, row in enumerate(STATES) if row.state in states)


WORDS: Final = Vocabulary(
    "SEV-SNP", "RMP", ("rmp",), tuple(row.state.value for row in STATES),
    mapped=_numbers(PageState.GUEST_VALID, PageState.VMSA),
    pending=_numbers(PageState.GUEST_INVALID),
    blocked=_numbers(PageState.PRE_GUEST, PageState.PRE_SWAP),
)  # fmt: skip
_HOST: Final = tuple(_numbers(PageState.HYPERVISOR, PageState.HV_FIXED))


class SnpTables:
    """The entries of one ASID. ``own`` are frames of the guest's beside its memory."""

    words: Final = WORDS  #: states of the firmware ABI
    frame_words: Final = WORDS

    def __init__(
        self,
        lock: Lock,
        rmp: Rmp,
        asid: int,
        frames: FrameMap,
        own: Collection[int],
        *,
        shadowed: bool = False,
    ) -> None:
        self.shadowed: Final = shadowed  #: whether leaves lead to shadow pages
        self._lock, self._rmp, self._asid, self._frames = lock, rmp, asid, frames
        self._own = frozenset(own)
        self._pfns = self._gfns = np.zeros(0, np.int64)  # of the search, by gfn

    def prepare(self) -> None:
        """Search the RMP for the ASID."""
        found = []
        end = self._rmp.start + self._rmp.frames
        for pfn in range(self._rmp.start, end, _PIECE):
            with self._lock:
                mine = self._rmp.pfns_of(self._asid, pfn, _PIECE)
                if len(mine):
                    found.append((mine, self._rmp.columns(mine).gfn))
        if found and self._asid:
            pfns, gfns = (np.concatenate(parts) for parts in zip(*found, strict=True))
            order = np.argsort(gfns, kind="stable")
            self._pfns, self._gfns = pfns[order], gfns[order]

    def entries(self, gfn: int, leaves: LeafColumns) -> Entries:
        """The RMP's entry of the frame that is at each page."""
        npages = len(leaves.hpa)
        gfns = np.arange(gfn, gfn + npages, dtype=np.int64)
        pfns = np.full(npages, -1, np.int64)
        low, high = np.searchsorted(self._gfns, (gfn, gfn + npages))
        pfns[self._gfns[low:high] - gfn] = self._pfns[low:high]
        with self._lock:
            known = self._frames.columns(gfn, npages)
            pfns = np.where(known >= 0, known, pfns)
            if not self.shadowed:
                pfns = np.where(leaves.hpa >= 0, leaves.hpa >> PAGE_SHIFT, pfns)
            found = self._rmp.columns(pfns)
        there = pfns >= 0
        ours = there & (found.asid == self._asid) & (found.gfn == gfns)
        host = (found.state == NO_STATE) | np.isin(found.state, _HOST)
        holder = np.where(ours, Holder.GUEST, np.where(host, Holder.HOST, Holder.OTHER))
        shown = ours | (there & (leaves.hpa >= 0))
        return Entries(
            np.where(shown, found.state, NO_STATE).astype(np.uint8),
            np.where(shown, 1 + found.large, 0).astype(np.uint8),
            np.where(shown, pfns << PAGE_SHIFT, -1),
            np.where(shown, holder, Holder.NONE).astype(np.uint8),
        )

    def frames(self, table: str, reached: Words, slots: list[tuple[int, int]]) -> Iterator[Frames]:
        """The guest's entries by frame; marked where two are at one gpa, or no slot is.

        VMSAs and the context page are at no gpa that a slot could have.
        """
        apart = np.array(sorted(self._own), np.int64)
        mine = ~np.isin(self._pfns, apart)
        pfns = np.sort(np.concatenate((self._pfns[mine], apart)))
        gfns = self._gfns[mine]
        repeated = gfns[1:][np.diff(gfns) == 0]
        for at in range(0, len(pfns), _CHECKED):
            part = pfns[at : at + _CHECKED]
            with self._lock:
                now = self._rmp.columns(part)
            own = np.isin(part, apart)
            ours = (now.asid == self._asid) | own
            odd = np.zeros(len(part), np.int64)
            inside = np.zeros(len(part), np.bool_)
            for start, end in slots:
                inside |= (now.gfn >= start) & (now.gfn < end)
            odd[~own & ~inside] |= Odd.NO_SLOT
            odd[~own & np.isin(now.gfn, repeated)] |= Odd.TWICE
            odd[~own & np.isin(now.state, tuple(WORDS.pending))] |= Odd.PENDING
            odd[~own & np.isin(now.state, tuple(WORDS.blocked))] |= Odd.BLOCKED
            yield Frames(
                (part << PAGE_SHIFT)[ours], now.state[ours], (1 + now.large).astype(np.uint8)[ours],
                np.where((now.asid > 0) & ~own, now.gfn << PAGE_SHIFT, -1)[ours], odd[ours],
            )  # fmt: skip
