# SPDX-License-Identifier: GPL-2.0-or-later
"""Locks as data: what a leaf under way holds, and what another then answers.

The module waits for no lock: who cannot have one is refused. A lock is free, shared or exclusive.
Where guests and hosts meet (an S-EPT entry, an operation state, a PAMT entry) a refused host
leaves its mark, and the guest's side is refused until the host has had its turn:
OPERAND_BUSY_HOST_PRIORITY (``tdx_locks.h``, TDHP of an entry). That mark is all that a refusal
changes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from hwemu.tdx.status import Status, TdxError


class Mode(enum.Enum):
    """How a lock is wanted."""

    SHARED = "shared"
    EXCLUSIVE = "exclusive"


class Kind(enum.Enum):
    """What a lock guards."""

    PAGE = "PAMT entry"  #: by page number of its first page, and level
    OP_STATE = "operation state"
    SEPT_TREE = "S-EPT tree"
    SEPT_ENTRY = "S-EPT entry"
    EPOCH = "TD epoch"
    KOT = "key ownership table"
    RTMR = "RTMRs"


#: Kinds whose locks the host has priority for.
HOST_PRIORITY = frozenset({Kind.PAGE, Kind.OP_STATE, Kind.SEPT_ENTRY, Kind.RTMR})


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock by what it guards: kind, page number of the TDR (or page), and gpa or level."""

    kind: Kind
    owner: int = 0
    at: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Held:
    """The locks of a leaf that is under way; give it back to `TdxModule.end`."""

    ticket: int
    locks: tuple[tuple[Lock, Mode], ...]


class Locks:
    """Which locks are held by leaves under way; empty nearly always."""

    __slots__ = ("_held", "_next", "_priority", "_trace")

    def __init__(self) -> None:
        self._held: dict[int, tuple[tuple[Lock, Mode], ...]] = {}
        self._priority: set[Lock] = set()
        self._next = 1
        self._trace: list[tuple[Lock, Mode]] | None = None

    def take(self, lock: Lock, mode: Mode, detail: int, *, guest: bool = False) -> None:
        """Take a lock for the length of a leaf, or raise OPERAND_BUSY | ``detail``."""
        if self._trace is not None:
            self._trace.append((lock, mode))
        if not self._held and not self._priority:
            return
        if guest and lock in self._priority:
            raise TdxError(Status.OPERAND_BUSY_HOST_PRIORITY, detail, f"{lock.kind.value}: host's")
        for locks in self._held.values():
            for other, how in locks:
                if other == lock and Mode.EXCLUSIVE in (mode, how):
                    if not guest and lock.kind in HOST_PRIORITY:
                        self._priority.add(lock)
                    raise TdxError(Status.OPERAND_BUSY, detail, f"{lock.kind.value}: {how.value}")
        if not guest:
            self._priority.discard(lock)

    def record(self) -> None:
        """Note every lock that is taken from here on, for `hold`."""
        self._trace = []

    def recorded(self) -> tuple[tuple[Lock, Mode], ...]:
        """Return what was noted, and note no more."""
        found, self._trace = tuple(self._trace or ()), None
        return found

    def hold(self, locks: tuple[tuple[Lock, Mode], ...]) -> Held:
        """A leaf is under way that has these."""
        held = Held(self._next, locks)
        self._held[held.ticket] = locks
        self._next += 1
        return held

    def release(self, held: Held) -> None:
        """The leaf is over. ValueError if it was before."""
        if self._held.pop(held.ticket, None) is None:
            raise ValueError(f"leaf {held.ticket} is not under way")

    def key(self) -> tuple[object, ...]:
        """A hashable value equal for states that behave alike."""
        held = sorted(repr(locks) for locks in self._held.values())
        return tuple(held), frozenset(self._priority)

    def copy(self) -> Locks:
        """An independent copy."""
        other = Locks()
        other._held = dict(self._held)
        other._priority = set(self._priority)
        other._next = self._next
        return other
