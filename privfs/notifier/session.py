# SPDX-License-Identifier: GPL-2.0-or-later
"""One user process as its owner sees it: state, what was sent, what it may know.

:data:`TRANSITIONS` is the life of a session.  A session leaves the wait sets only when it is GONE,
and it is GONE only when its process is proven dead or it has unregistered everything: the end of
its socket proves nothing, because a process may run on without it.  FENCED is as good as dead for
the files that its fence covers, those that it may store to.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable
from typing import Final

from pyroaring import BitMap

from privfs.notifier.wire import Fence


class State(enum.Enum):
    """Life of a session."""

    NEW = "new"  #: connected, no HELLO yet
    OPEN = "open"
    ZOMBIE = "zombie"  #: socket closed, the process may still map pages
    KILLED = "killed"  #: SIGKILL sent, exit not yet seen
    UNPROVEN = "unproven"  #: SIGKILL sent long ago, exit never seen
    FENCED = "fenced"  #: the same, but its fence stops whatever is left of it
    GONE = "gone"


class Event(enum.Enum):
    """What happens to a session."""

    HELLO = "hello"
    BREAK = "break"  #: end of file, nonsense, overflow
    BYE = "bye"  #: orderly end, nothing registered
    CONDEMN = "condemn"  #: did not acknowledge in time
    GIVE_UP = "give up"
    FENCE = "fence"  #: no thread returns to its program, and a userfaultfd stops the kernel
    EXIT = "exit"  #: the pidfd became readable
    REPLACED = "replaced"  #: the same process opened another session in its place


TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (State.NEW, Event.HELLO): State.OPEN,
    (State.NEW, Event.BREAK): State.ZOMBIE,
    (State.NEW, Event.EXIT): State.GONE,
    (State.OPEN, Event.BREAK): State.ZOMBIE,
    (State.OPEN, Event.BYE): State.GONE,
    (State.OPEN, Event.CONDEMN): State.KILLED,
    (State.OPEN, Event.EXIT): State.GONE,
    (State.ZOMBIE, Event.BREAK): State.ZOMBIE,
    (State.ZOMBIE, Event.BYE): State.GONE,
    (State.ZOMBIE, Event.CONDEMN): State.KILLED,
    (State.ZOMBIE, Event.EXIT): State.GONE,
    (State.ZOMBIE, Event.REPLACED): State.GONE,
    (State.KILLED, Event.BREAK): State.KILLED,
    (State.KILLED, Event.GIVE_UP): State.UNPROVEN,
    (State.KILLED, Event.FENCE): State.FENCED,
    (State.KILLED, Event.EXIT): State.GONE,
    (State.UNPROVEN, Event.BREAK): State.UNPROVEN,
    (State.UNPROVEN, Event.FENCE): State.FENCED,
    (State.UNPROVEN, Event.EXIT): State.GONE,
    (State.FENCED, Event.BREAK): State.FENCED,
    (State.FENCED, Event.EXIT): State.GONE,
}


class IllegalEvent(Exception):
    """An event that cannot happen in this state; the session is unchanged."""


class Session:
    """A user process.

    ``files`` maps the inodes it is registered on to whether stores are granted; ``sent`` maps
    the seq of every invalidation that is not yet acknowledged to it, or to None once an
    UNREGISTER has crossed it; ``calls`` counts its ALLOCATE and PUNCH records, ``calling`` holds
    the request numbers of those that are not answered; ``known`` holds the (inode, extent
    instance) pairs whose memfd it was given; ``granted`` is a view for people: the pages that it
    was granted and has not given up.  ``given_up``: the pages of extents that it had
    and that only its word gives back (:attr:`~privfs.extents.Layout.whole`).
    """

    __slots__ = ("calling", "calls", "fence", "files", "given_up", "granted", "known",
                 "label", "next_seq", "pid", "sent", "sid", "state")  # fmt: skip

    def __init__(self, sid: int, pid: int) -> None:
        self.sid = sid
        self.pid = pid
        self.label = ""
        self.fence = Fence.NONE
        self.state = State.NEW
        self.next_seq = 1
        self.calls = 0
        self.calling: set[int] = set()
        self.files: dict[int, bool] = {}
        self.sent: dict[int, tuple[int, Hashable] | None] = {}
        self.known: set[tuple[int, int]] = set()
        self.granted: dict[int, BitMap] = {}
        self.given_up = 0

    @property
    def name(self) -> str:
        """Return what USERS columns and logs call it: ``label(pid)``."""
        return f"{self.label or 'user'}({self.pid})"

    @property
    def talks(self) -> bool:
        """True while records may be exchanged."""
        return self.state is State.OPEN

    @property
    def condemned(self) -> bool:
        """True once it was sent SIGKILL, until its exit is seen."""
        return self.state in (State.KILLED, State.UNPROVEN, State.FENCED)

    def feed(self, event: Event) -> None:
        """Take one transition, or raise :class:`IllegalEvent` and stay."""
        try:
            self.state = TRANSITIONS[self.state, event]
        except KeyError:
            raise IllegalEvent(
                f"session {self.sid} {self.name}: {event.value!r} in state {self.state.value!r}"
            ) from None

    def key(self) -> Hashable:
        """Return the state as a hashable value."""
        return (
            self.sid, self.state.value, int(self.fence), self.next_seq, self.calls,
            frozenset(self.calling),
            tuple(self.files.items()), tuple(self.sent.items()), tuple(sorted(self.known)),
        )  # fmt: skip

    def copy(self) -> Session:
        """Return an independent copy."""
        twin = Session.__new__(type(self))
        twin.sid, twin.pid, twin.label, twin.state = self.sid, self.pid, self.label, self.state
        twin.fence = self.fence
        twin.next_seq = self.next_seq
        twin.calls = self.calls
        twin.calling = self.calling.copy()
        twin.files = self.files.copy()
        twin.sent = self.sent.copy()
        twin.known = self.known.copy()
        twin.given_up = self.given_up
        twin.granted = {ino: pages.copy() for ino, pages in self.granted.items()}
        return twin
