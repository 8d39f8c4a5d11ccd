# SPDX-License-Identifier: GPL-2.0-or-later
"""The explorer on worlds whose answers are known."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

import pytest

from privfs.testing import explore, replay


@dataclass(frozen=True)
class Lock:
    """Two processes with Peterson's algorithm, whole or with one rule missing."""

    flags: tuple[bool, bool] = (False, False)
    turn: int = 0
    at: tuple[int, int] = (0, 0)  # 0 idle, 1 flag raised, 2 turn given away, 3 inside
    yields: bool = True
    leaves: bool = True

    def events(self) -> Iterable[Hashable]:
        for who in (0, 1):
            if self.at[who] < 2 or (self.at[who] == 3 and self.leaves):
                yield ("go", who)
            elif self.at[who] == 2 and (not self.flags[1 - who] or self.turn == who):
                yield ("enter", who)
        yield ("nonsense", 0)

    def step(self, event: Hashable) -> Lock | None:
        assert isinstance(event, tuple)
        what, who = event
        if what == "nonsense":
            return None
        at = self.at[who]
        flags, turn = list(self.flags), self.turn
        if at == 0:
            flags[who] = True
        elif at == 1 and self.yields:
            turn = 1 - who
        elif at == 1:
            turn = who
        elif at == 3:
            flags[who] = False
        positions = list(self.at)
        positions[who] = (at + 1) % 4
        return replace(self, flags=(flags[0], flags[1]), turn=turn, at=(positions[0], positions[1]))

    def key(self) -> Hashable:
        return self.flags, self.turn, self.at

    def violations(self) -> str | None:
        return "both inside" if self.at == (3, 3) else None


def test_a_correct_world_is_explored_whole() -> None:
    report = explore(Lock(), goal=lambda w: w.at == (0, 0))
    assert report.problem is None
    assert report.trace is None
    assert report.complete
    assert report.stuck == 0
    assert (report.states, report.goals) == (20, 2)
    assert report.script() == "no counterexample"
    assert "20 states" in str(report)


def test_a_counterexample_is_a_shortest_one_and_can_be_replayed() -> None:
    broken = Lock(yields=False)
    report = explore(broken)
    assert report.problem == "both inside"
    assert report.trace is not None
    assert len(report.trace) == 6
    assert replay(broken, report.trace).violations() == "both inside"
    assert "  6  ('enter', " in str(report)
    assert str(report).endswith("→ both inside")


def test_a_script_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"event 2 of 2, \('enter', 0\): cannot happen here"):
        replay(Lock(), [("go", 0), ("enter", 0)])
    with pytest.raises(ValueError, match="leads out of this world"):
        replay(Lock(), [("nonsense", 0)])


def test_states_that_cannot_reach_the_goal_are_found() -> None:
    stubborn = Lock(leaves=False)
    report = explore(stubborn, goal=lambda w: w.at == (0, 0))
    assert report.problem is not None
    assert "stuck" in report.problem
    assert report.trace is not None
    assert len(report.trace) == 1  # whoever raises its flag never comes back
    assert report.stuck == report.states - report.goals


def test_liveness_does_not_rely_on_unfair_events() -> None:
    assert explore(Lock(), goal=lambda w: w.at == (0, 0)).stuck == 0
    report = explore(Lock(), goal=lambda w: w.at == (0, 0), fair=lambda e: e != ("go", 1))
    assert report.stuck > 0
    assert report.trace == (("go", 1),)


@dataclass(frozen=True)
class Counter:
    """Counts without end; ``mine`` is where it blows up."""

    value: int = 0
    mine: int = -1

    def events(self) -> Iterable[Hashable]:
        return [1, 2]

    def step(self, event: Hashable) -> Counter | None:
        assert isinstance(event, int)
        if self.value + event == self.mine:
            raise RuntimeError(f"boom at {self.mine}")
        return Counter(self.value + event, self.mine)

    def key(self) -> Hashable:
        return self.value

    def violations(self) -> str | None:
        return "unlucky" if self.value == 13 and self.mine < 0 else None


def test_a_crash_is_a_counterexample() -> None:
    report = explore(Counter(mine=5))
    assert report.problem == "RuntimeError: boom at 5"
    assert report.trace is not None
    assert (len(report.trace), sum(report.trace)) == (3, 5)  # type: ignore[arg-type]


def test_the_first_state_is_judged_too() -> None:
    report = explore(Counter(13))
    assert (report.problem, report.trace) == ("unlucky", ())


def test_a_bound_ends_the_search_and_claims_nothing() -> None:
    report = explore(Counter(100), max_states=50, goal=lambda w: w.value == 7)
    assert not report.complete
    assert report.states <= 52
    assert (report.problem, report.stuck) == (None, 0)
    assert "not all of them" in str(report)
