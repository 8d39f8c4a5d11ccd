# SPDX-License-Identifier: GPL-2.0-or-later
"""Breadth-first exploration of small worlds that are made of the code that ships.

A *world* is a value with events: :meth:`World.step` returns the world after one of them and leaves
the old one alone.  :func:`explore` visits every reachable state once and checks

* **safety**: :meth:`World.violations` is None in every state, and no step raises;
* **liveness**, if a goal is given: from every state a goal state can still be reached by fair
  events.  Events that nobody may rely on (a crash, a new request) are not fair; without that,
  killing everybody would always lead to a quiet world.

A counterexample is a shortest one; it prints as a script and :func:`replay` runs it again.
Two states are one if their keys are equal, so a key must hold all that the future depends on.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt


class World(Protocol):
    """A state with its events."""

    def events(self) -> Iterable[Hashable]:
        """Return what can happen now, in an order that depends on the state alone."""
        ...

    def step(self, event: Hashable) -> Self | None:
        """Return the world after ``event``, or None if the test does not care to look there."""
        ...

    def key(self) -> Hashable:
        """Return what distinguishes this state from others."""
        ...

    def violations(self) -> str | None:
        """Return the invariant that is broken here, or None."""
        ...


W = TypeVar("W", bound=World)


@dataclass(frozen=True, slots=True)
class Report:
    """What an exploration found.

    ``problem`` is None if nothing is wrong, else one sentence, and ``trace`` the events that lead
    to it.  ``depth`` is the distance of the farthest state, ``stuck`` the number of states from
    which no goal can be reached; they are counted only if ``complete``.
    """

    states: int
    transitions: int
    depth: int
    goals: int
    stuck: int
    complete: bool
    seconds: float
    problem: str | None = None
    trace: tuple[Hashable, ...] | None = None

    @property
    def rate(self) -> float:
        """States per second."""
        return self.states / self.seconds if self.seconds else float("inf")

    def script(self) -> str:
        """Return the counterexample, one numbered event a line, and what it ends in."""
        if self.trace is None:
            return "no counterexample"
        lines = [f"{number:3}  {event}" for number, event in enumerate(self.trace, 1)]
        return "\n".join([*lines, f"   → {self.problem}"])

    def __str__(self) -> str:
        size = (
            f"{self.states:,} states, {self.transitions:,} transitions, depth {self.depth}, "
            f"{self.seconds:.1f} s ({self.rate:,.0f} states/s)"
        )
        if not self.complete:
            size += ", not all of them"
        return size if self.problem is None else f"{size}\n{self.script()}"


def explore(
    world: W,
    *,
    goal: Callable[[W], bool] | None = None,
    fair: Callable[[Hashable], bool] | None = None,
    max_states: int | None = None,
) -> Report:
    """Visit the states that are reachable from ``world``, the nearest first.

    ``goal`` asks for liveness, ``fair`` says which events it may rely on (all, by default).
    ``max_states`` ends the search early; what has not been expanded counts as live then.
    """
    collecting = gc.isenabled()
    gc.disable()  # values without cycles, by the million: the collector would find nothing
    try:
        return _Search(world, goal, fair).run(max_states)
    finally:
        if collecting:
            gc.enable()


def replay(world: W, trace: Sequence[Hashable]) -> W:
    """Run a script again; raise ValueError where an event cannot happen."""
    for number, event in enumerate(trace, 1):
        if event not in list(world.events()):
            raise ValueError(f"event {number} of {len(trace)}, {event}: cannot happen here")
        after = world.step(event)
        if after is None:
            raise ValueError(f"event {number} of {len(trace)}, {event}: leads out of this world")
        world = after
    return world


class _Search(Generic[W]):
    """States are numbered in the order of their discovery, hence by distance."""

    def __init__(
        self,
        world: W,
        goal: Callable[[W], bool] | None,
        fair: Callable[[Hashable], bool] | None,
    ) -> None:
        self._began = time.perf_counter()
        self._goal = goal
        self._fair = fair
        self._numbers: dict[Hashable, int] = {}
        self._parents = array("q")
        self._events: list[Hashable] = []
        self._live = bytearray()  #: 1 for a goal, and for what was not expanded
        self._sources = array("q")
        self._targets = array("q")
        self._transitions = 0
        self._depth = 0
        self._goals = 0
        self._level: list[W] = []
        self._first = 0  #: number of the first world in the level
        self._add(world, world.key(), -1, None, self._level)

    def run(self, max_states: int | None) -> Report:
        problem = self._level[0].violations()
        if problem is not None:
            return self._report(False, problem, 0)
        while self._level:
            following: list[W] = []
            for offset, world in enumerate(self._level):
                if max_states is not None and len(self._parents) >= max_states:
                    for number in range(self._first + offset, len(self._parents)):
                        self._live[number] = 1
                    return self._liveness(False)
                found = self._expand(world, self._first + offset, following)
                if found is not None:
                    return found
            self._first += len(self._level)
            self._level = following
            self._depth += bool(following)
        return self._liveness(True)

    def _expand(self, world: W, number: int, following: list[W]) -> Report | None:
        numbers, goal, fair = self._numbers, self._goal, self._fair
        for event in world.events():
            try:
                after = world.step(event)
            except Exception as crash:  # of the code under test: that is what we look for
                return self._report(False, f"{type(crash).__name__}: {crash}", number, event)
            if after is None:
                continue
            self._transitions += 1
            key = after.key()
            target = numbers.get(key, -1)
            if target < 0:
                target = self._add(after, key, number, event, following)
                problem = after.violations()
                if problem is not None:
                    return self._report(False, problem, target)
            if goal is not None and target != number and (fair is None or fair(event)):
                self._sources.append(number)
                self._targets.append(target)
        return None

    def _add(self, world: W, key: Hashable, parent: int, event: Hashable, level: list[W]) -> int:
        number = self._numbers[key] = len(self._parents)
        self._parents.append(parent)
        self._events.append(event)
        reached = self._goal is not None and self._goal(world)
        self._live.append(reached)
        self._goals += reached
        level.append(world)
        return number

    def _liveness(self, complete: bool) -> Report:
        """Walk the fair edges backwards from the goals; what is not met is stuck."""
        if self._goal is None:
            return self._report(complete)
        sources: npt.NDArray[np.int64] = np.array(self._sources, dtype=np.int64)
        targets: npt.NDArray[np.int64] = np.array(self._targets, dtype=np.int64)
        live: npt.NDArray[np.bool_] = np.array(self._live, dtype=np.bool_)
        while len(sources):
            dead = ~live[sources]  # the others have nothing left to tell
            sources, targets = sources[dead], targets[dead]
            met = live[targets]
            if not met.any():
                break
            live[sources[met]] = True
        stuck = np.flatnonzero(~live)
        if not len(stuck):
            return self._report(complete)
        problem = "stuck: no fair event leads on to the goal"
        return self._report(complete, problem, int(stuck[0]), stuck=len(stuck))

    def _report(
        self,
        complete: bool,
        problem: str | None = None,
        number: int = -1,
        last: Hashable = None,
        stuck: int = 0,
    ) -> Report:
        trace: list[Hashable] = [] if last is None else [last]
        while number > 0:
            trace.append(self._events[number])
            number = self._parents[number]
        return Report(
            states=len(self._parents),
            transitions=self._transitions,
            depth=self._depth,
            goals=self._goals,
            stuck=stuck,
            complete=complete,
            seconds=time.perf_counter() - self._began,
            problem=problem,
            trace=None if problem is None else tuple(reversed(trace)),
        )
