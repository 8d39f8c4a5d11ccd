# SPDX-License-Identifier: GPL-2.0-or-later
"""Rounds of a case, ours and the rival's in turn, so that a drift of the machine hits both."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator

from model import Bench, Case, Measure, Placement, Row, Sample, Side, Summary, Unavailable

_FAILURES = (OSError, subprocess.SubprocessError, json.JSONDecodeError, KeyError)


class _Contender:
    """One side of a case: its rounds so far, or why it has none."""

    def __init__(self, case: Case) -> None:
        self.rounds: dict[str, list[Sample]] = {row: [] for row in case.rows}
        self.note = ""
        self._measure: Measure | None = None

    def enter(
        self, side: Side, bench: Bench, placement: Placement, stack: contextlib.ExitStack
    ) -> None:
        with self._noting():
            self._measure = stack.enter_context(side(bench, placement))

    def round(self) -> None:
        """Measure once, unless an earlier round failed."""
        if self._measure is None or self.note:
            return
        with self._noting():
            for row, sample in self._measure().items():
                self.rounds[row].append(sample)

    def summary(self, row: str) -> Summary:
        return Summary(tuple(self.rounds[row]), self.note)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except Unavailable as error:
            self.note = str(error)
        except _FAILURES as error:
            self.note = f"{type(error).__name__}: {error}"


def run(case: Case, placement: Placement, bench: Bench) -> list[Row]:
    """Measure a case on one placement.  What fails is a note in its rows, never an exception."""
    ours, rival = _Contender(case), _Contender(case)
    with contextlib.ExitStack() as stack:
        ours.enter(case.ours, bench, placement, stack)
        rival.enter(case.rival, bench, placement, stack)
        for _ in range(bench.counts.rounds):
            for side in (ours, rival):
                if bench.leaving:  # raised where Python ignores it: in a destructor, around a fork
                    raise SystemExit(bench.leaving[0])
                side.round()
    return [
        Row(
            case.name, row, what, case.unit, placement, case.rival_name,
            ours.summary(row), rival.summary(row),
        )
        for row, what in case.rows.items()
    ]  # fmt: skip
