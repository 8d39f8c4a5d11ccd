# SPDX-License-Identifier: GPL-2.0-or-later
"""What is remarkable about a page: one table of marks, each with its test over columns.

Some are moments of an ordinary life (memory that the guest has not accepted yet); those with
``wrong`` must never be seen: hardware would fault, or somebody reaches what is not his.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from hwemu.npt import PAGE_SIZE
from kvmsim.views.columns import Bools, Columns, Holder, Vocabulary

_GROUP: Final = 512


class Odd(enum.IntFlag):
    """Marks, as bits."""

    PENDING = enum.auto()
    BLOCKED = enum.auto()
    NO_PAGE = enum.auto()
    STALE = enum.auto()
    SMALL = enum.auto()
    NOBODY = enum.auto()
    ANOTHER = enum.auto()
    FORBIDDEN = enum.auto()
    ELSEWHERE = enum.auto()
    TOO_LARGE = enum.auto()
    WRONG_TYPE = enum.auto()
    UNREACHABLE = enum.auto()
    TWICE = enum.auto()
    NO_SLOT = enum.auto()


@dataclass(frozen=True, slots=True)
class Mark:
    """One mark: how it is called, what it means, and where by-gpa columns show it."""

    odd: Odd
    name: str
    meaning: str
    wrong: bool = False
    found: Callable[[Columns, Vocabulary], Bools] | None = None


def _in(columns: Columns, states: frozenset[int]) -> Bools:
    return np.isin(columns.entry.state, tuple(states))


def _no_page(columns: Columns, words: Vocabulary) -> Bools:
    found: Bools = columns.private & ~columns.page
    return found if columns.typed else np.zeros(len(columns), np.bool_)


def _stale(columns: Columns, words: Vocabulary) -> Bools:
    if columns.whole or not columns.typed:
        return np.zeros(len(columns), np.bool_)
    return ~columns.private & columns.page


def _small(columns: Columns, words: Vocabulary) -> Bools:
    """Aligned groups of 512 small entries of one state over 2 MiB of frames in order."""
    found = np.zeros(len(columns), np.bool_)
    before = -columns.first % _GROUP
    groups = max(len(columns) - before, 0) // _GROUP
    if not groups:
        return found
    part = slice(before, before + groups * _GROUP)
    entry = columns.entry
    state, level, hpa = (
        column[part].reshape(groups, _GROUP) for column in (entry.state, entry.level, entry.hpa)
    )
    whole = (level == 1).all(axis=1) & (state == state[:, :1]).all(axis=1)
    whole &= hpa[:, 0] % (_GROUP * PAGE_SIZE) == 0
    whole &= (np.diff(hpa, axis=1) == PAGE_SIZE).all(axis=1)
    found[part] = np.repeat(whole, _GROUP)
    return found


def _wrong_type(columns: Columns, words: Vocabulary) -> Bools:
    if not columns.sided:
        return np.zeros(len(columns), np.bool_)
    private: Bools = (columns.leaf.level > 0) & ~columns.private
    shared: Bools = (columns.shared.level > 0) & columns.private
    found: Bools = private | shared
    return found


def _held(columns: Columns, holder: Holder) -> Bools:
    found: Bools = columns.entry.holder == holder
    return found


def _forbidden(columns: Columns, words: Vocabulary) -> Bools:
    found: Bools = (columns.leaf.level > 0) & ~_in(columns, words.mapped)
    return found


def _elsewhere(columns: Columns, words: Vocabulary) -> Bools:
    both = (columns.leaf.hpa >= 0) & (columns.entry.hpa >= 0)
    found: Bools = both & (columns.leaf.hpa != columns.entry.hpa)
    return np.zeros(len(columns), np.bool_) if columns.shadowed else found


def _too_large(columns: Columns, words: Vocabulary) -> Bools:
    both = (columns.leaf.level > 0) & (columns.entry.level > 0)
    found: Bools = both & (columns.leaf.level > columns.entry.level)
    return found if words.sized else np.zeros(len(columns), np.bool_)


MARKS: Final = (
    Mark(Odd.PENDING, "not accepted",
         "the guest's by the table, and not accepted or validated by it: PENDING, Guest-Invalid",
         found=lambda columns, words: _in(columns, words.pending)),
    Mark(Odd.BLOCKED, "blocked", "on its way out of the table, or lent to firmware: BLOCKED, Pre-*",
         found=lambda columns, words: _in(columns, words.blocked)),
    Mark(Odd.NO_PAGE, "no page", "private by attribute, and the file has no page there",
         found=_no_page),
    Mark(Odd.STALE, "stale", "the private file holds a page, and the attribute says shared",
         found=_stale),
    Mark(Odd.SMALL, "4K in 2M",
         "entries of 4 KiB where all 512 are alike and one of 2 MiB could stand", found=_small),
    Mark(Odd.NOBODY, "nobody's", "the guest's entry or leaf leads to a frame that is the host's",
         True, lambda columns, words: _held(columns, Holder.HOST)),
    Mark(Odd.ANOTHER, "another's",
         "the guest's entry or leaf leads to a frame that is another guest's, or firmware's",
         True, lambda columns, words: _held(columns, Holder.OTHER)),
    Mark(Odd.FORBIDDEN, "forbidden", "mapped by the second stage where the table forbids it",
         True, _forbidden),
    Mark(Odd.ELSEWHERE, "elsewhere", "the second stage leads to another frame than the table",
         True, _elsewhere),
    Mark(Odd.TOO_LARGE, "too large", "the leaf is larger than the entry", True, _too_large),
    Mark(Odd.WRONG_TYPE, "wrong type", "mapped on the side that the attribute does not name",
         True, _wrong_type),
    Mark(Odd.UNREACHABLE, "unreachable", "a frame is the guest's, and no entry leads to it", True),
    Mark(Odd.TWICE, "twice", "two frames are the guest's at one gpa", True),
    Mark(Odd.NO_SLOT, "no slot", "a frame is the guest's where it has no memory", True),
)  # fmt: skip
#: These need a technology's table to compare with.
_OF_TABLES: Final = (Odd.NOBODY | Odd.ANOTHER | Odd.FORBIDDEN | Odd.ELSEWHERE | Odd.TOO_LARGE
                     | Odd.PENDING | Odd.BLOCKED | Odd.SMALL)  # fmt: skip


def mark(columns: Columns, words: Vocabulary) -> None:
    """Fill in ``columns.odd``."""
    columns.odd = np.zeros(len(columns), np.int64)
    for one in MARKS:
        if one.found is not None and (words.names or not one.odd & _OF_TABLES):
            columns.odd[one.found(columns, words)] |= int(one.odd)


def names(odd: int) -> list[str]:
    """The marks of a mask by name, in the order of the table."""
    return [one.name for one in MARKS if odd & one.odd]


def is_wrong(name: str) -> bool:
    """Whether a mark must never be seen."""
    return any(one.wrong for one in MARKS if one.name == name)
