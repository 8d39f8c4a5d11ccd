# SPDX-License-Identifier: GPL-2.0-or-later
"""The Secure EPT of a TD and what the PAMT has of it, as columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from hwemu.leafruns import LeafColumns
from hwemu.tdx import TdxModule
from hwemu.tdx.entry import ACCESSIBLE, PENDING, STATES, SeptState
from hwemu.tdx.pamt import PAGE_SHIFT, PAGE_SIZE, PageType
from kvmsim.views.columns import (
    NO_STATE,
    Bools,
    Entries,
    Frames,
    Holder,
    Lock,
    Vocabulary,
    Words,
    no_entries,
)
from kvmsim.views.odd import Odd

_BLOCKED: Final = frozenset(
    state for state, info in STATES.items() if info.unblocked is not None
) | {SeptState.NL_BLOCKED}
WORDS: Final = Vocabulary(
    "TDX", "S-EPT", ("sept", "pamt"), tuple(state.name for state in SeptState),
    mapped=frozenset(int(state) for state in ACCESSIBLE),
    pending=frozenset(int(state) for state in PENDING),
    blocked=frozenset(int(state) for state in _BLOCKED),
)  # fmt: skip
_TYPES: Final = Vocabulary("TDX", "PAMT", (), tuple(
    PageType(n).name if n in list(PageType) else "-" for n in range(max(PageType) + 1)
))  # fmt: skip


class TdxTables:
    """The tables of the TD whose TDR is at ``tdr``; ``lock`` is held over every copy."""

    words: Final = WORDS  #: S-EPT states
    frame_words: Final = _TYPES  #: page types of the PAMT

    def __init__(self, lock: Lock, module: TdxModule, tdr: int, *, shadowed: bool = False) -> None:
        self._lock, self._module, self._tdr = lock, module, tdr
        self.shadowed: Final = shadowed  #: whether leaves lead to shadow pages

    def prepare(self) -> None:
        """Nothing has to be looked for."""

    def entries(self, gfn: int, leaves: LeafColumns) -> Entries:
        """What the S-EPT says of each page, and the PAMT of the frame that it leads to."""
        with self._lock:
            td = self._module.tds.get(self._tdr)
            tree = None if td is None else td.sept
            if tree is None:
                return no_entries(len(leaves.hpa))
            found = tree.columns(gfn, len(leaves.hpa))
            kept = self._module.pamt.columns(found.hpa)
        ours = (kept.pt == PageType.REG) & (kept.owner == self._tdr >> PAGE_SHIFT)
        holder = np.where(kept.pt == PageType.NDA, Holder.HOST, Holder.OTHER)
        holder = np.where(ours, Holder.GUEST, holder).astype(np.uint8)
        there = found.hpa >= 0
        free = found.state == SeptState.FREE
        return Entries(
            np.where(free, NO_STATE, found.state).astype(np.uint8),
            np.where(free, 0, found.level + 1).astype(np.uint8),
            found.hpa,
            np.where(there, holder, Holder.NONE).astype(np.uint8),
        )

    def frames(self, table: str, reached: Words, slots: list[tuple[int, int]]) -> Iterator[Frames]:
        """The TD's pages in the PAMT, of every type."""
        if not self._tdr:
            return
        with self._lock:
            runs = list(self._module.pamt.owned_runs(self._tdr >> PAGE_SHIFT))
            if self._tdr in self._module.tds:
                runs.append((self._tdr, 1, 0, PageType.TDR))
        for hpa, npages, level, kind in sorted(runs):
            hpas = hpa + np.arange(npages, dtype=np.int64) * PAGE_SIZE
            odd = np.zeros(npages, np.int64)
            if kind is PageType.REG:
                lost = ~np.isin(hpas, reached)
                if lost.any():  # it may have come or gone since the S-EPT was copied
                    lost &= self._still(hpas)
                odd[lost] = Odd.UNREACHABLE
            yield Frames(
                hpas, np.full(npages, kind, np.uint8), np.full(npages, level + 1, np.uint8),
                np.full(npages, -1, np.int64), odd,
            )  # fmt: skip

    def _still(self, hpas: Words) -> Bools:
        with self._lock:
            now = self._module.pamt.columns(hpas)
        still: Bools = (now.pt == PageType.REG) & (now.owner == self._tdr >> PAGE_SHIFT)
        return still
