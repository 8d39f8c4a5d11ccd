# SPDX-License-Identifier: GPL-2.0-or-later
"""The explorer on worlds whose answers are known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import pytest

from privfs.testing import STUCK, Parts, Rows, StepFailed, View, confirm, explore, replay


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
    with pytest.raises(ValueError, match=r"event 1 of 1, \('nonsense', 0\): cannot happen here"):
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


def test_a_crash_can_be_replayed() -> None:
    with pytest.raises(StepFailed, match="crash at 2") as failed:
        replay(Counter(mine=5), [1, 2, 2])
    assert failed.value.problem == "RuntimeError: boom at 5"


def test_the_first_state_is_judged_too() -> None:
    report = explore(Counter(13))
    assert (report.problem, report.trace) == ("unlucky", ())


def test_a_bound_ends_the_search_and_claims_nothing() -> None:
    report = explore(Counter(100), max_states=50, goal=lambda w: w.value == 7)
    assert not report.complete
    assert report.states <= 52
    assert (report.problem, report.stuck) == (None, 0)
    assert "not all of them" in str(report)


class Halving:
    """A system: numbers that are halved, or doubled and one added, below a bound."""

    def __init__(self, start: int, bound: int = 100) -> None:
        self.first, self.bound = start, bound

    def start(self) -> int:
        return self.first

    def successors(self, state: int) -> Iterator[tuple[Hashable, int]]:
        if state % 2 == 0:
            yield "halve", state // 2
        if 2 * state + 1 < self.bound:
            yield "grow", 2 * state + 1
        if state == 13:
            try:
                state // 0
            except ZeroDivisionError as crash:
                raise StepFailed("divide") from crash

    def violation(self, state: int) -> str | None:
        return "unlucky" if state == 7 else None


def test_a_system_is_explored_like_a_world() -> None:
    report = explore(Halving(64), goal=lambda state: state == 1)
    assert (report.problem, report.trace) == ("unlucky", ("halve",) * 6 + ("grow", "grow"))
    assert replay(Halving(64), report.trace) == 7
    report = explore(Halving(52))
    assert (report.problem, report.trace) == (
        "ZeroDivisionError: integer division or modulo by zero",
        ("halve", "halve", "divide"),
    )


def test_a_counterexample_is_confirmed_only_where_it_is_one() -> None:
    trace = explore(Lock(yields=False)).trace
    assert trace is not None
    confirm(Lock(yields=False), trace, "both inside")
    with pytest.raises(AssertionError, match="ends in None, not in 'both inside'"):
        confirm(Lock(), [("go", 0)], "both inside")
    confirm(Counter(mine=5), [1, 2, 2], "RuntimeError: boom at 5")
    with pytest.raises(AssertionError, match="ends in 'RuntimeError: boom at 5'"):
        confirm(Counter(mine=5), [1, 2, 2], "unlucky")
    quiet = Lock(leaves=False), [("go", 0)], STUCK
    confirm(*quiet, goal=lambda world: world.at == (0, 0))
    with pytest.raises(AssertionError, match="the goal can be reached"):
        confirm(Lock(), [("go", 0)], STUCK, goal=lambda world: world.at == (0, 0))
    confirm(Lock(), [("go", 0)], STUCK, goal=lambda world: world.at == (0, 0),
            fair=lambda event: event == ("go", 1))  # fmt: skip


def test_a_counterexample_prints_as_a_program(tmp_path: Path) -> None:
    source = explore(Halving(64)).program(
        "from tests.unit.test_explore import Halving", "Halving(64)"
    )
    assert source.startswith("# unlucky\n")
    root = Path(__file__).parents[2]
    for program, code in ((source, 0), (source.replace("64", "32"), 1)):
        (tmp_path / "program.py").write_text(program)
        done = subprocess.run(
            [sys.executable, tmp_path / "program.py"], env={"PYTHONPATH": str(root)},
            stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
    assert explore(Halving(1, bound=2)).program("", "") == "# no counterexample\n"


class Lamp:
    """A part that counts how often it is really stepped."""

    stepped = 0

    def __init__(self, lit: bool = False) -> None:
        self.lit = lit

    def copy(self) -> Self:
        return type(self)(self.lit)

    def key(self) -> Hashable:
        return self.lit

    def take(self, event: str) -> str:
        type(self).stepped += 1
        self.lit = not self.lit if event == "switch" else self.lit
        return f"{event}: {'on' if self.lit else 'off'}"


def test_parts_are_stepped_once_for_each_state_and_event() -> None:
    Lamp.stepped = 0
    parts: Parts[Lamp] = Parts()
    assert parts.number(Lamp()) == parts.number(Lamp()) == 0
    assert parts.step(0, "switch") == (1, "switch: on")
    assert parts.step(0, "look") == (0, "look: off")
    assert parts.step(1, "switch") == (0, "switch: off")
    for _ in range(3):
        assert parts.step(0, "switch") == (1, "switch: on")
    assert (Lamp.stepped, parts.steps, len(parts)) == (3, 3, 2)
    assert (parts[0].lit, parts[1].lit) == (False, True)


def test_a_view_is_computed_once_for_each_state() -> None:
    parts: Parts[Lamp] = Parts()
    parts.step(parts.number(Lamp()), "switch")
    seen: list[int] = []

    def look(number: int, part: Lamp) -> bool:
        seen.append(number)
        return part.lit

    view = View(parts, look)
    assert [view[1], view[0], view[1]] == [True, False, True]
    assert seen == [1, 0]


def test_rows_that_nothing_has_used_are_known() -> None:
    rows = Rows({"a": 1, "b": 2, "c": 3})
    assert rows["a"] == rows.get("a") == 1
    assert rows.get("d", 4) == 4
    with pytest.raises(KeyError):
        rows["d"]
    assert "b" in rows
    assert rows.get("c") == 3
    assert (rows.used, rows.unused) == ({"a", "c"}, {"b"})
