# SPDX-License-Identifier: GPL-2.0-or-later
"""The owner's half of the contract: files, sessions, wait sets, parked faults, the ladder.

This module decides and performs nothing: events go in, effects come out in the order in which
the shell must perform them.  It never waits; a system call waits for its :class:`Answer`.

An invalidation is proven when every user of the file has acknowledged its exact seq, has
unregistered, or is proven dead.  A user that does neither meets the ladder (:class:`Rung`): a
log line, then SIGKILL and proof of exit, or of a fence that holds (:meth:`Owner.fenced`), then
``EIO`` with nothing freed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Final

from pyroaring import BitMap

from privfs.memfile import MemFile
from privfs.notifier.effects import Answer, Arm, Effect, Note, Rung, Send, Stray
from privfs.notifier.ownerstate import Get, OwnerState
from privfs.notifier.session import Event, Session, State
from privfs.notifier.wire import MAX_GRANT, VERSION, Fence, Flag, Op, Record, words_label
from privfs.operation import Destroy, Fallocate, OpId, Request
from privfs.personality import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, PAGE_SIZE, Refused
from privfs.seals import Seal

_MODES: Final = {
    Op.ALLOCATE: FALLOC_FL_KEEP_SIZE,
    Op.PUNCH: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
}


class Owner(OwnerState):
    """The events of a mount's contract: system calls, records, deaths, time."""

    # --- files --------------------------------------------------------------------------------

    def create(self, ino: int) -> None:
        """Begin an empty file."""
        if ino in self.files:
            raise ValueError(f"create: inode {ino} is in use")
        self.files[ino] = MemFile(self.personality, self.budget, self._quota)
        self.users[ino] = set()

    def request(self, ino: int, op: OpId, request: Request, caller: int = 0) -> list[Effect]:
        """Take a system call on a file; :class:`Answer` ends it.

        ``caller`` is its process, 0 if that is not known yet (:meth:`identify`).
        """
        if caller and any(s.pid == caller and s.condemned for s in self.sessions.values()):
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
        return any(s.condemned for s in self.sessions.values())

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

    def seal(self, ino: int, mask: int) -> None:
        """Add seals to a file; raises Refused (see :meth:`MemFile.add_seals`)."""
        stores = any(self.sessions[sid].files[ino] for sid in self.users[ino])
        self.files[ino].add_seals(mask, stores=stores)

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
        handler = _HANDLERS[record.op]
        return handler(self, session, record, file)

    def gone(self, sid: int) -> list[Effect]:
        """The process is proven dead: nothing of it can reach any page."""
        session = self.sessions.get(sid)
        return self._end(session, Event.EXIT) if session else []

    def fenced(self, sid: int) -> list[Effect]:
        """No thread of a killed process will return to its program, though it has not exited.

        If it has a fence, that is a proof for the files that it may store to: nothing but the
        process itself could lift the fence, and without one the rest of a system call could still
        touch, and so allocate, what is freed.
        """
        session = self.sessions.get(sid)
        if session is None or not session.condemned or session.fence is not Fence.UFFD:
            return []
        inos = [ino for ino, writable in session.files.items() if writable]
        if not inos:
            return []
        session.feed(Event.FENCE)
        what = ", ".join(map(str, inos))
        out: list[Effect] = [
            Note(f"{session.name} does not exit, but is fenced off from inode {what}", True)
        ]
        for ino in inos:
            self._detach(session, ino)
        for key in [k for k, w in self._waits.items() if k[0] in inos and sid in w.sids]:
            out += self._proven(key, sid)
        for ino in inos:
            out += self._reap(ino)
        return out

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
                out += self._condemn(self.sessions[sid], f"no acknowledgement for {where}")
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

    def strayed(
        self, ino: int, index: int, start: int, end: int, what: str, *, certain: bool
    ) -> list[Effect]:
        """Extent ``index`` of a file holds memory in ``[start, end)`` that its bitmap has not.

        Somebody touched it after all users had promised not to; ``certain`` if nothing else can be
        the reason.  Whoever it was for certain is killed; on doubt nobody is.
        """
        held = self.holders.of((ino, self.files[ino].instances[index]))
        users = [self.sessions[sid] for sid in sorted(held.alive)]
        out: list[Effect] = [Stray(ino, start, end, what, tuple(user.name for user in users))]
        alone = len({user.pid for user in users}) == 1 and not held.dead and not held.left
        if certain and alone and self._kills:
            where = f"inode {ino} pages [{start:#x}, {end:#x})"
            for user in users:
                out += self._condemn(user, f"nobody else can have touched freed memory, {where}")
        return out

    # --- records ------------------------------------------------------------------------------

    def _hello(
        self, session: Session, record: Record, refused: tuple[int, bool] | int | None
    ) -> list[Effect]:
        if session.state is not State.NEW:
            return self.broken(session.sid, "second HELLO")
        session.feed(Event.HELLO)
        session.label = words_label(record.obj, record.seq)
        session.fence = Fence(record.status)
        code = refused if isinstance(refused, int) else 0
        if record.start != VERSION:
            code = errno.EPROTONOSUPPORT
        old = self.sessions.get(record.end) if record.end else None
        if (
            record.end
            and not code
            and not (old is not None and old.pid == session.pid and old.state is State.ZOMBIE)
        ):
            code = errno.ESRCH  # gone already, alive, or another's: there is nothing to replace
            old = None
        reply = Record(Op.WELCOME, status=code, req=record.req, start=VERSION, seq=session.sid)
        out: list[Effect] = [Send(session.sid, reply)]
        if code:
            out += self.broken(session.sid, f"refused: errno {code}")
        elif old is not None:
            self.exclusive.replaced(old.sid, session.sid)
            out += self._end(old, Event.REPLACED)
        return out

    def _register(
        self, session: Session, record: Record, found: tuple[int, bool] | int | None
    ) -> list[Effect]:
        if not isinstance(found, tuple):
            code = found or errno.EBADF
        else:
            ino, writable = found
            exclusive = bool(record.flags & Flag.EXCLUSIVE)
            file = self.files.get(ino)
            if file is None or file.dead or ino in self._doomed or self._closing:
                code = errno.ENOENT
            elif ino in session.files:
                code = errno.EEXIST
            elif not writable and not self.personality.read_only_users:
                code = errno.EACCES
            elif self.exclusive.refuses(ino, session.sid, self.users[ino], exclusive=exclusive):
                code = errno.EBUSY
            elif (refused := _promised(file, record.start)) is not None:
                code = refused.errno
            else:
                writable = writable and not file.seals & Seal.WRITE
                session.files[ino] = writable
                session.granted[ino] = BitMap()
                self.users[ino].add(session.sid)
                self.exclusive.registered(ino, session.sid, exclusive=exclusive)
                file.users = len(self.users[ino])
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
            code = 0 if self.exclusive.left(ino, session.sid) else errno.ENOENT
            return [Send(session.sid, _reply(record, code))]
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
        return self._serve(Get(session.sid, record.obj, record))

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


def _promised(file: MemFile, purpose: int) -> Refused | None:
    """Bind a file to a purpose; what it is refused with, if it is."""
    try:
        file.promise(purpose)
    except Refused as refused:
        return refused
    return None


def _reply(record: Record, code: int) -> Record:
    return Record(Op.REPLY, status=code, req=record.req)


_HANDLERS: Final[
    dict[int, Callable[[Owner, Session, Record, tuple[int, bool] | int | None], list[Effect]]]
] = {
    Op.HELLO: Owner._hello,
    Op.REGISTER: Owner._register,
    Op.UNREGISTER: Owner._unregister,
    Op.GET: Owner._get,
    Op.ACK: Owner._ack,
    Op.ALLOCATE: Owner._call,
    Op.PUNCH: Owner._call,
    Op.BYE: Owner._bye,
}
