# SPDX-License-Identifier: GPL-2.0-or-later
"""What follows from an event at the owner: wait sets, proofs, parked faults, ends of sessions.

:class:`OwnerState` holds the state of a mount's contract and moves it along; the events
themselves are in :mod:`privfs.notifier.owner`.  Nothing here waits or performs anything.
"""

from __future__ import annotations

import errno
from collections import Counter, deque
from collections.abc import Hashable
from typing import Final, NamedTuple, Self

from privfs.budget import Budget
from privfs.memfile import Look, MemFile
from privfs.notifier.effects import (
    Answer,
    Arm,
    Drop,
    Effect,
    Expire,
    Forget,
    Kill,
    Migrated,
    Note,
    Rung,
    Send,
    Work,
)
from privfs.notifier.exclusive import Exclusive
from privfs.notifier.holders import Ledger
from privfs.notifier.session import Event, Session, State
from privfs.notifier.wire import Flag, Op, Reason, Record
from privfs.operation import (
    Destroy,
    Done,
    FaultIn,
    Kind,
    Moved,
    OpId,
    Perform,
    Settled,
    Step,
)
from privfs.operation import Effect as FileEffect
from privfs.personality import Personality, Refused

_WRITE: Final = int(Flag.WRITE)  # the operators of an IntFlag are slow
_EXTENT: Final = int(Flag.EXTENT)
_REASONS: Final = {
    Kind.PUNCH: Reason.PUNCH,
    Kind.ZERO: Reason.PUNCH,
    Kind.RESIZE: Reason.TRUNCATE,
    Kind.DESTROY: Reason.REVOKE,
    Kind.MIGRATE: Reason.MOVE,
}


class Get(NamedTuple):
    """A fault that has not been answered."""

    sid: int
    ino: int
    record: Record


class Wait:
    """An invalidation that is not yet proven, and by whom not."""

    __slots__ = ("end", "patience", "rung", "sids", "start")

    def __init__(self, sids: set[int], start: int, end: int, patience: int) -> None:
        self.sids = sids
        self.start = start
        self.end = end
        self.rung = Rung.LOG
        self.patience = patience

    def copy(self) -> Wait:
        """Return an independent copy."""
        twin = Wait(self.sids.copy(), self.start, self.end, self.patience)
        twin.rung = self.rung
        return twin


class OwnerState:
    """All files of one mount and all their users.

    ``kills`` False is the mount option ``t_ack=0``: users are waited for without end.
    ``patience`` is how often CONDEMN is put off while a user is stopped (SIGSTOP).
    ``max_parked`` bounds the parked faults of all sessions, ``max_calls`` the ALLOCATE and PUNCH
    records of one session that are not answered: each is compared with all that come after it.
    ``quota_pages`` bounds every file, 0 does not.
    """

    def __init__(
        self,
        personality: Personality,
        budget_pages: int,
        *,
        kills: bool = True,
        patience: int = 14,
        max_parked: int = 4096,
        max_calls: int = 256,
        quota_pages: int = 0,
    ) -> None:
        self.personality = personality
        self.budget = Budget(budget_pages)
        self.files: dict[int, MemFile] = {}
        self.sessions: dict[int, Session] = {}
        self.users: dict[int, set[int]] = {}
        self.exclusive = Exclusive()
        self.holders = Ledger()  # decides nothing but whom a touch of freed memory is blamed on
        self._quota = quota_pages
        self._kills = kills
        self._patience = patience
        self._max_parked = max_parked
        self._max_calls = max_calls
        self._waits: dict[tuple[int, OpId], Wait] = {}
        self._parked: list[Get] = []
        self._faults: dict[OpId, Get] = {}
        self._callers: dict[OpId, tuple[int, int]] = {}
        self._doomed: set[int] = set()
        self._closing = False

    # --- ends -----------------------------------------------------------------------------------

    def cancel(self, op: OpId, code: int) -> list[Effect]:
        """The caller of ``op`` wants to leave; it is answered with ``code`` if still possible."""
        ino, _ = self._callers.get(op, (0, 0))
        return self._run(ino, self.files[ino].cancel(op, code)) if ino in self.files else []

    def broken(self, sid: int, why: str) -> list[Effect]:
        """The socket ended, or the peer broke the protocol: silence, but no proof of anything."""
        session = self.sessions.get(sid)
        if session is None:
            return []
        out: list[Effect] = []
        if session.state in (State.NEW, State.OPEN):
            out.append(Drop(sid, why))
        session.feed(Event.BREAK)
        self._parked = [get for get in self._parked if get.sid != sid]
        if session.state is State.ZOMBIE and not session.files and not self.exclusive.of(sid):
            out += self._end(session, Event.BYE)
        return out

    # --- faults -------------------------------------------------------------------------------

    def _serve(self, get: Get) -> list[Effect]:
        """Answer a GET, park it, or allocate for it."""
        session = self.sessions.get(get.sid)
        if session is None or not session.talks:
            return []
        record, page = get.record, get.record.seq
        try:
            if get.ino not in session.files:
                raise Refused(errno.ENOENT, f"GET: not registered on inode {get.ino}")
            if record.flags & _WRITE and not session.files[get.ino]:
                raise Refused(errno.EACCES, f"GET for store: read-only user of inode {get.ino}")
            file = self.files[get.ino]
            look = file.look(page)
        except Refused as refused:
            return [self._page(get, refused.errno)]
        if look is Look.PARK:
            if len(self._parked) >= self._max_parked:
                return [*self._flooded(), *self._serve(get)]
            self._parked.append(get)
            return []
        if look is Look.HOLE:
            op: OpId = ("get", get.sid, record.req)
            if op in self._faults:
                return self.broken(get.sid, f"GET: request {record.req} is outstanding")
            self._faults[op] = get
            return self._run(get.ino, file.submit(op, FaultIn(page)))
        out: list[Effect] = []
        index = file.personality.layout.extent_of(page)
        instance = file.instances[index]
        if (get.ino, instance) not in session.known or record.flags & _EXTENT:
            session.known.add((get.ino, instance))
            self.holders.given((get.ino, instance), get.sid)
            first, last = file.personality.layout.extent_range(index)
            memfd = (get.ino, index, session.files[get.ino])
            out.append(
                Send(get.sid, Record(
                    Op.EXTENT, Flag.FD, obj=get.ino, start=first, end=last, seq=instance), memfd)
            )  # fmt: skip
        start, end = file.window(page, record.start, record.end)
        session.granted[get.ino].add_range(start, end)
        out.append(self._page(get, 0, instance, start, end))
        return out

    def _flooded(self) -> list[Effect]:
        """Make room for a parked fault: the session that holds most of them goes."""
        ((sid, held),) = Counter(get.sid for get in self._parked).most_common(1)
        return self.broken(sid, f"{held} of {self._max_parked} parked faults are its own")

    def _page(self, get: Get, code: int, instance: int = 0, start: int = 0, end: int = 0) -> Send:
        seq = self.sessions[get.sid].next_seq - 1
        record = Record(Op.PAGE, 0, code, get.record.req, instance, start, end, seq)
        return Send(get.sid, record)

    # --- the machine --------------------------------------------------------------------------

    def _run(self, ino: int, effects: list[FileEffect]) -> list[Effect]:
        """Turn a file's effects into ours, following those that we perform ourselves."""
        out: list[Effect] = []
        todo = deque(effects)
        while todo:
            effect = todo.popleft()
            if isinstance(effect, Settled):
                out += self._unpark(ino)
            elif isinstance(effect, Done):
                out += self._done(ino, effect)
            elif isinstance(effect, Moved):
                out.append(Migrated(ino, effect))
            elif effect.step is not Step.INVALIDATE:
                for _, instance in effect.dead:
                    self._bury(ino, instance)
                out.append(Work(ino, effect))
            elif self.users[ino]:
                out += self._invalidate(ino, effect)
            else:
                todo.extendleft(reversed(self.files[ino].step_done(effect.op)))
        return out

    def _invalidate(self, ino: int, perform: Perform) -> list[Effect]:
        """Ask every user; the wait set, the records and the timer begin in one step."""
        wait = Wait(self.users[ino].copy(), perform.start, perform.end, self._patience)
        self._waits[ino, perform.op] = wait
        out: list[Effect] = []
        dies = self.personality.layout.whole or perform.kind is Kind.MIGRATE
        flags = Flag.EXTENT if dies else Flag.NONE
        for sid in sorted(wait.sids):
            session = self.sessions[sid]
            if session.talks:
                seq = session.next_seq
                session.next_seq += 1
                session.sent[seq] = (ino, perform.op)
                reason = _REASONS[perform.kind]
                out.append(
                    Send(sid, Record(
                        Op.INVALIDATE, flags, reason, 0, ino, perform.start, perform.end, seq))
                )  # fmt: skip
        out.append(Arm(ino, perform.op, Rung.LOG))
        return out

    def _proven(self, key: tuple[int, OpId], sid: int) -> list[Effect]:
        wait = self._waits.get(key)
        if wait is None:
            return []  # the ladder gave it up before this proof came
        wait.sids.discard(sid)
        session = self.sessions.get(sid)
        if session is not None and key[0] in session.granted:
            session.granted[key[0]].remove_range(wait.start, wait.end)
        if wait.sids:
            return []
        del self._waits[key]
        ino, op = key
        return self._run(ino, self.files[ino].step_done(op))

    def _done(self, ino: int, done: Done) -> list[Effect]:
        op = done.op
        self._callers.pop(op, None)
        match op:
            case ("get", int(), int()):
                get = self._faults.pop(op)
                if done.errno == 0:
                    return self._serve(get)
                known = get.sid in self.sessions and self.sessions[get.sid].talks
                code = errno.ENOMEM if done.errno == errno.ENOSPC else done.errno
                return [self._page(get, code)] if known else []
            case ("call", int(sid), int(req), int()):
                session = self.sessions.get(sid)
                if session is None:
                    return []
                session.calling.discard(req)
                reply = Record(Op.REPLY, status=done.errno, req=req)
                return [Send(sid, reply)] if session.talks else []
            case ("destroy", _):
                return self._destroyed(ino) if done.errno == 0 else []
        return [Answer(op, done.errno, done.why)]

    def _destroyed(self, ino: int) -> list[Effect]:
        for sid in self.users.pop(ino):
            self.sessions[sid].files.pop(ino, None)
            self.sessions[sid].granted.pop(ino, None)
        self._doomed.discard(ino)
        lost = [get for get in self._parked if get.ino == ino]
        self._parked = [get for get in self._parked if get.ino != ino]
        del self.files[ino]
        self.exclusive.expired(ino)
        out: list[Effect] = [self._page(get, errno.ENOENT) for get in lost]
        return [*out, Expire(ino)]

    def _unpark(self, ino: int) -> list[Effect]:
        if not self._parked or ino not in self.files:
            return []
        again = [get for get in self._parked if get.ino == ino]
        self._parked = [get for get in self._parked if get.ino != ino]
        return [effect for get in again for effect in self._serve(get)]

    def _bury(self, ino: int, instance: int) -> None:
        self.holders.buried((ino, instance))
        for sid in self.users[ino]:
            session = self.sessions[sid]
            if (ino, instance) in session.known:
                session.known.discard((ino, instance))
                self._given_up(session, 1)

    def _given_up(self, session: Session, extents: int) -> None:
        if self.personality.layout.whole:
            session.given_up += extents * self.personality.layout.pages

    def _condemn(self, session: Session, why: str) -> list[Effect]:
        """Kill a user; its own system calls end now, or it could not exit."""
        if session.condemned:
            return []
        out: list[Effect] = [Note(f"killing {session.name}: {why}", True), Kill(session.sid)]
        if session.talks:
            out.append(Drop(session.sid, why))
        session.feed(Event.CONDEMN)
        self._parked = [get for get in self._parked if get.sid != session.sid]
        for op, (_, caller) in list(self._callers.items()):
            if caller == session.pid:
                out += self.cancel(op, errno.EIO)
        return out

    def _end(self, session: Session, event: Event) -> list[Effect]:
        session.feed(event)
        sid = session.sid
        self.holders.ended(sid, dead=event is Event.EXIT)
        out: list[Effect] = []
        inos = list(session.files)
        for ino in inos:
            self._detach(session, ino)
        self.exclusive.ended(sid)
        del self.sessions[sid]
        self._parked = [get for get in self._parked if get.sid != sid]
        for key in [key for key, wait in self._waits.items() if sid in wait.sids]:
            out += self._proven(key, sid)
        for ino in inos:
            out += self._reap(ino)
        return [*out, Forget(sid)]

    def _detach(self, session: Session, ino: int) -> None:
        del session.files[ino]
        del session.granted[ino]
        self.exclusive.left(ino, session.sid)
        self.users[ino].discard(session.sid)
        self.files[ino].users = len(self.users[ino])
        known = {pair for pair in session.known if pair[0] != ino}
        self._given_up(session, len(session.known) - len(known))
        session.known = known
        self._parked = [g for g in self._parked if g.sid != session.sid or g.ino != ino]

    def _reap(self, ino: int) -> list[Effect]:
        """Destroy a released file whose last user has left."""
        if ino not in self._doomed or self.users[ino]:
            return []
        return self._run(ino, self.files[ino].submit(("destroy", ino), Destroy()))

    # --- views --------------------------------------------------------------------------------

    def waiting_for(self, ino: int, op: OpId) -> frozenset[int]:
        """Return the sessions that an invalidation still waits for."""
        wait = self._waits.get((ino, op))
        return frozenset(wait.sids) if wait else frozenset()

    def outstanding(self, sid: int) -> list[tuple[int, int, OpId, int, int]]:
        """Return what a session has not acknowledged: seq, inode, operation, pages [start, end).

        What is nobody's concern any more, after an UNREGISTER or by the ladder, is left out.
        """
        return [
            (seq, *key, self._waits[key].start, self._waits[key].end)
            for seq, key in self.sessions[sid].sent.items()
            if key is not None and key in self._waits
        ]

    def key(self) -> Hashable:
        """Return the state as a hashable value."""
        return (
            tuple([(ino, f.key()) for ino, f in self.files.items()]),
            tuple([s.key() for s in self.sessions.values()]),
            tuple([(k, tuple(sorted(w.sids)), w.rung.value, w.patience)
                   for k, w in self._waits.items()]),
            tuple(self._parked), tuple(self._faults), tuple(self._callers.items()),
            frozenset(self._doomed), self._closing, self.budget.used,
            self.exclusive.key(),
        )  # fmt: skip

    def copy(self) -> Self:
        """Return an independent copy."""
        twin = type(self).__new__(type(self))
        twin.personality = self.personality
        twin.budget = self.budget.copy()
        twin.files = {ino: f.copy(twin.budget) for ino, f in self.files.items()}
        twin.sessions = {sid: s.copy() for sid, s in self.sessions.items()}
        twin.users = {ino: u.copy() for ino, u in self.users.items()}
        twin.exclusive = self.exclusive.copy()
        twin.holders = self.holders.copy()
        twin._kills, twin._patience = self._kills, self._patience
        twin._quota = self._quota
        twin._max_parked, twin._max_calls = self._max_parked, self._max_calls
        twin._waits = {k: w.copy() for k, w in self._waits.items()}
        twin._parked = self._parked.copy()
        twin._faults = self._faults.copy()
        twin._callers = self._callers.copy()
        twin._doomed, twin._closing = self._doomed.copy(), self._closing
        return twin
