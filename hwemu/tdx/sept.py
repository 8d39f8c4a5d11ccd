# SPDX-License-Identifier: GPL-2.0-or-later
"""A Secure EPT: tables of 512 entries in pages that the PAMT calls EPT, and the walk.

The root lies in one of the TD's TDCX pages. The content of a table page is kept here, out of the
host's reach, as an array of 512 words; `hwemu.tdx.entry` says what a word means. Levels of entries
are those of the pages they map: 0 (PT, 4 KiB), 1 (PD, 2 MiB), 2 (PDPT, 1 GiB), 3 (PML4), 4 (PML5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from hwemu.tdx.entry import (
    HPA,
    LEAVES,
    RWX,
    STATE_MASK,
    SeptState,
    decode,
    encode,
    free_table_word,
    hpa_of,
)
from hwemu.tdx.pamt import ENTRIES, PAGE_SHIFT

Table = npt.NDArray[np.uint64]
_FREE: Final = free_table_word()
_STEPS: Final = np.arange(ENTRIES, dtype=np.uint64)


@dataclass(slots=True)
class Walk:
    """Where a walk ended: an entry of ``level`` in ``table``; ``word`` as it was read."""

    table: Table
    index: int
    level: int
    word: int

    @property
    def state(self) -> SeptState:
        """The state of the entry."""
        return decode(self.word)

    def store(self, word: int) -> None:
        """Replace the entry."""
        self.table[self.index] = word
        self.word = word


class Columns(NamedTuple):
    """Entries of pages in a row, an element a page of 4 KiB: a copy.

    ``state`` uint8 of `SeptState`, ``level`` uint8 of the entry where the walk of the page ended,
    ``hpa`` int64 of the page in bytes, -1 where the entry is of none.
    """

    state: npt.NDArray[np.uint8]
    level: npt.NDArray[np.uint8]
    hpa: npt.NDArray[np.int64]


class Sept:
    """The tables of one TD; ``top`` is the level of the root's entries (4 with five levels)."""

    def __init__(self, root: int, top: int) -> None:
        self.root = root
        self.top = top
        self._tables: dict[int, Table] = {root: np.full(ENTRIES, _FREE, np.uint64)}

    def walk(self, gpa: int, level: int) -> Walk:
        """Go down to the entry of ``level`` for ``gpa``, or to what stops the walk above it.

        The walk goes through entries with rights that are no leaves (``secure_ept_walk``).
        """
        table = self._tables[self.root]
        page = gpa >> PAGE_SHIFT
        at = self.top
        while True:
            index = page >> 9 * at & 511
            word = int(table[index])
            if at == level or not word & RWX or decode(word) in LEAVES:
                return Walk(table, index, at, word)
            table = self._tables[hpa_of(word, at)]
            at -= 1

    def add(self, hpa: int) -> None:
        """The page at ``hpa`` becomes a table of FREE entries."""
        self._tables[hpa] = np.full(ENTRIES, _FREE, np.uint64)

    def drop(self, hpa: int) -> None:
        """The page at ``hpa`` is no table any more."""
        del self._tables[hpa]

    def table(self, hpa: int) -> Table:
        """Return the table in the page at ``hpa``."""
        return self._tables[hpa]

    def is_empty(self, hpa: int) -> bool:
        """Whether every entry of the table at ``hpa`` is FREE."""
        return bool((self._tables[hpa] == np.uint64(_FREE)).all())

    def fill(self, hpa: int, level: int, word: int) -> None:
        """Make the table at ``hpa`` 512 leaves of ``level``, of which ``word`` is the first."""
        step = np.uint64(1 << PAGE_SHIFT + 9 * level)
        self._tables[hpa] = np.uint64(word) + _STEPS * step

    def uniform(self, hpa: int, level: int) -> int | None:
        """Return the first of 512 leaves of ``level`` that map one aligned run in one state.

        None if they do not, or are not MAPPED or PENDING (``is_sept_page_valid_for_merge``). A
        run of PENDING leaves of 2 MiB in which one is partly accepted counts all the same.
        """
        table = self._tables[hpa]
        first = int(table[0])
        state = decode(first)
        if state not in (SeptState.MAPPED, SeptState.PENDING):
            return None
        start = hpa_of(first, level)
        words = table
        if state is SeptState.PENDING and level == 1:
            first = first & ~0x1FF000
            words = table & np.uint64(~0x1FF000 & (1 << 64) - 1)
        if start % (1 << PAGE_SHIFT + 9 * (level + 1)):
            return None
        step = np.uint64(1 << PAGE_SHIFT + 9 * level)
        return first if bool((words == np.uint64(first) + _STEPS * step).all()) else None

    def pages(self) -> tuple[int, ...]:
        """Addresses of all tables, the root first."""
        return tuple(self._tables)

    def leaves(self) -> list[tuple[int, int, int, SeptState]]:
        """Every entry that is not FREE and no table: (gpa, level, hpa, state), in order of gpa."""
        found: list[tuple[int, int, int, SeptState]] = []
        self._collect(self.root, self.top, 0, found)
        return found

    def _collect(
        self, hpa: int, level: int, base: int, found: list[tuple[int, int, int, SeptState]]
    ) -> None:
        table = self._tables[hpa]
        for index in np.flatnonzero(table != np.uint64(_FREE)).tolist():
            word = int(table[index])
            state = decode(word)
            gpa = base + (index << PAGE_SHIFT + 9 * level)
            if state in (SeptState.NL_MAPPED, SeptState.NL_BLOCKED):
                self._collect(hpa_of(word, level), level - 1, gpa, found)
            else:
                found.append((gpa, level, hpa_of(word, level), state))

    def columns(self, gfn: int, npages: int) -> Columns:
        """The entries of gfns [gfn, gfn + npages): the cost follows tables and width."""
        found = Columns(
            np.full(npages, SeptState.FREE, np.uint8),
            np.full(npages, self.top, np.uint8),
            np.full(npages, -1, np.int64),
        )
        self._copy(self.root, self.top, 0, gfn, gfn + npages, found)
        return found

    def _copy(self, table: int, level: int, base: int, start: int, end: int, into: Columns) -> None:
        """Copy the entries of gfns [start, end) below ``table``, whose first is of ``base``."""
        row, shift = self._tables[table], 9 * level
        first = max(start - base, 0) >> shift
        last = min((end - base + (1 << shift) - 1) >> shift, ENTRIES)
        kinds, which = np.unique(row[first:last] & np.uint64(STATE_MASK), return_inverse=True)
        states = np.array([decode(int(kind)) for kind in kinds], np.uint8)[which]
        if level == 0:
            here = slice(base + first - start, base + last - start)
            words = (row[first:last] & np.uint64(HPA)).astype(np.int64)
            into.state[here], into.level[here] = states, 0
            into.hpa[here] = np.where(states >= SeptState.MAPPED, words, -1)
            return
        for index, number in zip(range(first, last), states.tolist(), strict=True):
            word, state, span = int(row[index]), SeptState(number), base + (index << shift)
            if state is SeptState.NL_MAPPED:
                self._copy(hpa_of(word, level), level - 1, span, start, end, into)
                continue
            lower, upper = max(start, span), min(end, span + (1 << shift))
            here = slice(lower - start, upper - start)
            into.state[here], into.level[here] = state, level
            if state in LEAVES:
                into.hpa[here] = hpa_of(word, level) + (
                    np.arange(lower, upper, dtype=np.int64) - span << PAGE_SHIFT
                )

    def set_state(self, gpa: int, level: int, state: SeptState) -> None:
        """Give the entry at ``gpa`` another state and keep its page: to load what was saved.

        Nothing is checked but that the entry is there and stays a leaf, a table or neither.
        """
        at = self.walk(gpa, level)
        if at.level != level or (at.state in LEAVES) != (state in LEAVES):
            raise ValueError(f"S-EPT entry of gpa {gpa:#x}, level {level}: {at.state} to {state}")
        at.store(encode(state, hpa_of(at.word, level)))

    def key(self) -> tuple[object, ...]:
        """A hashable value equal for trees that behave alike."""
        return tuple(
            (hpa, tuple((row, int(table[row])) for row in np.flatnonzero(table != _FREE).tolist()))
            for hpa, table in sorted(self._tables.items())
        )

    def copy(self) -> Sept:
        """An independent copy."""
        other = Sept.__new__(Sept)
        other.root, other.top = self.root, self.top
        other._tables = {hpa: table.copy() for hpa, table in self._tables.items()}
        return other
