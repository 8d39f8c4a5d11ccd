# SPDX-License-Identifier: GPL-2.0-or-later
"""The worlds that are closed: those of every run, and the larger ones of ``--slow``."""

from __future__ import annotations

import errno
from dataclasses import replace

from contract_values import (
    Call,
    Release,
    Setup,
    Shutdown,
    allocate,
    grow,
    punch,
    resize,
    zero,
)

from privfs.extents import Layout
from privfs.operation import Migrate
from privfs.personality import GUEST_MEMFD, RESIZABLE

ONE = frozenset({0})
OTHER = frozenset({1})
EVERY = ONE | OTHER
P = Call(punch(0, 1))
Q = Call(punch(1, 2))
BOTH = Call(punch(0, 2))
CANCEL = Call(punch(0, 1), cancel=True)
SECOND = Call(punch(0, 1), ino=2)
MOVE = Call(Migrate(0))
MOVE_CANCEL = Call(Migrate(0), cancel=True)
NO_SPACE = (errno.ENOSPC,)
#: Each page is an extent of its own, and lives on without it.
SINGLE = replace(RESIZABLE, layout=Layout(pages=1, doubles=0))
#: Each page is an extent of its own, and dies when it is freed.
WHOLE = replace(RESIZABLE, layout=Layout(pages=1, doubles=0, whole=True))


def own(start: int, end: int, *, record: bool = True) -> Call:
    """Return a call of user 0 itself."""
    return Call(punch(start, end), caller=0, record=record)


WORLDS = {
    "one user, two invalidations, a caller that may be killed": Setup(
        calls=(CANCEL, P), populated=(0,)
    ),
    "one user that hangs, closes its socket or is killed": Setup(
        calls=(CANCEL, P), populated=(0,), hang=ONE, close=ONE, kill=ONE
    ),
    "one user whose exit is never seen": Setup(
        calls=(CANCEL, P), populated=(0,), hang=ONE, close=ONE, immortal=ONE, echoes=ONE
    ),
    "one user that is stopped for a while": Setup(
        calls=(P, P), populated=(0,), stop=ONE, patience=1, stale=True
    ),
    "one user that cannot exit, behind its fence": Setup(
        calls=(P, P), populated=(0,), hang=ONE, close=ONE, sticks=ONE, fenced=ONE,
        echoes=ONE,
    ),
    "one user that cannot exit, without a fence": Setup(
        calls=(P, P), populated=(0,), hang=ONE, sticks=ONE, immortal=ONE
    ),
    "one user with two vCPUs": Setup(
        vcpus=2, calls=(P, P), populated=(0,), alike=True
    ),
    "one user with two vCPUs that hangs": Setup(
        vcpus=2, calls=(P,), populated=(0,), hang=ONE, alike=True
    ),
    "one user that comes and goes": Setup(
        calls=(P, P), populated=(0,), reregister=1, leaves=ONE
    ),
    "one user that comes and goes with two vCPUs": Setup(
        vcpus=2, calls=(P,), populated=(0,), reregister=1, alike=True, prompt=True, direct=True
    ),
    "one user that opens another session": Setup(
        calls=(P, P), populated=(0,), close=ONE, kill=ONE, sessions=2
    ),
    "a user that has hardly connected": Setup(
        calls=(P,), populated=(0,), fresh=ONE, hang=ONE, close=ONE, kill=ONE, leaves=ONE
    ),
    "a user that says nothing": Setup(
        calls=(P,), populated=(0,), mute=ONE, hang=ONE, close=ONE, kill=ONE
    ),
    "two users, one may only read": Setup(
        users=2, calls=(P,), populated=(0,), readers=ONE
    ),
    "two users, one hangs": Setup(
        users=2, calls=(P, P), populated=(0,), hang=ONE, prompt=True
    ),
    "two users, one late": Setup(
        users=2, calls=(P, P), populated=(0,), late=OTHER, close=ONE, prompt=True, direct=True
    ),
    "two users that both want a file for themselves": Setup(
        users=2, calls=(P,), populated=(0,), exclusive=EVERY, late=EVERY, reregister=1,
        prompt=True, direct=True, alike=True
    ),
    "two users that both want a file for themselves, any may be killed": Setup(
        users=2, calls=(P,), populated=(0,), exclusive=EVERY, late=EVERY, kill=EVERY,
        prompt=True, direct=True, alike=True
    ),
    "a user that has a file for itself and opens another session": Setup(
        users=2, calls=(P,), populated=(0,), exclusive=ONE, late=OTHER, close=ONE, kill=ONE,
        sessions=2, prompt=True, direct=True
    ),
    "a user that has a file for itself and cannot exit, behind its fence": Setup(
        users=2, calls=(P,), populated=(0,), exclusive=ONE, late=OTHER, hang=ONE, sticks=ONE,
        fenced=ONE, prompt=True, direct=True
    ),
    "three users": Setup(
        users=3, calls=(P,), populated=(0,), alike=True
    ),
    "two pages, three overlapping invalidations": Setup(
        pages=2, calls=(P, Q, BOTH), populated=(0, 1)
    ),
    "two pages, a short ring": Setup(
        pages=2, calls=(P, Q, P), populated=(0, 1), ring=1
    ),
    "two pages, one user that closes its socket": Setup(
        pages=2, calls=(CANCEL, Q), populated=(0, 1), close=ONE
    ),
    "three pages": Setup(
        pages=3, calls=(BOTH, Call(punch(1, 3))), populated=(0, 1, 2)
    ),
    "two files": Setup(
        files=2, calls=(P, SECOND), populated=(0,)
    ),
    "two files, one user that hangs": Setup(
        files=2, calls=(P, SECOND), populated=(0,), hang=ONE, prompt=True
    ),
    "two files, one user that comes and goes": Setup(
        files=2, calls=(SECOND,), populated=(0,), reregister=1, prompt=True, direct=True
    ),
    "a file that shrinks, grows and is zeroed": Setup(
        pages=2, calls=(Call(resize(0), cancel=True), Call(resize(2)), Call(zero(0, 1))),
        populated=(0, 1), hang=ONE, prompt=True,
    ),
    "a file that ends before its slot": Setup(
        pages=2, size=1, calls=(P, Call(resize(2)), Call(resize(0))), populated=(0,)
    ),
    "allocations that fail": Setup(
        pages=2, size=0, calls=(Call(grow(0, 2)), Call(grow(1, 2)), Call(resize(1))), fails=NO_SPACE
    ),
    "an allocation, a punch and a fault": Setup(
        pages=2, calls=(Call(allocate(0, 2)), BOTH, Call(zero(1, 2), cancel=True)),
        fails=NO_SPACE, prompt=True,
    ),
    "faults that fail": Setup(
        calls=(P,), populated=(0,), fails=(errno.EIO, errno.ENOSPC)
    ),
    "a budget of one page": Setup(
        pages=2, calls=(P, Q), populated=(0,), budget=1
    ),
    "a guest_memfd whose last descriptor is closed": Setup(
        calls=(P, Call(Release())), populated=(0,), personality=GUEST_MEMFD,
        hang=ONE, close=ONE, kill=ONE,
    ),
    "a file that its users keep alive": Setup(
        calls=(Call(Release()), own(0, 1)), populated=(0,), kill=ONE, reregister=1
    ),
    "a shutdown with a user that comes and goes": Setup(
        calls=(P, Call(Shutdown()), P), populated=(0,), hang=ONE, reregister=1
    ),
    "a shutdown with a user whose exit is never seen": Setup(
        users=2, calls=(Call(Shutdown()), P), populated=(0,), hang=ONE, immortal=ONE, prompt=True
    ),
    "a file that two users keep alive, one is killed": Setup(
        users=2, calls=(Call(Release()), own(0, 1)), populated=(0,), kill=ONE, prompt=True
    ),
    "a user that punches on the mount itself": Setup(
        users=2, calls=(own(0, 1, record=False), own(0, 1, record=False)), populated=(0,), hang=ONE,
        prompt=True,
    ),
    "a user that punches by record, with slow timers": Setup(
        calls=(own(0, 1), own(0, 1)), populated=(0,), stale=True
    ),
    "a user that allocates by record": Setup(
        calls=(Call(allocate(0, 1), caller=0, record=True), P), fails=NO_SPACE
    ),
    "grants and invalidations by two sockets": Setup(
        calls=(P, P, P), populated=(0,), delivery="two sockets"
    ),
    "grants and invalidations by two sockets, two pages": Setup(
        pages=2, calls=(P, Q), populated=(0, 1), delivery="two sockets", ring=1
    ),
    "grants and invalidations by two sockets, one user that comes and goes": Setup(
        calls=(P, P), populated=(0,), delivery="two sockets", reregister=1
    ),
    "no order at all": Setup(
        calls=(P, P, P), populated=(0,), delivery="set"
    ),
    "no order at all, two pages": Setup(
        pages=2, calls=(P, Q), populated=(0, 1), delivery="set"
    ),
    "no order at all, a short ring": Setup(
        pages=2, calls=(P, Q, P), populated=(0, 1), delivery="set", ring=1, prompt=True
    ),
    "no order at all, one user that comes and goes": Setup(
        calls=(P,), populated=(0,), delivery="set", reregister=1
    ),
    "no order at all, two vCPUs": Setup(
        vcpus=2, calls=(P,), populated=(0,), delivery="set", alike=True, prompt=True
    ),
    "brackets that stay open": Setup(
        pages=2, calls=(P, Q), populated=(0, 1), brackets=True
    ),
    "one bracket over two slots": Setup(
        pages=2, calls=(BOTH, P), populated=(0, 1), brackets=True,
        slots=((0, 1, 1, 0), (1, 1, 1, 1)),
    ),
    "one page in two slots": Setup(
        calls=(P, P), populated=(0,), abi="v7", slots=((0, 1, 1, 0), (2, 1, 1, 0)), prompt=True
    ),
    "conversions": Setup(
        calls=(P, P), populated=(0,), converts=2, shared=True, prompt=True
    ),
    "conversions with two vCPUs": Setup(
        vcpus=2, calls=(P,), populated=(0,), converts=2, shared=True, alike=True, prompt=True,
        direct=True,
    ),
    "extents that die with their pages": Setup(
        pages=2, calls=(BOTH, P), populated=(0, 1), personality=WHOLE
    ),
    "extents that die with their pages, no order at all": Setup(
        calls=(P, P), populated=(0,), personality=WHOLE, delivery="set"
    ),
    "an extent that moves twice, a caller that may leave": Setup(
        calls=(MOVE_CANCEL, MOVE), populated=(0,), fails=NO_SPACE
    ),
    "an extent that moves from a user that hangs, closes its socket or is killed": Setup(
        calls=(MOVE_CANCEL,), populated=(0,), hang=ONE, close=ONE, kill=ONE
    ),
    "an extent that moves from a user whose exit is never seen": Setup(
        calls=(MOVE, P), populated=(0,), hang=ONE, immortal=ONE
    ),
    "an extent that moves, with two vCPUs": Setup(
        vcpus=2, calls=(MOVE,), populated=(0,), alike=True
    ),
    "an extent that moves from two users, one late": Setup(
        users=2, calls=(MOVE, P), populated=(0,), late=OTHER, prompt=True, direct=True
    ),
    "an extent that moves from a user that comes and goes": Setup(
        calls=(MOVE,), populated=(0,), reregister=1
    ),
    "an extent that moves among punches, faults and allocations": Setup(
        pages=2, calls=(P, MOVE, Call(allocate(0, 2))), populated=(0, 1), prompt=True
    ),
    "one of two extents moves": Setup(
        pages=2, calls=(MOVE, Q), populated=(0, 1), personality=SINGLE, prompt=True
    ),
    "an extent without a page ends": Setup(
        calls=(P, MOVE), populated=(0,), direct=True
    ),
    "an extent that moves, no order at all": Setup(
        calls=(MOVE, P), populated=(0,), delivery="set", prompt=True
    ),
    "an extent that moves without room": Setup(
        calls=(MOVE, P, MOVE), populated=(0,), budget=1, prompt=True
    ),
    "as kvmsim ships, two users with two vCPUs each": Setup(
        users=2, vcpus=2, calls=(P,), populated=(0,), direct=True, prompt=True, alike=True
    ),
}  # fmt: skip

INLINE = [
    "one user that hangs, closes its socket or is killed",
    "one user that comes and goes",
    "two pages, three overlapping invalidations",
    "a file that shrinks, grows and is zeroed",
    "a file that its users keep alive",
    "a guest_memfd whose last descriptor is closed",
    "a user that punches by record, with slow timers",
]

KVMSIM = Setup(users=2, vcpus=2, populated=(0,), direct=True, prompt=True, alike=True)

SLOW = {
    "as kvmsim ships, two users with two vCPUs each, two invalidations": replace(
        KVMSIM, calls=(P, P)
    ),
    "as kvmsim ships, two users with two vCPUs each, three invalidations": replace(
        KVMSIM, calls=(P, P, P)
    ),
    "as kvmsim ships, two users with two vCPUs each, any may hang or be killed": replace(
        KVMSIM, calls=(CANCEL,), hang=EVERY, kill=EVERY
    ),
    "two users with two vCPUs each, one invalidation": Setup(
        users=2, vcpus=2, calls=(P,), populated=(0,), alike=True
    ),
    "two users with two vCPUs each, two invalidations": Setup(
        users=2, vcpus=2, calls=(P, P), populated=(0,), alike=True, prompt=True
    ),
    "two users with two vCPUs each, no order at all": Setup(
        users=2, vcpus=2, calls=(P,), populated=(0,), alike=True, prompt=True, direct=True,
        delivery="set",
    ),
    "two users, both may hang, close their sockets or be killed": Setup(
        users=2, calls=(P,), populated=(0,), hang=EVERY, close=EVERY, kill=EVERY, alike=True
    ),
    "two users, one hangs and one closes its socket": Setup(
        users=2, calls=(P, P), populated=(0,), hang=ONE, close=OTHER
    ),
    "two users, one hangs and one is killed": Setup(
        users=2, calls=(CANCEL, P), populated=(0,), hang=ONE, kill=OTHER
    ),
    "two users, each may open another session": Setup(
        users=2, calls=(P,), populated=(0,), close=EVERY, sessions=2, alike=True
    ),
    "two users that both want a file for themselves, come and go and may be killed": Setup(
        users=2, calls=(P,), populated=(0,), exclusive=EVERY, late=EVERY, reregister=1, kill=EVERY,
        prompt=True, direct=True, alike=True
    ),
    "two users that come and go": Setup(
        users=2, calls=(P, P), populated=(0,), reregister=1, alike=True
    ),
    "three users, three invalidations": Setup(
        users=3, calls=(P, P, P), populated=(0,), alike=True, prompt=True, direct=True
    ),
    "two pages, two users, three invalidations": Setup(
        users=2, pages=2, calls=(P, Q, BOTH), populated=(0, 1), alike=True
    ),
    "two pages, one user that fails, three invalidations": Setup(
        pages=2, calls=(CANCEL, Q, BOTH), populated=(0, 1), hang=ONE, close=ONE
    ),
    "three pages, two vCPUs": Setup(
        pages=3, vcpus=2, calls=(BOTH, Call(punch(1, 3))), populated=(0, 1, 2), alike=True,
        prompt=True,
    ),
    "two files, two users": Setup(
        files=2, users=2, calls=(P, SECOND), populated=(0,), alike=True, prompt=True
    ),
    "two files, one user that comes and goes, two invalidations": Setup(
        files=2, calls=(P, SECOND), populated=(0,), reregister=1
    ),
    "no order at all, one user that comes and goes, two invalidations": Setup(
        calls=(P, P), populated=(0,), delivery="set", reregister=1
    ),
    "a file that two users keep alive and punch": Setup(
        users=2, calls=(Call(Release()), own(0, 1)), populated=(0,), reregister=1
    ),
}  # fmt: skip
