# SPDX-License-Identifier: GPL-2.0-or-later
"""States of one part of a world, numbered, so that each is stepped once for each event.

The states of a world of several machines are combinations of rather few states of each machine.
:class:`Parts` gives the states of one machine numbers and remembers where each input leads, so that
the code under test runs once for a (state of the part, input) and not once for every state of the
world.  The state of the world is then a tuple of numbers: small, quick to compare and to hash.
(Numbering parts is the *collapse* compression of SPIN, Holzmann 1997; the remembered steps come
for nothing with it, since parts are values.)

What is remembered must depend on nothing else than the part and the input.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, Self, TypeVar


class Part(Protocol):
    """A machine of a world."""

    def copy(self) -> Self:
        """Return a twin that a step may change."""
        ...

    def key(self) -> Hashable:
        """Return all that the future of this part depends on."""
        ...

    def take(self, event: Any) -> Any:
        """Change in place; what is returned is for the other parts, and must not change."""
        ...


P = TypeVar("P", bound=Part)
V = TypeVar("V")


class Parts(Generic[P]):
    """All states of a part that were met, and all steps."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._parts: list[P] = []
        self._steps: dict[tuple[int, Hashable], tuple[int, Any]] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> P:
        """Return a state; it must not be changed."""
        return self._parts[number]

    @property
    def steps(self) -> int:
        """Steps that were taken, each once."""
        return len(self._steps)

    def number(self, part: P) -> int:
        """Return the number of a state; ``part`` must not be changed any more."""
        key = part.key()
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._parts)
            self._parts.append(part)
        return number

    def step(self, number: int, event: Hashable) -> tuple[int, Any]:
        """Return the number of the state after ``event``, and what it says to the other parts."""
        found = self._steps.get((number, event))
        if found is None:
            twin = self._parts[number].copy()
            said = twin.take(event)
            found = self._steps[number, event] = self.number(twin), said
        return found


class View(Generic[P, V]):
    """Something that depends on one part alone, computed once for each of its states."""

    def __init__(self, parts: Parts[P], compute: Callable[[int, P], V]) -> None:
        self._parts = parts
        self._compute = compute
        self._values: dict[int, V] = {}

    def __getitem__(self, number: int) -> V:
        try:
            return self._values[number]
        except KeyError:
            value = self._values[number] = self._compute(number, self._parts[number])
            return value
