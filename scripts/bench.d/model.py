# SPDX-License-Identifier: GPL-2.0-or-later
"""What a benchmark measures, as values: samples, rounds, rows, and the ratio to the C floor.

A *side* is ours or the rival's.  A *row* is one line of the report: both sides of one thing, on one
placement.  Times are nanoseconds, rates are events in a second.
"""

from __future__ import annotations

import enum
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path


class Unavailable(Exception):
    """A side cannot run here; the text says why and what to do."""


class Unit(enum.Enum):
    """What a sample counts: its name in the report and how many raw units make one."""

    MICROSECONDS = ("µs", 1e3)
    MILLISECONDS = ("ms", 1e6)
    INVALIDATIONS = ("1000 invalidations/s", 1e3)
    PAGES = ("1000 pages/s", 1e3)
    INSTRUCTIONS = ("million instructions/s", 1e6)

    @property
    def label(self) -> str:
        """Its name."""
        return self.value[0]

    @property
    def scale(self) -> float:
        """Raw units (ns, events/s) in one."""
        return self.value[1]

    @property
    def is_rate(self) -> bool:
        """Whether more is better."""
        return self not in (Unit.MICROSECONDS, Unit.MILLISECONDS)


@dataclass(frozen=True, slots=True)
class Placement:
    """Who runs where: CPU of the caller (with the user of the memory), CPU of the server."""

    name: str
    caller: int
    server: int


@dataclass(frozen=True, slots=True)
class Counts:
    """How much work one round of one side does."""

    rounds: int
    calls: int
    pages: int
    guest_iterations: int
    native_iterations: int
    resident_gib: int


FULL = Counts(5, 2000, 8192, 20_000_000, 100_000_000, 8)
QUICK = Counts(3, 100, 512, 500_000, 5_000_000, 1)


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one side: the median, and the 99th percentile where single events are timed."""

    p50: float
    p99: float | None = None


Measure = Callable[[], Mapping[str, Sample]]
"""One round; samples by the name of the row."""

Side = Callable[["Bench", Placement], AbstractContextManager[Measure]]
"""Sets up one side, raises Unavailable, takes everything down at the end."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure: ``rows`` are (name of the row, what it is)."""

    name: str
    unit: Unit
    rows: Mapping[str, str]
    ours: Side
    rival: Side
    rival_name: str
    placements: tuple[str, ...] = ("same", "split")


@dataclass(frozen=True, slots=True)
class Bench:
    """What every side may use: a directory that vanishes, the C programs, how much to do.

    ``leaving`` has the status to end with once a signal came.
    """

    scratch: Path
    floors: Path
    counts: Counts
    leaving: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Summary:
    """All rounds of one side.  ``note`` says why there are none."""

    rounds: tuple[Sample, ...]
    note: str = ""

    @property
    def p50(self) -> float | None:
        """Median of the rounds' medians."""
        return statistics.median(s.p50 for s in self.rounds) if self.rounds else None

    @property
    def p99(self) -> float | None:
        """Median of the rounds' 99th percentiles."""
        found = [s.p99 for s in self.rounds if s.p99 is not None]
        return statistics.median(found) if found else None

    @property
    def lowest(self) -> float | None:
        """Lowest median of a round."""
        return min((s.p50 for s in self.rounds), default=None)

    @property
    def highest(self) -> float | None:
        """Highest median of a round."""
        return max((s.p50 for s in self.rounds), default=None)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report."""

    case: str
    row: str
    what: str
    unit: Unit
    placement: Placement
    rival_name: str
    ours: Summary
    rival: Summary

    @property
    def ratio(self) -> float | None:
        """How many times as long ours takes as the rival: median of the rounds' own ratios.

        The two sides of a round run one after the other, so that a drift of the machine hits both.
        """
        pairs = list(zip(self.ours.rounds, self.rival.rounds, strict=False))
        ratios = [(b.p50 / a.p50) if self.unit.is_rate else (a.p50 / b.p50) for a, b in pairs]
        return statistics.median(ratios) if ratios else None
