# SPDX-License-Identifier: GPL-2.0-or-later
"""Which frame KVM has found for a gfn: what the second stage would say if it had a leaf.

Frames by number, in blocks of 512 gfns: a numpy row for each block that has any.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BLOCK = 512
_NONE = -1


class FrameMap:
    """gfn → pfn; unknown at first."""

    def __init__(self) -> None:
        self._blocks: dict[int, npt.NDArray[np.int64]] = {}

    def get(self, gfn: int) -> int | None:
        """The frame of ``gfn``, None if none is known."""
        block = self._blocks.get(gfn // _BLOCK)
        found = _NONE if block is None else int(block[gfn % _BLOCK])
        return None if found == _NONE else found

    def columns(self, gfn: int, npages: int) -> npt.NDArray[np.int64]:
        """The frames of gfns in a row, -1 where none is known."""
        found = np.full(npages, _NONE, np.int64)
        for number in range(gfn // _BLOCK, (gfn + npages - 1) // _BLOCK + 1):
            row, base = self._blocks.get(number), number * _BLOCK
            if row is not None:
                first, end = max(gfn, base), min(gfn + npages, base + _BLOCK)
                found[first - gfn : end - gfn] = row[first - base : end - base]
        return found

    def set(self, gfn: int, npages: int, pfn: int) -> None:
        """``npages`` gfns from ``gfn`` on are the frames from ``pfn`` on."""
        while npages:
            row = self._blocks.setdefault(gfn // _BLOCK, np.full(_BLOCK, _NONE, np.int64))
            first = gfn % _BLOCK
            here = min(npages, _BLOCK - first)
            row[first : first + here] = np.arange(pfn, pfn + here)
            gfn, pfn, npages = gfn + here, pfn + here, npages - here

    def forget(self, gfn: int, npages: int) -> None:
        """Nothing is known of these any more. The cost follows what is known, not the width."""
        end = gfn + npages
        for number in [n for n in self._blocks if n * _BLOCK < end and gfn < (n + 1) * _BLOCK]:
            base = number * _BLOCK
            row = self._blocks[number]
            row[max(gfn - base, 0) : max(min(end - base, _BLOCK), 0)] = _NONE
            if (row == _NONE).all():
                del self._blocks[number]

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
