# SPDX-License-Identifier: GPL-2.0-or-later
"""From columns to ranges of pages that are alike: what a table shows, one row a range.

What a page is goes into one number, whose bits each table takes its own of; neighbours of one
number are one row. Rows are plain values for JSON: addresses and sizes are bytes, half-open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE
from kvmsim.views.columns import NO_STATE, Columns, Frames, Vocabulary, Words
from kvmsim.views.odd import names

Row = dict[str, Any]

#: (shift, width) of what is known of a page.
_FIELDS: Final[Mapping[str, tuple[int, int]]] = {
    "private": (0, 1), "typed": (1, 1), "page": (2, 1), "state": (3, 8), "level": (11, 2),
    "leaf": (13, 2), "leaf_writable": (15, 1), "shared": (16, 2), "shared_writable": (18, 1),
    "odd": (19, 20), "slot": (39, 16),
}  # fmt: skip
SIZES: Final = (None, 4 << 10, 2 << 20, 1 << 30)


def pack(columns: Columns) -> Words:
    """Each page as one number."""
    values: dict[str, Any] = {
        "private": columns.private, "typed": columns.typed, "page": columns.page,
        "state": columns.entry.state, "level": columns.entry.level,
        "leaf": columns.leaf.level, "leaf_writable": columns.leaf.writable,
        "shared": columns.shared.level, "shared_writable": columns.shared.writable,
        "odd": columns.odd, "slot": columns.slot,
    }  # fmt: skip
    found = np.zeros(len(columns), np.int64)
    for name, value in values.items():
        found |= np.asarray(value).astype(np.int64) << _FIELDS[name][0]
    return found


def _mask(names: tuple[str, ...]) -> int:
    mask = 0
    for name in names:
        shift, width = _FIELDS[name]
        mask |= ((1 << width) - 1) << shift
    return mask


def _get(word: int, name: str) -> int:
    shift, width = _FIELDS[name]
    return word >> shift & (1 << width) - 1


def _leaf(word: int, side: str) -> Row | None:
    level = _get(word, side)
    if not level:
        return None
    return {"size": SIZES[level], "rights": "rwx" if _get(word, f"{side}_writable") else "r-x"}


def _type(word: int) -> str:
    return "private" if _get(word, "private") else "shared"


def _entry(word: int, words: Vocabulary) -> Row:
    state = _get(word, "state")
    if state == NO_STATE:
        return {"state": None, "entry_size": None}
    return {"state": words.word(state), "entry_size": SIZES[_get(word, "level")]}


def _odd(word: int) -> Row:
    return {"odd": names(_get(word, "odd"))}


@dataclass(frozen=True, slots=True)
class TableShape:
    """A table by gpa: which fields it shows, which pages, and what addresses must go on."""

    fields: tuple[str, ...]
    row: Callable[[int, Vocabulary], Row]
    shown: Callable[[Columns], Any] = lambda columns: np.ones(len(columns), np.bool_)
    hpa: Callable[[Columns], Words] | None = None


def _side(side: str) -> TableShape:
    name = "leaf" if side == "private" else "shared"
    return TableShape(
        (name, f"{name}_writable", "odd"),
        lambda word, words: {"side": side, **(_leaf(word, name) or {}), **_odd(word)},
        lambda columns: getattr(columns, name).level > 0,
        lambda columns: getattr(columns, name).hpa,
    )


_BY_ENTRY: Final = TableShape(
    ("state", "level", "odd"),
    lambda word, words: _entry(word, words) | _odd(word),
    lambda columns: columns.entry.state != NO_STATE,
    lambda columns: columns.entry.hpa,
)
SHAPES: Final[Mapping[str, tuple[TableShape, ...]]] = {
    "all": (TableShape(
        tuple(_FIELDS),
        lambda word, words: {
            "slot": _get(word, "slot"), "type": _type(word), "page": bool(_get(word, "page")),
            **_entry(word, words), "leaf": _leaf(word, "leaf"), "shared": _leaf(word, "shared"),
            **_odd(word),
        },
    ),),
    "attributes": (TableShape(
        ("private", "slot"),
        lambda word, words: {"slot": _get(word, "slot"), "type": _type(word)},
    ),),
    "stage2": (_side("private"), _side("shared")),
    "sept": (_BY_ENTRY,),
    "pkvm": (_BY_ENTRY,),
}  # fmt: skip
"""Tables by guest-physical address."""

BY_FRAME: Final = ("rmp", "pamt")
"""Tables by host-physical address."""


@dataclass(slots=True)
class Ranges:
    """Ranges as they come, in order; neighbours are one as long as they are alike."""

    rows: list[list[int]] = field(default_factory=list)  #: start, end (pages), word, hpa

    def add(self, first: int, words: Words, hpa: Words | None, shown: Any) -> None:
        """Pages from ``first`` on; ``hpa`` of each, if addresses must go on within a range."""
        cut = np.diff(words) != 0
        cut |= np.diff(np.asarray(shown, np.bool_))
        if hpa is not None:
            cut |= np.diff(hpa) != PAGE_SIZE
        starts = np.concatenate(([0], np.flatnonzero(cut) + 1))
        ends = np.append(starts[1:], len(words))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if not shown[start]:
                continue
            word, at = int(words[start]), -1 if hpa is None else int(hpa[start])
            row = [first + start, first + end, word, at]
            if self.rows and self._goes_on(self.rows[-1], row):
                self.rows[-1][1] = row[1]
            else:
                self.rows.append(row)

    @staticmethod
    def _goes_on(last: list[int], row: list[int]) -> bool:
        if last[1] != row[0] or last[2] != row[2]:
            return False
        return row[3] < 0 or last[3] + (last[1] - last[0]) * PAGE_SIZE == row[3]


class TableRows:
    """The rows of one table by gpa, filled chunk by chunk."""

    def __init__(self, table: str, words: Vocabulary) -> None:
        self._words = words
        self._parts = [(shape, _mask(shape.fields), Ranges()) for shape in SHAPES[table]]

    def add(self, columns: Columns) -> None:
        """Pages behind all that came before."""
        if not len(columns):
            return
        packed = pack(columns)
        for shape, mask, ranges in self._parts:
            hpa = None if shape.hpa is None else shape.hpa(columns)
            ranges.add(columns.first, packed & mask, hpa, shape.shown(columns))

    def rows(self) -> list[Row]:
        """All of them, by gpa."""
        found = []
        for shape, _, ranges in self._parts:
            for start, end, word, hpa in ranges.rows:
                row = {"start": start << PAGE_SHIFT, "end": end << PAGE_SHIFT}
                if hpa >= 0:
                    row["hpa"] = hpa
                found.append(row | shape.row(word, self._words))
        return sorted(found, key=lambda row: row["start"])


class FrameRows:
    """The rows of a table by hpa."""

    def __init__(self, words: Vocabulary) -> None:
        self._words = words
        self._found: list[Row] = []

    def add(self, frames: Frames, start: int, end: int) -> None:
        """Frames behind all that came before; those whose gpa is known and not in [start, end)
        (bytes) are left out.
        """
        inside = (frames.gpa < 0) | (frames.gpa >= start) & (frames.gpa < end)
        hpa, state, level, gpa, odd = (column[inside] for column in frames)
        if not len(hpa):
            return
        cut = (np.diff(hpa) != PAGE_SIZE) | (np.diff(state) != 0) | (np.diff(level) != 0)
        cut |= (np.diff(odd) != 0) | (np.diff(gpa) != np.where(gpa[1:] < 0, 0, PAGE_SIZE))
        starts = np.concatenate(([0], np.flatnonzero(cut) + 1)).tolist()
        for first, last in zip(starts, [*starts[1:], len(hpa)], strict=True):
            self._add({
                "start": int(hpa[first]), "end": int(hpa[last - 1]) + PAGE_SIZE,
                "state": self._words.word(int(state[first])),
                "entry_size": SIZES[int(level[first])],
                "gpa": None if gpa[first] < 0 else int(gpa[first]), "odd": names(int(odd[first])),
            })  # fmt: skip

    def _add(self, row: Row) -> None:
        last = self._found[-1] if self._found else None
        if last is not None and last["end"] == row["start"]:
            goes_on = last["gpa"] is None and row["gpa"] is None
            if not goes_on and None not in (last["gpa"], row["gpa"]):
                goes_on = last["gpa"] + last["end"] - last["start"] == row["gpa"]
            if goes_on and all(last[k] == row[k] for k in ("state", "entry_size", "odd")):
                last["end"] = row["end"]
                return
        self._found.append(row)

    def rows(self) -> list[Row]:
        """All of them, by hpa."""
        return sorted(self._found, key=lambda row: row["start"])
