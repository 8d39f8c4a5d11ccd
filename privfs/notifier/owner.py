# SPDX-License-Identifier: GPL-2.0-or-later
"""The owner's half of the contract: files, sessions, wait sets, parked faults, the ladder.

This module decides and performs nothing: events go in, effects come out in the order in which
the shell must perform them.  It never waits; a system call waits for its :class:`Answer`.

An invalidation is proven when every user of the file has acknowledged its exact seq, has
unregistered, or is proven dead.  A user that does neither meets the ladder (:class:`Rung`): a
log line, then SIGKILL and proof of exit, then ``EIO`` with nothing freed.
"""

from __future__ import annotations

import enum
import errno
from collections import Counter, deque
from collections.abc import Hashable, Mapping
from typing import Final, NamedTuple

from pyroaring import BitMap

from privfs import extents
from privfs.memfile import (
    Budget,
    Destroy,
    Done,
    Fallocate,
    FaultIn,
    Kind,
    Look,
    MemFile,
    OpId,
    Perform,
    Request,
    Settled,
    Step,
)
from privfs.memfile import (
    Effect as FileEffect,
)
from privfs.notifier.session import Event, Session, State
from privfs.notifier.wire import MAX_GRANT, VERSION, Flag, Op, Reason, Record, words_label
from privfs.personality import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    PAGE_SIZE,
    Personality,
    Refused,
)


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
    """Perform FREE or ALLOCATE on the extents, then call :meth:`Owner.performed`."""

    ino: int
    perform: Perform


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


Effect = Send | Drop | Kill | Forget | Arm | Work | Answer | Expire | Note

_REASONS: Final = {
    Kind.PUNCH: Reason.PUNCH,
    Kind.ZERO: Reason.PUNCH,
    Kind.RESIZE: Reason.TRUNCATE,
    Kind.DESTROY: Reason.REVOKE,
}
_MODES: Final = {
    Op.ALLOCATE: FALLOC_FL_KEEP_SIZE,
    Op.PUNCH: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
}


class _Get(NamedTuple):
    """A fault that has not been answered."""

    sid: int
    ino: int
    record: Record


class _Wait:
    """An invalidation that is not yet proven, and by whom not."""

    __slots__ = ("end", "patience", "rung", "sids", "start")

    def __init__(self, sids: set[int], start: int, end: int, patience: int) -> None:
        self.sids = sids
        self.start = start
        self.end = end
        self.rung = Rung.LOG
        self.patience = patience

    def copy(self) -> _Wait:
        twin = _Wait(self.sids.copy(), self.start, self.end, self.patience)
        twin.rung = self.rung
        return twin


class Owner:
    """All files of one mount and all their users.

    ``kills`` False is the mount option ``t_ack=0``: users are waited for without end.
    ``patience`` is how often CONDEMN is put off while a user is stopped (SIGSTOP).
    ``max_parked`` bounds the parked faults of all sessions, ``max_calls`` the ALLOCATE and PUNCH
    records of one session that are not answered: each is compared with all that come after it.
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
    ) -> None:
        self.personality = personality
        self.budget = Budget(budget_pages)
        self.files: dict[int, MemFile] = {}
        self.sessions: dict[int, Session] = {}
        self.users: dict[int, set[int]] = {}
        self._kills = kills
        self._patience = patience
        self._max_parked = max_parked
        self._max_calls = max_calls
        self._waits: dict[tuple[int, OpId], _Wait] = {}
        self._parked: list[_Get] = []
        self._faults: dict[OpId, _Get] = {}
        self._callers: dict[OpId, tuple[int, int]] = {}
        self._doomed: set[int] = set()
        self._closing = False

    # --- files --------------------------------------------------------------------------------

    def create(self, ino: int) -> None:
        """Begin an empty file."""
        if ino in self.files:
            raise ValueError(f"create: inode {ino} is in use")
        self.files[ino] = MemFile(self.personality, self.budget)
        self.users[ino] = set()

    def request(self, ino: int, op: OpId, request: Request, caller: int = 0) -> list[Effect]:
        """Take a system call on a file; :class:`Answer` ends it.

        ``caller`` is its process, 0 if that is not known yet (:meth:`identify`).
        """
        if caller and any(
            s.pid == caller and s.state in (State.KILLED, State.UNPROVEN)
            for s in self.sessions.values()
        ):
            return [Answer(op, errno.EIO, "the caller is being killed")]
        if ino not in self.files:
            return [Answer(op, errno.ENOENT, f"{request}: inode {ino} has been revoked")]
        self._callers[op] = (ino, caller)
        return self._run(ino, self.files[ino].submit(op, request))

    def identify(self, callers: Mapping[OpId, int]) -> None:
        """Say which processes made calls that are under way; before a rung that may condemn."""
        for op, caller in callers.items():
            if op in self._callers:
                self._callers[op] = (self._callers[op][0], caller)

    @property
    def condemning(self) -> bool:
        """True while a user has been killed and its exit not seen: its calls must be refused."""
        return any(s.state in (State.KILLED, State.UNPROVEN) for s in self.sessions.values())

    def cancel(self, op: OpId, code: int) -> list[Effect]:
        """The caller of ``op`` wants to leave; it is answered with ``code`` if still possible."""
        ino, _ = self._callers.get(op, (0, 0))
        return self._run(ino, self.files[ino].cancel(op, code)) if ino in self.files else []

    def performed(
        self, ino: int, op: OpId, failed: int = 0, upto: int | None = None
    ) -> list[Effect]:
        """Report the end of a :class:`Work`; see :meth:`MemFile.step_done`."""
        return self._run(ino, self.files[ino].step_done(op, failed, upto))

    def release(self, ino: int) -> list[Effect]:
        """The last name and the last descriptor of a file are gone."""
        if ino not in self.files:
            return []  # revoked before
        self._doomed.add(ino)
        if self.personality.pinned_by_users and self.users[ino]:
            return []
        return self._run(ino, self.files[ino].submit(("destroy", ino), Destroy()))

    def shutdown(self) -> list[Effect]:
        """Revoke every file from its users, for good; it has ended when none has any left."""
        self._closing = True
        out: list[Effect] = []
        for ino in [ino for ino, users in self.users.items() if users]:
            if ino not in self._doomed or self.personality.pinned_by_users:
                self._doomed.add(ino)
                out += self._run(ino, self.files[ino].submit(("destroy", ino), Destroy()))
        return out

    # --- sessions -----------------------------------------------------------------------------

    def connect(self, sid: int, pid: int) -> None:
        """Begin a session with process ``pid``."""
        self.sessions[sid] = Session(sid, pid)

    def received(
        self, sid: int, record: Record, file: tuple[int, bool] | int | None = None
    ) -> list[Effect]:
        """Take one checked record.

        ``file`` is what the shell found out: for REGISTER (inode, writable) or an errno, for
        HELLO an errno when the session is refused.
        """
        session = self.sessions.get(sid)
        if session is None:
            return []  # the rest of a frame whose first record ended the session
        if not session.talks and (session.state is not State.NEW or record.op != Op.HELLO):
            return self.broken(sid, f"{Op(record.op).name} in state {session.state.value}")
        handler = _HANDLERS[Op(record.op)]
        return handler(self, session, record, file)

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
        if not session.files and session.state is State.ZOMBIE:
            out += self._end(session, Event.BYE)
        return out

    def gone(self, sid: int) -> list[Effect]:
        """The process is proven dead: nothing of it can reach any page."""
        session = self.sessions.get(sid)
        return self._end(session, Event.EXIT) if session else []

    def timer(self, ino: int, op: OpId, stopped: frozenset[int] = frozenset()) -> list[Effect]:
        """An armed rung is due; ``stopped`` are sessions whose process is SIGSTOPped now."""
        wait = self._waits.get((ino, op))
        if wait is None:
            return []
        names = ", ".join(sorted(self.sessions[s].name for s in wait.sids))
        where = f"inode {ino} pages [{wait.start:#x}, {wait.end:#x})"
        if wait.rung is Rung.LOG:
            wait.rung = Rung.CONDEMN
            note = Note(f"invalidation of {where}: still waiting for {names}")
            return [note, Arm(ino, op, Rung.CONDEMN)] if self._kills else [note]
        if wait.rung is Rung.CONDEMN:
            out: list[Effect] = []
            for sid in sorted(wait.sids - stopped if wait.patience else wait.sids):
                out += self._condemn(self.sessions[sid], where)
            if wait.sids & stopped and wait.patience:
                wait.patience -= 1
                return [*out, Arm(ino, op, Rung.CONDEMN)]
            wait.rung = Rung.GIVE_UP
            return [*out, Arm(ino, op, Rung.GIVE_UP)]
        for sid in wait.sids:
            if self.sessions[sid].state is State.KILLED:
                self.sessions[sid].feed(Event.GIVE_UP)
        del self._waits[ino, op]
        why = f"no proof that {names} cannot reach {where}; nothing was freed"
        return [Note(why, True), *self._run(ino, self.files[ino].abandon(op, errno.EIO, why))]

    # --- records ------------------------------------------------------------------------------

    def _hello(
        self, session: Session, record: Record, refused: tuple[int, bool] | int | None
    ) -> list[Effect]:
        if session.state is not State.NEW:
            return self.broken(session.sid, "second HELLO")
        session.feed(Event.HELLO)
        session.label = words_label(record.obj, record.seq)
        code = refused if isinstance(refused, int) else 0
        if record.start != VERSION:
            code = errno.EPROTONOSUPPORT
        reply = Record(Op.WELCOME, status=code, req=record.req, start=VERSION, seq=session.sid)
        out: list[Effect] = [Send(session.sid, reply)]
        if code:
            out += self.broken(session.sid, f"refused: errno {code}")
        return out

    def _register(
        self, session: Session, record: Record, found: tuple[int, bool] | int | None
    ) -> list[Effect]:
        if not isinstance(found, tuple):
            code = found or errno.EBADF
        else:
            ino, writable = found
            file = self.files.get(ino)
            if file is None or file.dead or ino in self._doomed or self._closing:
                code = errno.ENOENT
            elif ino in session.files:
                code = errno.EEXIST
            else:
                session.files[ino] = writable
                session.granted[ino] = BitMap()
                self.users[ino].add(session.sid)
                # A seq of its own: between an UNREGISTER and this, pages may have gone without
                # an invalidation to this session, so no grant from before may be installed.
                session.next_seq += 1
                return [
                    Send(session.sid, Record(
                        Op.REGISTERED, req=record.req, obj=ino, start=int(writable),
                        end=file.size // PAGE_SIZE, seq=session.next_seq - 1,
                    ))
                ]  # fmt: skip
        return [Send(session.sid, Record(Op.REGISTERED, status=code, req=record.req))]

    def _unregister(self, session: Session, record: Record, _: object) -> list[Effect]:
        ino = record.obj
        if ino not in session.files:
            return [Send(session.sid, _reply(record, errno.ENOENT))]
        proven = [key for key in session.sent.values() if key and key[0] == ino]
        session.sent = {
            seq: None if key and key[0] == ino else key for seq, key in session.sent.items()
        }
        out: list[Effect] = [
            self._page(get, errno.ENOENT)
            for get in self._parked
            if get.sid == session.sid and get.ino == ino
        ]
        out.append(Send(session.sid, _reply(record, 0)))
        self._detach(session, ino)
        for key in proven:
            out += self._proven(key, session.sid)
        return out + self._reap(ino)

    def _get(self, session: Session, record: Record, _: object) -> list[Effect]:
        if not record.start <= record.seq < record.end or record.end - record.start > MAX_GRANT:
            return self.broken(
                session.sid,
                f"GET: page {record.seq:#x} in window [{record.start:#x}, {record.end:#x})",
            )
        return self._serve(_Get(session.sid, record.obj, record))

    def _ack(self, session: Session, record: Record, _: object) -> list[Effect]:
        if record.seq not in session.sent:
            return self.broken(session.sid, f"ACK of seq {record.seq}, which was not outstanding")
        key = session.sent.pop(record.seq)
        return self._proven(key, session.sid) if key else []

    def _call(self, session: Session, record: Record, _: object) -> list[Effect]:
        """ALLOCATE and PUNCH: the system call of a user that must not call the mount."""
        ino = record.obj
        if not session.files.get(ino, False):
            code = errno.ENOENT if ino not in session.files else errno.EACCES
            return [Send(session.sid, _reply(record, code))]
        mode = _MODES[Op(record.op)]
        start, end = record.start * PAGE_SIZE, record.end * PAGE_SIZE
        if record.req in session.calling:
            return self.broken(
                session.sid, f"{Op(record.op).name}: request {record.req} is outstanding"
            )
        if len(session.calling) >= self._max_calls:
            return self.broken(session.sid, f"more than {self._max_calls} calls at a time")
        # Numbers of requests are used again, names of operations are not: a timer that was
        # armed for the last punch must not push the next one up the ladder.
        session.calls += 1
        session.calling.add(record.req)
        op: OpId = ("call", session.sid, record.req, session.calls)
        self._callers[op] = (ino, 0)
        return self._run(ino, self.files[ino].submit(op, Fallocate(mode, start, end - start)))

    def _bye(self, session: Session, record: Record, _: object) -> list[Effect]:
        if session.files:
            return self.broken(session.sid, "BYE while still registered")
        return self._end(session, Event.BYE)

    # --- faults -------------------------------------------------------------------------------

    def _serve(self, get: _Get) -> list[Effect]:
        """Answer a GET, park it, or allocate for it."""
        session = self.sessions.get(get.sid)
        if session is None or not session.talks:
            return []
        record, page = get.record, get.record.seq
        try:
            if get.ino not in session.files:
                raise Refused(errno.ENOENT, f"GET: not registered on inode {get.ino}")
            if record.flags & Flag.WRITE and not session.files[get.ino]:
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
        index = extents.extent_of(page)
        instance = file.instances[index]
        if (get.ino, instance) not in session.known or record.flags & Flag.EXTENT:
            session.known.add((get.ino, instance))
            first, last = extents.extent_range(index)
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

    def _page(self, get: _Get, code: int, instance: int = 0, start: int = 0, end: int = 0) -> Send:
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
            elif effect.step is not Step.INVALIDATE:
                for index, instance in effect.dead:
                    self._bury(ino, index, instance)
                out.append(Work(ino, effect))
            elif self.users[ino]:
                out += self._invalidate(ino, effect)
            else:
                todo.extendleft(reversed(self.files[ino].step_done(effect.op)))
        return out

    def _invalidate(self, ino: int, perform: Perform) -> list[Effect]:
        """Ask every user; the wait set, the records and the timer begin in one step."""
        wait = _Wait(self.users[ino].copy(), perform.start, perform.end, self._patience)
        self._waits[ino, perform.op] = wait
        out: list[Effect] = []
        for sid in sorted(wait.sids):
            session = self.sessions[sid]
            if session.talks:
                seq = session.next_seq
                session.next_seq += 1
                session.sent[seq] = (ino, perform.op)
                reason = _REASONS[perform.kind]
                out.append(
                    Send(sid, Record(
                        Op.INVALIDATE, 0, reason, 0, ino, perform.start, perform.end, seq))
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
        out: list[Effect] = [self._page(get, errno.ENOENT) for get in lost]
        return [*out, Expire(ino)]

    def _unpark(self, ino: int) -> list[Effect]:
        if not self._parked or ino not in self.files:
            return []
        again = [get for get in self._parked if get.ino == ino]
        self._parked = [get for get in self._parked if get.ino != ino]
        return [effect for get in again for effect in self._serve(get)]

    def _bury(self, ino: int, index: int, instance: int) -> None:
        for sid in self.users[ino]:
            self.sessions[sid].known.discard((ino, instance))

    def _condemn(self, session: Session, where: str) -> list[Effect]:
        """Kill a user that does not answer; its own system calls end now, or it could not exit."""
        if session.state is State.KILLED or session.state is State.UNPROVEN:
            return []
        out: list[Effect] = [Note(f"killing {session.name}: no acknowledgement for {where}", True)]
        if session.talks:
            out.append(Drop(session.sid, "no acknowledgement"))
        session.feed(Event.CONDEMN)
        self._parked = [get for get in self._parked if get.sid != session.sid]
        out.append(Kill(session.sid))
        for op, (_, caller) in list(self._callers.items()):
            if caller == session.pid:
                out += self.cancel(op, errno.EIO)
        return out

    def _end(self, session: Session, event: Event) -> list[Effect]:
        session.feed(event)
        sid = session.sid
        out: list[Effect] = []
        inos = list(session.files)
        for ino in inos:
            self._detach(session, ino)
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
        self.users[ino].discard(session.sid)
        session.known = {pair for pair in session.known if pair[0] != ino}
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

    def key(self) -> Hashable:
        """Return the state as a hashable value."""
        return (
            tuple([(ino, f.key()) for ino, f in self.files.items()]),
            tuple([s.key() for s in self.sessions.values()]),
            tuple([(k, tuple(sorted(w.sids)), w.rung.value, w.patience)
                   for k, w in self._waits.items()]),
            tuple(self._parked), tuple(self._faults), tuple(self._callers.items()),
            frozenset(self._doomed), self._closing, self.budget.used,
        )  # fmt: skip

    def copy(self) -> Owner:
        """Return an independent copy."""
        twin = Owner.__new__(type(self))
        twin.personality = self.personality
        twin.budget = self.budget.copy()
        twin.files = {ino: f.copy(twin.budget) for ino, f in self.files.items()}
        twin.sessions = {sid: s.copy() for sid, s in self.sessions.items()}
        twin.users = {ino: u.copy() for ino, u in self.users.items()}
        twin._kills, twin._patience = self._kills, self._patience
        twin._max_parked, twin._max_calls = self._max_parked, self._max_calls
        twin._waits = {k: w.copy() for k, w in self._waits.items()}
        twin._parked = self._parked.copy()
        twin._faults = self._faults.copy()
        twin._callers = self._callers.copy()
        twin._doomed, twin._closing = self._doomed.copy(), self._closing
        return twin


def _reply(record: Record, code: int) -> Record:
    return Record(Op.REPLY, status=code, req=record.req)


_HANDLERS: Final = {
    Op.HELLO: Owner._hello,
    Op.REGISTER: Owner._register,
    Op.UNREGISTER: Owner._unregister,
    Op.GET: Owner._get,
    Op.ACK: Owner._ack,
    Op.ALLOCATE: Owner._call,
    Op.PUNCH: Owner._call,
    Op.BYE: Owner._bye,
}
