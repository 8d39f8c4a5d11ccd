# SPDX-License-Identifier: GPL-2.0-or-later
"""What the owner asks its shell to do, in the order in which it must be done."""

from __future__ import annotations

import enum
from typing import NamedTuple

from privfs.notifier.wire import Record
from privfs.operation import Moved, OpId, Perform


class Rung(enum.Enum):
    """What happens to users that do not acknowledge, one after the other."""

    LOG = "log"
    CONDEMN = "condemn"
    GIVE_UP = "give up"


class Send(NamedTuple):
    """Queue a record for a session; ``extent`` is (inode, index, writable) of the fd to add."""

    sid: int
    record: Record
    extent: tuple[int, int, bool] | None = None


class Drop(NamedTuple):
    """Close the socket of a session; its pidfd stays watched."""

    sid: int
    why: str


class Kill(NamedTuple):
    """SIGKILL the process of a session through its pidfd."""

    sid: int


class Forget(NamedTuple):
    """The session is gone: release everything that belongs to it."""

    sid: int


class Arm(NamedTuple):
    """Call :meth:`Owner.timer` when ``rung`` is due, if the invalidation still waits."""

    ino: int
    op: OpId
    rung: Rung


class Work(NamedTuple):
    """Perform FREE, ALLOCATE or COPY on the extents, then call :meth:`Owner.performed`."""

    ino: int
    perform: Perform


class Migrated(NamedTuple):
    """An extent has another memfd: whoever asks for its pages gets that one."""

    ino: int
    moved: Moved


class Answer(NamedTuple):
    """Answer the system call that brought ``op``."""

    op: OpId
    errno: int
    why: str


class Expire(NamedTuple):
    """The file's memory is freed and the file is gone."""

    ino: int


class Note(NamedTuple):
    """Something that a log should tell."""

    text: str
    serious: bool = False


class Stray(NamedTuple):
    """Memory was found that no bitmap has: freed memory was touched, by one of ``holders``."""

    ino: int
    start: int
    end: int
    what: str
    holders: tuple[str, ...]


Effect = Send | Drop | Kill | Forget | Arm | Work | Migrated | Answer | Expire | Note | Stray
