# SPDX-License-Identifier: GPL-2.0-or-later
"""The report: a table for people, a JSON object for programs.

:func:`as_json` is the format; docs/benchmarks.md describes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from machine import Facts
from model import Counts, Placement, Row, Summary, Unit

SCHEMA = 1
_DASH = "–"
_TITLES = {
    Unit.MICROSECONDS: "What a caller waits for",
    Unit.MILLISECONDS: "Whole files",
    Unit.INVALIDATIONS: "What one owner gets through",
    Unit.PAGES: "Guest memory",
    Unit.INSTRUCTIONS: "Guest instructions",
}


def header(facts: Facts, placements: Sequence[Placement], counts: Counts) -> Iterator[str]:
    """Say where, when, how."""
    kind = "virtual machine" if facts.virtual else "machine"
    yield f"{facts.date}  {facts.processor}, {facts.cpus} CPUs, {facts.memory_gib} GiB, {kind}"
    yield ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    load = " ".join(f"{value:.2f}" for value in facts.load)
    yield f"load average {load}; {facts.busy:.0%} of the machine's time in use before"
    for place in placements:
        yield f"{place.name}: caller and user on CPU {place.caller}, server on CPU {place.server}"
    yield (
        f"{counts.rounds} rounds, ours and the rival's in turn; {counts.calls} calls, "
        f"{counts.pages} pages a round"
    )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Return aligned lines, one block for each unit."""
    for unit in Unit:
        block = [row for row in rows if row.unit is unit]
        if not block:
            continue
        yield ""
        yield f"{_TITLES[unit]}, {unit.label} ({'more' if unit.is_rate else 'less'} is better)"
        head = ["CASE", "PLACEMENT", "privfs", "p99", "low–high", "C", "p99", "low–high", "TIMES C"]
        cells = [head, *(_cells(row) for row in block)]
        if all(line[3] == line[6] == _DASH for line in cells[1:]):  # nothing timed one by one
            cells = [[*line[:3], *line[4:6], *line[7:]] for line in cells]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            texts = [
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            yield "  ".join(texts).rstrip()
    yield from _notes(rows)


def _cells(row: Row) -> list[str]:
    cells = [row.row, row.placement.name]
    for side in (row.ours, row.rival):
        cells += [_number(side.p50, row.unit), _number(side.p99, row.unit), _spread(side, row.unit)]
    return [*cells, _DASH if row.ratio is None else f"{row.ratio:.2f}"]


def _number(value: float | None, unit: Unit) -> str:
    if value is None:
        return _DASH
    scaled = value / unit.scale
    return f"{scaled:.0f}" if scaled >= 1000 else f"{scaled:.1f}"


def _spread(side: Summary, unit: Unit) -> str:
    if side.lowest is None:
        return _DASH
    return f"{_number(side.lowest, unit)}–{_number(side.highest, unit)}"


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, side in (("privfs", row.ours), (row.rival_name, row.rival)):
            if side.note:
                found.setdefault(f"{name}: {side.note}", []).append(
                    f"{row.row} ({row.placement.name})"
                )
    if found:
        yield ""
        yield "Not measured, or not to the end:"
    for text, where in found.items():
        yield f"  {text}"
        yield f"    {', '.join(where)}"


def as_json(
    facts: Facts, placements: Sequence[Placement], counts: Counts, rows: Sequence[Row]
) -> dict[str, Any]:
    """Return the whole report; times in ns, rates in events a second."""
    return {
        "schema": SCHEMA,
        "machine": asdict(facts),
        "warnings": facts.warnings(),
        "counts": asdict(counts),
        "placements": {p.name: {"caller": p.caller, "server": p.server} for p in placements},
        "rows": [_row_json(row) for row in rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "case": row.case,
        "row": row.row,
        "what": row.what,
        "unit": "per_second" if row.unit.is_rate else "ns",
        "placement": row.placement.name,
        "privfs": _side_json(row.ours),
        "rival": {"name": row.rival_name} | _side_json(row.rival),
        "times_c": row.ratio,
    }


def _side_json(side: Summary) -> dict[str, Any]:
    return {
        "p50": side.p50,
        "p99": side.p99,
        "rounds": [{"p50": s.p50, "p99": s.p99} for s in side.rounds],
        "note": side.note,
    }
