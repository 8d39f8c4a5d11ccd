# SPDX-License-Identifier: GPL-2.0-or-later
"""Many users, many files: what one owner tells and hears, without FUSE.

The rival tells as many sockets the same and waits for all of them; it frees no page.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count

from model import Bench, Case, Measure, Placement, Sample, Unit
from spawn import ROUND_SECONDS, floor, latency, probe, serving


@dataclass(frozen=True, slots=True)
class _Crowd:
    """``users`` of each of ``files``; invalidations run on ``busy`` of them at the same time."""

    what: str
    users: int
    busy: int
    files: int
    share: float = 1  #: of the calls of a round: those of many users take long, rates want many
    unit: Unit = Unit.MICROSECONDS


_CROWDS = {
    "users_64": _Crowd("INVALIDATE to the 64 users of one file and all their ACKs", 64, 1, 1, 8),
    "files_32": _Crowd(
        "invalidations of 32 files at the same time, 4 users each", 4, 32, 32,
        share=1 / 8, unit=Unit.INVALIDATIONS,
    ),
    "files_10000": _Crowd("INVALIDATE to one user of 10,000 files, and its ACK", 1, 1, 10_000),
}  # fmt: skip
_serial = count(1)


def _calls(bench: Bench, crowd: _Crowd) -> int:
    return max(int(bench.counts.calls / crowd.share), 20)


def _sample(line: bytes, unit: Unit) -> Sample:
    found = json.loads(line)
    return Sample(found["per_second"]) if unit.is_rate else latency(found["round_trip"])


def _ours(row: str, bench: Bench, placement: Placement) -> dict[str, Sample]:
    crowd = _CROWDS[row]
    folder = bench.scratch / f"crowd{next(_serial)}"
    folder.mkdir()
    path = folder / "socket"
    try:
        files = [folder / str(i) for i in range(crowd.files)]
        for file in files:
            file.touch()
        arguments = [path, crowd.users, crowd.busy, _calls(bench, crowd), *files]
        with serving(probe("owner_crowd", *arguments), placement.server, ready=True) as owner:
            command = probe("crowd", path, crowd.users, *files)
            with serving(command, placement.caller, ready=True):
                line = owner.line(ROUND_SECONDS)
    finally:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()
    return {row: _sample(line, crowd.unit)}


def _rival(row: str, bench: Bench, placement: Placement) -> dict[str, Sample]:
    crowd = _CROWDS[row]
    path = bench.scratch / f"crowd{next(_serial)}.socket"
    arguments = [path, crowd.users, crowd.busy, _calls(bench, crowd)]
    command = floor(bench.floors, "crowd_floor", "measure", *arguments)
    with serving(command, placement.server, ready=True) as owner:
        command = floor(bench.floors, "crowd_floor", "users", path, crowd.users)
        with serving(command, placement.caller, ready=True):
            line = owner.line(ROUND_SECONDS)
    return {row: _sample(line, crowd.unit)}


_Round = Callable[[str, Bench, Placement], dict[str, Sample]]


@contextlib.contextmanager
def _side(round: _Round, row: str, bench: Bench, placement: Placement) -> Iterator[Measure]:
    if round is _rival:
        floor(bench.floors, "crowd_floor")
    yield partial(round, row, bench, placement)


CASES = tuple(
    Case(
        row, crowd.unit, {row: crowd.what}, partial(_side, _ours, row), partial(_side, _rival, row),
        "crowd_floor",
    )
    for row, crowd in _CROWDS.items()
)  # fmt: skip
