# SPDX-License-Identifier: GPL-2.0-or-later
"""What the contract's world is made of: calls, setups, letters, all of them values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from hwemu.shootdown import Shootdown
from kvmsim.fault import Fault
from kvmsim.invalidate import MmuInvalidate
from kvmsim.uapi import Abi
from kvmsim.vm import Vm
from privfs.memfile import MemFile
from privfs.notifier.owner import Owner
from privfs.notifier.user import User
from privfs.notifier.wire import Op, Record
from privfs.operation import Fallocate, Migrate, Request, Resize
from privfs.personality import PAGE_SIZE, RESIZABLE, Personality
from privfs.seals import ALL_PURPOSES, Purpose

V = TypeVar("V")
Page = tuple[int, int, int]
"""Inode, page, generation: how often that page had been freed when it was granted."""
Delivery = Literal["fifo", "two sockets", "set"]


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


def freed_by(request: Request | Release | Shutdown, personality: Personality) -> range:
    """Return the pages that a successful request has freed, or has moved away from."""
    if isinstance(request, Migrate):
        return range(*personality.layout.extent_range(request.extent))
    if isinstance(request, Resize):
        return range(request.size // PAGE_SIZE, 1 << 32)
    if isinstance(request, Fallocate) and request.mode not in (0x00, 0x01):
        start, count = request.offset // PAGE_SIZE, request.length // PAGE_SIZE
        return range(start, start + count)
    return range(0)


@dataclass(frozen=True)
class Call:
    """A system call on file ``ino`` that will be made once, at any time after the ones before it.

    ``caller`` is the process that makes it, if it is one of the users.  ``record`` makes it an
    ALLOCATE or PUNCH record of that user.  ``cancel``: the caller may be interrupted.
    """

    request: Request | Release | Shutdown
    ino: int = 1
    caller: int = -1
    record: bool = False
    cancel: bool = False


@dataclass(frozen=True)
class Setup:
    """What there is and what may go wrong.  ``pages`` is per file, ``vcpus`` per user.

    ``populated`` pages of every file are allocated at the start.  ``late`` users register by
    themselves; ``fresh`` ones have connected, and not even their HELLO has arrived; ``readers``
    have a descriptor for reading only; ``mute`` ones never say HELLO.  ``reregister`` is how often
    each may unregister and come back, ``sessions`` how many it may open one after the other, each
    in place of the one whose socket it closed.  ``leaves`` names who may say BYE; ``hang``,
    ``stop``, ``close``, ``kill`` name the users that may meet that fate, ``immortal`` those whose
    exit is never seen, ``sticks`` those that, once killed, may run no more and yet not exit;
    ``fenced`` have a userfaultfd; ``exclusive`` want every file for themselves.  Of ``echoes`` the
    owner hears once more that their socket has ended.

    ``delivery``: one FIFO each way; or one for invalidations and acknowledgements and another
    for all else; or no order at all.  ``direct``: the lane installs what was granted at once, as
    kvmsim's does; else it is installed at any later time.  ``prompt``: a fault asks at once, unless
    the socket is full; else at any later time, as kvmsim's may.  ``brackets``: the bracket of an
    invalidation stays open until it is acknowledged.  ``converts`` is how often each VMM changes
    the attribute of its first gfn; ``shared``: vCPUs touch the shared side as well.

    ``stale`` timers of ended invalidations still fire.  ``fails`` are errnos with which an
    allocation may fail, before or after its first page.  ``inline``: steps end before the event
    that began them, and their effects come before what is left of its.  ``slots`` are
    (gfn, pages, ino, file page), by default one for each file.  ``alike``: vCPUs of a user are
    not told apart, nor are users that start alike.
    """

    pages: int = 1
    files: int = 1
    size: int = -1  #: pages, if not all of them are in the file
    users: int = 1
    vcpus: int = 1
    calls: tuple[Call, ...] = ()
    personality: Personality = RESIZABLE
    budget: int = 100
    populated: tuple[int, ...] = ()
    late: frozenset[int] = frozenset()
    fresh: frozenset[int] = frozenset()
    mute: frozenset[int] = frozenset()
    readers: frozenset[int] = frozenset()
    reregister: int = 0
    sessions: int = 1
    leaves: frozenset[int] = frozenset()
    hang: frozenset[int] = frozenset()
    stop: frozenset[int] = frozenset()
    close: frozenset[int] = frozenset()
    kill: frozenset[int] = frozenset()
    immortal: frozenset[int] = frozenset()
    sticks: frozenset[int] = frozenset()
    echoes: frozenset[int] = frozenset()
    fenced: frozenset[int] = frozenset()
    exclusive: frozenset[int] = frozenset()
    delivery: Delivery = "fifo"
    direct: bool = False
    prompt: bool = False
    brackets: bool = False
    converts: int = 0
    shared: bool = False
    ring: int = 4
    room: int = 2  #: records that fit into a user's socket
    patience: int = 0
    stale: bool = False
    fails: tuple[int, ...] = ()
    inline: bool = False
    abi: Abi = "upstream"
    slots: tuple[tuple[int, int, int, int], ...] = ()
    alike: bool = False

    @property
    def inos(self) -> range:
        """The files."""
        return range(1, self.files + 1)

    @property
    def purpose(self) -> Purpose:
        """What users ask for: that nothing moves, unless something is going to."""
        moves = any(isinstance(call.request, Migrate) for call in self.calls)
        return ALL_PURPOSES & ~Purpose.UNMOVABLE if moves else ALL_PURPOSES

    @property
    def bound(self) -> tuple[tuple[int, int, int, int], ...]:
        """The slots of every user's VM: (gfn, pages, ino, file page)."""
        return self.slots or tuple(
            (i * self.pages, self.pages, ino, 0) for i, ino in enumerate(self.inos)
        )

    def fates(self, p: int) -> frozenset[str]:
        """What may happen to user ``p``."""
        names = (
            "hang", "stop", "close", "kill", "leaves", "sticks", "fenced", "echoes", "mute",
            "exclusive",
        )  # fmt: skip
        return frozenset(name for name in names if p in getattr(self, name))


@dataclass(frozen=True)
class Cores:
    """The code under test."""

    owner: type[Owner] = Owner
    file: type[MemFile] = MemFile
    user: type[User] = User
    vm: type[Vm] = Vm
    fault: type[Fault] = Fault
    invalidate: Callable[[], MmuInvalidate] = MmuInvalidate
    shootdown: type[Shootdown] = Shootdown
    audits_grants: bool = True


#: The code that ships.
SHIPPING = Cores()

#: Kinds of events, effects and answers that any world has seen: the vocabulary is a table too.
SEEN: set[object] = set()


class Letter(NamedTuple):
    """A record on its way to a user, and the generations of the pages that it grants."""

    record: Record
    made_for: tuple[int, ...] = ()


class Parcel(NamedTuple):
    """A record on its way to the owner, and the file whose descriptor comes along."""

    record: Record
    ino: int = 0


def put(items: tuple[V, ...], index: int, item: V) -> tuple[V, ...]:
    return (*items[:index], item, *items[index + 1 :])


def without(items: tuple[V, ...], index: int) -> tuple[V, ...]:
    return (*items[:index], *items[index + 1 :])


Item = Letter | Parcel | None  # None: the end of the socket
M = TypeVar("M", bound=Letter | Parcel)


def joined(items: tuple[M | None, ...], item: M, delivery: Delivery) -> tuple[M | None, ...]:
    """Add to what is on its way; what may arrive in any order is kept in one order.

    Without order equal items are one: only an EXTENT can come twice, and says nothing new then.
    """
    if delivery == "fifo":
        return (*items, item)
    if delivery == "two sockets":
        return tuple(sorted((*items, item), key=_lane))
    kept = items if item in items else (*items, item)
    return tuple(sorted(kept, key=lambda one: (_ends(one), repr(one))))


def takeable(items: tuple[Item, ...], delivery: Delivery) -> Iterator[int]:
    """Say which of the items on their way may arrive next.

    HELLO opens a session, BYE and the end of the socket end it: they keep their places.
    """
    seen: set[object] = set()
    for i, item in enumerate(items):
        if i and (delivery == "fifo" or _ends(item)):
            return
        lane = _lane(item) if delivery == "two sockets" else i
        if lane not in seen:
            seen.add(lane)
            yield i
        if item is not None and item.record.op == Op.HELLO:
            return


def _lane(item: Item) -> int:
    """Say by which of two sockets an item goes: 0 for invalidations and acknowledgements."""
    if _ends(item):
        return 2
    return int(item is not None and item.record.op not in (Op.INVALIDATE, Op.ACK))


def _ends(item: Item) -> bool:
    return item is None or item.record.op == Op.BYE
