# SPDX-License-Identifier: GPL-2.0-or-later
"""What the contract's world is made of: calls, processes, vCPUs, memory, all of them values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from privfs.notifier.effects import Rung
from privfs.notifier.user import Granted, User
from privfs.notifier.wire import Record
from privfs.operation import Fallocate, OpId, Perform, Request, Resize
from privfs.personality import PAGE_SIZE, RESIZABLE, Personality

INO = 1


def allocate(start: int, end: int) -> Fallocate:
    return Fallocate(0x01, start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def punch(start: int, end: int) -> Fallocate:
    return Fallocate(0x03, start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def grow(start: int, end: int) -> Fallocate:
    return Fallocate(0x00, start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def zero(start: int, end: int) -> Fallocate:
    return Fallocate(0x10, start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def resize(pages: int) -> Resize:
    return Resize(pages * PAGE_SIZE)


class Release(NamedTuple):
    """The last name and the last descriptor of the file go."""


class Shutdown(NamedTuple):
    """The mount goes: every file is taken from its users."""


def freed_by(request: Request | Release | Shutdown) -> range:
    """Return the pages that a successful request has freed."""
    if isinstance(request, Resize):
        return range(request.size // PAGE_SIZE, 1 << 32)
    if isinstance(request, Fallocate) and request.mode not in (0x00, 0x01):
        start, count = request.offset // PAGE_SIZE, request.length // PAGE_SIZE
        return range(start, start + count)
    return range(0)


@dataclass(frozen=True)
class Call:
    """A system call that will be made once, at any time after the ones before it.

    ``caller`` is the process that makes it, if it is one of the users.  ``record`` makes it a
    PUNCH record of that user.  ``cancel``: the caller may be interrupted.
    """

    request: Request | Release | Shutdown
    caller: int = -1
    record: bool = False
    cancel: bool = False


@dataclass(frozen=True)
class Setup:
    """What there is and what may go wrong.

    ``late`` users register by themselves, ``reregister`` is how often each may unregister and
    come back.  ``hang``, ``close``, ``kill`` name the users that may meet that fate, ``immortal``
    those whose exit is never seen.  ``stale`` timers of ended invalidations still fire.
    ``fails``: memory may run out, before or after the first page of an allocation.  ``inline``:
    steps end before the event that began them, and their effects come before what is left of its.
    """

    pages: int = 1
    size: int = -1  #: pages, if not all of them are in the file
    users: int = 1
    vcpus: int = 1
    calls: tuple[Call, ...] = ()
    personality: Personality = RESIZABLE
    populated: tuple[int, ...] = ()
    late: frozenset[int] = frozenset()
    reregister: int = 0
    hang: frozenset[int] = frozenset()
    close: frozenset[int] = frozenset()
    kill: frozenset[int] = frozenset()
    immortal: frozenset[int] = frozenset()
    ring: int = 4
    room: int = 2  #: records that fit into a user's socket
    stale: bool = False
    fails: bool = False
    inline: bool = False


class Vcpu(NamedTuple):
    """A thread of guest code.  ``tlb`` holds (page, generation); ``inside`` is an access."""

    state: str = "idle"  # idle, waits, granted, inside
    page: int = -1
    req: int = 0
    grant: Granted | None = None
    made_for: tuple[int, ...] = ()  #: generations of the granted pages
    tlb: frozenset[tuple[int, int]] = frozenset()
    inside: tuple[int, int] | None = None
    flush: bool = False  #: must flush before its next guest instruction
    again: bool = False  #: needs the extent's descriptor once more


Letter = tuple[Record, tuple[int, ...]] | None  #: a record and the generations it grants; None: EOF


class Proc(NamedTuple):
    """A user process and its two FIFOs.  ``user_key`` stands for ``user`` in its key."""

    user: User
    user_key: int  #: -1 while a step changes the user
    vcpus: tuple[Vcpu, ...]
    mapped: frozenset[tuple[int, int]] = frozenset()  #: second stage: (page, generation)
    owed: tuple[int, ...] = ()  #: zapped, not yet acknowledged
    unmapped: tuple[int, ...] = ()  #: acknowledged, not yet zapped (a mutation)
    inbox: tuple[Letter, ...] = ()
    outbox: tuple[Record | None, ...] = ()
    registered: str = "no"  # no, asked, yes, leaves
    comebacks: int = 0
    hung: bool = False
    closed: bool = False
    killed: bool = False
    dead: bool = False
    reaped: bool = False  #: its exit was seen

    @property
    def healthy(self) -> bool:
        return not (self.hung or self.closed or self.killed or self.dead)


class CallState(NamedTuple):
    """``before`` holds the generations of allocated pages at the time of the call."""

    started: bool = False
    status: int | None = None
    before: tuple[tuple[int, int], ...] = ()
    req: int = 0


class Ghost(NamedTuple):
    """Memory, work under way, calls, timers."""

    generation: tuple[int, ...]
    held: frozenset[int]
    calls: tuple[CallState, ...]
    works: tuple[Perform, ...] = ()
    timers: tuple[tuple[OpId, int, Rung], ...] = ()  #: (op, number of its invalidation, rung)
    chains: tuple[tuple[OpId, int], ...] = ()  #: op → invalidations that it has begun
