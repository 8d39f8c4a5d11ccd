# SPDX-License-Identifier: GPL-2.0-or-later
"""Breadth-first exploration of small worlds that are made of the code that ships.

A *world* is a value with events: :meth:`World.step` returns the world after one of them and leaves
the old one alone.  A *system* says the same of states that are plain hashable values, which is
several times faster; :mod:`privfs.testing.parts` helps to build one.  :func:`explore` visits every
reachable state once and checks

* **safety**: no state is a violation, and no step raises;
* **liveness**, if a goal is given: from every state a goal state can still be reached by fair
  events.  Events that nobody may rely on (a crash, a new request) are not fair; without that,
  killing everybody would always lead to a quiet world.

A counterexample is a shortest one; it prints as a script, and as a program for :func:`confirm`.
Two worlds are one state if their keys are equal, so a key must hold all that the future depends on.
  Events must come in an order that depends on the state alone.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, Self, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

STUCK: Final = "stuck: no fair event leads on to the goal"


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
S = TypeVar("S", bound=Hashable)


class System(Protocol[S]):
    """States that are values, and what leads from one to the next."""

    def start(self) -> S:
        """Return the first state."""
        ...

    def successors(self, state: S) -> Iterable[tuple[Hashable, S]]:
        """Return (event, state after it) for all that can happen; :class:`StepFailed` for a crash.

        The order depends on ``state`` alone, and no two events of a state are equal.
        """
        ...

    def violation(self, state: S) -> str | None:
        """Return the invariant that is broken here, or None."""
        ...


class StepFailed(Exception):
    """The code under test raised at ``event``; ``__cause__`` is what."""

    def __init__(self, event: Hashable) -> None:
        super().__init__(f"crash at {event}")
        self.event = event

    @property
    def problem(self) -> str:
        """What was raised, in a line."""
        return f"{type(self.__cause__).__name__}: {self.__cause__}"


@dataclass(frozen=True, slots=True)
class Report:
    """What an exploration found.

    ``problem`` is None if nothing is wrong, else one sentence, and ``trace`` the events that lead
    to it.  ``depth`` is the distance of the farthest state, ``stuck`` the number of states from
    which no goal can be reached; they are counted only if ``complete``.  ``seconds`` are CPU time.
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

    def program(self, imports: str, build: str, goal: str = "None", fair: str = "None") -> str:
        """Return the counterexample as a Python program that ends well if it can be reproduced.

        ``build`` is an expression for the world or the system, ``goal`` and ``fair`` are those of
        :func:`explore`; ``imports`` are the lines that they need.
        """
        if self.trace is None:
            return "# no counterexample\n"
        events = "".join(f"    {event!r},\n" for event in self.trace)
        return (
            f"# {self.problem}\n"
            "from privfs.testing import confirm\n"
            f"{imports.strip()}\n\n"
            f"EVENTS = [\n{events}]\n\n"
            f"confirm({build}, EVENTS, {self.problem!r}, goal={goal}, fair={fair})\n"
        )

    def __str__(self) -> str:
        size = (
            f"{self.states:,} states, {self.transitions:,} transitions, depth {self.depth}, "
            f"{self.seconds:.1f} s ({self.rate:,.0f} states/s)"
        )
        if not self.complete:
            size += ", not all of them"
        return size if self.problem is None else f"{size}\n{self.script()}"


@overload
def explore(
    world: W,
    *,
    goal: Callable[[W], bool] | None = None,
    fair: Callable[[Hashable], bool] | None = None,
    max_states: int | None = None,
) -> Report: ...
@overload
def explore(
    world: System[S],
    *,
    goal: Callable[[S], bool] | None = None,
    fair: Callable[[Hashable], bool] | None = None,
    max_states: int | None = None,
) -> Report: ...
def explore(
    world: Any,
    *,
    goal: Callable[[Any], bool] | None = None,
    fair: Callable[[Hashable], bool] | None = None,
    max_states: int | None = None,
) -> Report:
    """Visit the states that are reachable from ``world``, a world or a system, nearest first.

    ``goal`` asks for liveness, ``fair`` says which events it may rely on (all, by default).
    ``max_states`` ends the search early; what has not been expanded counts as live then.
    """
    collecting = gc.isenabled()
    gc.disable()  # values without cycles, by the million: the collector would find nothing
    try:
        return _Search(_system(world), goal, fair).run(max_states)
    finally:
        if collecting:
            gc.enable()


@overload
def replay(world: W, trace: Sequence[Hashable]) -> W: ...
@overload
def replay(world: System[S], trace: Sequence[Hashable]) -> S: ...
def replay(world: Any, trace: Sequence[Hashable]) -> Any:
    """Run a script again and return the state it ends in.

    ValueError where an event cannot happen; :class:`StepFailed` where the code under test raises.
    """
    system = _system(world)
    state = system.start()
    for number, event in enumerate(trace, 1):
        for possible, after in system.successors(state):
            if possible == event:
                state = after
                break
        else:
            raise ValueError(f"event {number} of {len(trace)}, {event}: cannot happen here")
    return state


def confirm(
    world: Any,
    trace: Sequence[Hashable],
    problem: str,
    *,
    goal: Callable[[Any], bool] | None = None,
    fair: Callable[[Hashable], bool] | None = None,
) -> None:
    """Run a counterexample again; AssertionError unless it ends in ``problem``.

    A state that is stuck is confirmed by walking all that fair events can reach from it.
    """
    system = _system(world)
    found: str | None
    try:
        state = replay(system, trace)
        found = STUCK if problem == STUCK else system.violation(state)
    except StepFailed as crash:
        found = crash.problem
    assert found == problem, f"ends in {found!r}, not in {problem!r}"
    if found != STUCK:
        return
    assert goal is not None, "a stuck state needs the goal that cannot be reached"
    key = getattr(system, "key", _same)
    seen, todo = {key(state)}, [state]
    while todo:
        state = todo.pop()
        assert not goal(state), f"the goal can be reached: {state}"
        for event, after in system.successors(state):
            if (fair is None or fair(event)) and key(after) not in seen:
                seen.add(key(after))
                todo.append(after)


class _Worlds(Generic[W]):
    """A world as a system: its states are worlds, and ``key`` says which are the same."""

    def __init__(self, world: W) -> None:
        self._first = world

    def start(self) -> W:
        return self._first

    def successors(self, state: W) -> Iterator[tuple[Hashable, W]]:
        for event in state.events():
            try:
                after = state.step(event)
            except Exception as crash:  # of the code under test: that is what we look for
                raise StepFailed(event) from crash
            if after is not None:
                yield event, after

    def violation(self, state: W) -> str | None:
        return state.violations()

    def key(self, state: W) -> Hashable:
        return state.key()


def _system(world: Any) -> Any:
    return world if hasattr(world, "successors") else _Worlds(world)


def _same(state: Hashable) -> Hashable:
    return state


class _Search:
    """States are numbered in the order of their discovery, hence by distance."""

    def __init__(
        self,
        system: Any,
        goal: Callable[[Any], bool] | None,
        fair: Callable[[Hashable], bool] | None,
    ) -> None:
        self._began = time.process_time()
        self._system = system
        self._key: Callable[[Any], Hashable] | None = getattr(system, "key", None)
        self._goal = goal
        self._fair = fair
        self._numbers: dict[Hashable, int] = {}
        self._parents = array("q")
        self._choices = array("I")  #: which successor of its parent a state is
        self._live = bytearray()  #: 1 for a goal, and for what was not expanded
        self._sources = array("q")
        self._targets = array("q")
        self._transitions = 0
        self._depth = 0
        self._goals = 0

    def run(self, max_states: int | None) -> Report:
        system = self._system
        start = system.start()
        level: list[Any] = []
        self._add(start, self._key(start) if self._key else start, -1, 0, level)
        problem = system.violation(start)
        if problem is not None:
            return self._report(False, problem, 0)
        number = 0
        while level:
            following: list[Any] = []
            for state in level:
                if max_states is not None and len(self._parents) >= max_states:
                    self._live[number:] = b"\1" * (len(self._parents) - number)
                    return self._liveness(False)
                found = self._expand(state, number, following)
                if found is not None:
                    return found
                number += 1
            level = following
            self._depth += bool(following)
        return self._liveness(True)

    def _expand(self, state: Any, number: int, following: list[Any]) -> Report | None:
        numbers, fair, key_of = self._numbers, self._fair, self._key
        watching = self._goal is not None
        choice = -1
        try:
            for choice, (event, after) in enumerate(self._system.successors(state)):
                key = after if key_of is None else key_of(after)
                target = numbers.get(key, -1)
                if target < 0:
                    target = self._add(after, key, number, choice, following)
                    problem = self._system.violation(after)
                    if problem is not None:
                        self._transitions += choice + 1
                        return self._report(False, problem, target)
                if watching and target != number and (fair is None or fair(event)):
                    self._sources.append(number)
                    self._targets.append(target)
        except StepFailed as crash:
            return self._report(False, crash.problem, number, (crash.event,))
        self._transitions += choice + 1
        return None

    def _add(self, state: Any, key: Hashable, parent: int, choice: int, level: list[Any]) -> int:
        number = self._numbers[key] = len(self._parents)
        self._parents.append(parent)
        self._choices.append(choice)
        reached = self._goal is not None and self._goal(state)
        self._live.append(reached)
        self._goals += reached
        level.append(state)
        return number

    def _liveness(self, complete: bool) -> Report:
        """Walk the fair edges backwards from the goals; what is not met is stuck."""
        if self._goal is None:
            return self._report(complete)
        sources: npt.NDArray[np.int64] = np.asarray(self._sources, dtype=np.int64)
        targets: npt.NDArray[np.int64] = np.asarray(self._targets, dtype=np.int64)
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
        return self._report(complete, STUCK, int(stuck[0]), stuck=len(stuck))

    def _report(
        self,
        complete: bool,
        problem: str | None = None,
        number: int = -1,
        last: tuple[Hashable, ...] = (),
        stuck: int = 0,
    ) -> Report:
        return Report(
            states=len(self._parents),
            transitions=self._transitions,
            depth=self._depth,
            goals=self._goals,
            stuck=stuck,
            complete=complete,
            seconds=time.process_time() - self._began,
            problem=problem,
            trace=None if problem is None else (*self._trace(number), *last),
        )

    def _trace(self, number: int) -> Iterator[Hashable]:
        """Walk to a state again: its events were not kept."""
        path: list[int] = []
        while number > 0:
            path.append(self._choices[number])
            number = self._parents[number]
        state = self._system.start()
        for choice in reversed(path):
            for position, (event, after) in enumerate(self._system.successors(state)):
                if position == choice:
                    state = after
                    yield cast(Hashable, event)
                    break
