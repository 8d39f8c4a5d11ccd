# SPDX-License-Identifier: GPL-2.0-or-later
"""Copies of a VM's tables as columns: an element a page, nothing that a lock would guard."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hwemu.leafruns import LeafColumns

Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int64]

NO_STATE: Final = 255
"""The state of a page for which a technology's table has no entry."""

Lock = AbstractContextManager[object]


class Holder(enum.IntEnum):
    """Whose the frame is that an entry or a leaf leads to, as the table of frames says."""

    NONE = 0  #: no frame
    GUEST = 1
    HOST = 2  #: nobody's: the host may write it
    OTHER = 3  #: another guest's, or the firmware's


class Entries(NamedTuple):
    """What a technology's tables say of pages: ``state`` is an index into `Vocabulary.names`.

    ``level`` is 1 for 4 KiB to 3 for 1 GiB, 0 for none; ``hpa`` in bytes, -1 for none; ``holder``
    is a `Holder`.
    """

    state: Bytes
    level: Bytes
    hpa: Words
    holder: Bytes


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A technology's words; the sets are of states."""

    technology: str
    entry: str  #: name of the table by guest-physical address
    tables: tuple[str, ...]  #: what may be asked for by name, beside those that all VMs have
    names: tuple[str, ...] = ()
    mapped: frozenset[int] = frozenset()  #: the second stage may have a leaf
    pending: frozenset[int] = frozenset()  #: the guest's, and not accepted yet
    blocked: frozenset[int] = frozenset()  #: on its way out, or lent to firmware
    sized: bool = True  #: an entry must be as large as the leaf (pKVM: the leaf is the entry)

    def word(self, state: int) -> str:
        """The name of a state, a dash for none."""
        return self.names[state] if state < len(self.names) else "-"


PLAIN: Final = Vocabulary("", "-", ())
"""A VM without confidential hardware."""


class Frames(NamedTuple):
    """Pages of host-physical memory that are a guest's, in order of ``hpa`` (bytes).

    ``gpa`` is -1 where the table does not say it; ``odd`` bits as in `kvmsim.views.odd`.
    """

    hpa: Words
    state: Bytes
    level: Bytes
    gpa: Words
    odd: Words


class Tables(Protocol):
    """The tables of one guest. ``entries`` is called under the VM's lock, the others without.

    Each takes the platform's lock for as long as it copies.
    """

    @property
    def words(self) -> Vocabulary:
        """What the states of entries are called."""

    @property
    def frame_words(self) -> Vocabulary:
        """What those of frames are called."""

    @property
    def shadowed(self) -> bool:
        """Whether leaves lead to plaintext elsewhere, and frames hold ciphertext."""

    def prepare(self) -> None:
        """Find by itself what takes long, in pieces; then pages are asked for."""

    def entries(self, gfn: int, leaves: LeafColumns) -> Entries:
        """Copy the entries of the pages from ``gfn`` on, whose leaves are these."""

    def frames(self, table: str, reached: Words, slots: list[tuple[int, int]]) -> Iterator[Frames]:
        """The guest's frames in the table of that name.

        ``reached`` are the hpas of entries, sorted; ``slots`` the gfns [start, end) of memory.
        """


@dataclass(slots=True)
class Columns:
    """Pages from ``first`` (gfn) on, all of one slot.

    ``private`` is the attribute; ``page`` whether the owner holds one; ``shared`` the leaves of
    the shared side, empty where the second stage has no sides (``sided``); ``whole``: one file
    serves both types; ``shadowed``: leaves lead to plaintext beside the frames.
    """

    first: int
    slot: int
    private: Bools
    page: Bools
    leaf: LeafColumns
    shared: LeafColumns
    entry: Entries
    typed: bool = True
    sided: bool = True
    whole: bool = False
    shadowed: bool = False
    odd: Words = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.private)


def no_leaves(npages: int) -> LeafColumns:
    """Columns in which nothing is mapped."""
    return LeafColumns(
        np.full(npages, -1, np.int64), np.zeros(npages, np.uint8), np.zeros(npages, np.bool_)
    )


def no_entries(npages: int) -> Entries:
    """Columns without an entry."""
    return Entries(
        np.full(npages, NO_STATE, np.uint8),
        np.zeros(npages, np.uint8),
        np.full(npages, -1, np.int64),
        np.zeros(npages, np.uint8),
    )


def clipped(npages: int, runs: list[tuple[int, int]]) -> Bools:
    """True for the pages in these runs [start, end), which are clipped already."""
    found = np.zeros(npages, np.bool_)
    for start, end in runs:
        found[start:end] = True
    return found
