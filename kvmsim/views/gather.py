# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables of a running VM as rows: copied in pieces under its lock, made into words outside.

The owners of files are asked first, with no lock held. A piece is what one instant of the VM was;
the whole is that only while nothing changes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from kvmsim.memoryuse import types_of
from kvmsim.memslot import Memslot
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SHIFT, KvmError
from kvmsim.views.columns import (
    PLAIN,
    Columns,
    Holder,
    Tables,
    Words,
    clipped,
    no_entries,
    no_leaves,
)
from kvmsim.views.odd import mark
from kvmsim.views.rows import BY_FRAME, SHAPES, FrameRows, TableRows

CHUNK: Final = 1 << 18
"""Pages that are copied at a time: 1 GiB."""
COMMON: Final = ("all", "attributes", "stage2")


@runtime_checkable
class _Telling(Protocol):
    """A guard that can tell of its tables."""

    def tables(self) -> Tables:
        """What they say."""


def vm_tables(running: RunningVm, table: str, start: int, end: int) -> dict[str, Any]:
    """Return what ``kvmsim map`` shows of gpas [start, end): rows of ``table``, sums of marks.

    From a thread that may wait. KvmError(EINVAL) if the VM has no such table or the range is
    empty, LinkError if an owner does not answer.
    """
    guard: object = running.guard
    tables = guard.tables() if isinstance(guard, _Telling) else None
    words = PLAIN if tables is None else tables.words
    known = (*COMMON, *words.tables)
    if table not in known:
        why = f"it is of kind {running.vm.kind.name} and has {', '.join(known)}"
        raise KvmError(errno.EINVAL, f"map of table {table!r}", why)
    if start >= end:
        raise KvmError(errno.EINVAL, "map", "the range is empty", start=start, size=0)
    if tables is not None:
        tables.prepare()
    reached: list[Words] = []
    rows = TableRows(table if table in SHAPES else "all", words)
    first, last = start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)
    whole = table in BY_FRAME  # which frames no entry leads to is known when all are seen
    for columns in _columns(running, tables, *((0, 1 << 52) if whole else (first, last))):
        mark(columns, words)
        reached.append(columns.entry.hpa[columns.entry.hpa >= 0])
        rows.add(columns)
    found = rows.rows()
    if table in BY_FRAME and tables is not None:
        found = _by_frame(running, tables, table, start, end, reached)
    return {
        "technology": words.technology or None,
        "tables": list(known),
        "table": table,
        "rows": found,
        "odd": _sums(found),
    }


def _by_frame(
    running: RunningVm, tables: Tables, table: str, start: int, end: int, reached: list[Words]
) -> list[dict[str, Any]]:
    with running.lock:
        slots = [(slot.base_gfn, slot.end_gfn) for slot in running.vm.mmu.slots]
    known = np.sort(np.concatenate(reached)) if reached else np.zeros(0, np.int64)
    rows = FrameRows(tables.frame_words)
    for frames in tables.frames(table, known, slots):
        rows.add(frames, start, end)
    return rows.rows()


def _sums(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes by mark."""
    found: dict[str, int] = {}
    for row in rows:
        for name in row.get("odd", ()):
            found[name] = found.get(name, 0) + row["end"] - row["start"]
    return found


def _columns(running: RunningVm, tables: Tables | None, first: int, last: int) -> Iterator[Columns]:
    """The pages of slots in gfns [first, last), chunk by chunk, in order of gfn."""
    with running.lock:
        slots = sorted(running.vm.mmu.slots, key=lambda slot: slot.base_gfn)
    for slot in slots:
        start, end = max(first, slot.base_gfn), min(last, slot.end_gfn)
        if start >= end:
            continue
        held: list[tuple[int, int]] = []
        if slot.file is not None:
            runs = running.private.runs(slot.file, slot.private_page(start),
                                        slot.private_page(end))  # fmt: skip
            held = [(slot.private_gfn(low), slot.private_gfn(high)) for low, high in runs]
        while start < end:
            stop = min(end, (start // CHUNK + 1) * CHUNK)
            with running.lock:
                if running.vm.mmu.slots.find(start) is not slot:
                    break  # deleted meanwhile
                columns = _chunk(running, tables, slot, start, stop)
            here = [(max(low, start) - start, min(high, stop) - start)
                    for low, high in held if low < stop and high > start]  # fmt: skip
            columns.page = clipped(stop - start, here)
            columns.page |= columns.entry.holder == Holder.GUEST  # newer than the owner's answer
            if columns.sided:
                columns.page |= columns.leaf.level > 0
            elif slot.file is not None:
                columns.page |= (columns.leaf.level > 0) & (columns.private | slot.whole)
            yield columns
            start = stop


def _chunk(
    running: RunningVm, tables: Tables | None, slot: Memslot, start: int, end: int
) -> Columns:
    """Copy what the VM knows of gfns [start, end) of a slot (lock held)."""
    mmu, npages = running.vm.mmu, end - start
    kind = mmu.kind
    sided = len(kind.halves) == 2
    private = clipped(npages, [
        (span.start - start, span.end - start)
        for span, is_private in types_of(mmu, slot, start, end) if is_private
    ])  # fmt: skip
    stage2, gpa = running.stage2, start << PAGE_SHIFT
    leaf = stage2.columns(gpa | kind.halves[0], npages)
    shared = stage2.columns(gpa | kind.halves[1], npages) if sided else no_leaves(npages)
    entry = no_entries(npages) if tables is None else tables.entries(start, leaf)
    return Columns(
        start, slot.id, private, np.zeros(npages, np.bool_), leaf, shared, entry,
        typed=slot.file is not None, sided=sided, whole=slot.whole,
        shadowed=tables is not None and tables.shadowed,
    )  # fmt: skip
