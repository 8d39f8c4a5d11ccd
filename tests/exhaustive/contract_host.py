# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory side: the owner that ships, memory, the system calls under way, the ladder's timers.

What is played here is what the daemon's shells play: steps are performed on "memory", records are
carried out, processes are killed.  Every page of memory has a *generation*, which counts how often
it was freed; a grant remembers the generation it was made for.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple, Self

from contract_values import (
    SEEN,
    Call,
    Cores,
    Letter,
    Page,
    Parcel,
    Release,
    Setup,
    Shutdown,
    allocate,
    freed_by,
    put,
    resize,
    without,
)

from privfs.notifier.effects import Answer, Arm, Drop, Effect, Kill, Rung, Send, Work
from privfs.notifier.session import State
from privfs.notifier.wire import Op
from privfs.operation import Kind, OpId, Perform, Step
from privfs.personality import PAGE_SIZE

Timer = tuple[int, OpId, int, Rung]
"""Inode, operation, number of the invalidation it was armed for, rung."""


class CallState(NamedTuple):
    """``before`` holds the generations of allocated pages at the time of the call."""

    started: bool = False
    status: int | None = None
    before: tuple[Page, ...] = ()


class Host:
    """The owner of all files.

    User ``p`` is process ``100 + p``, and its session number ``k`` has the id that :meth:`sid`
    says.
    """

    def __init__(self, setup: Setup, cores: Cores) -> None:
        self.setup, self.cores = setup, cores
        self.owner = cores.owner(setup.personality, setup.budget, patience=setup.patience)
        self.generation = ((0,) * setup.pages,) * setup.files
        self.held: frozenset[tuple[int, int]] = frozenset()
        self.calls = (CallState(),) * len(setup.calls)
        self.works: tuple[Work, ...] = ()
        self.timers: tuple[Timer, ...] = ()
        self.chains: tuple[tuple[OpId, int], ...] = ()  #: op → invalidations that it has begun
        self.gets: tuple[tuple[int, int, int], ...] = ()  #: session, request, inode
        self.copied: frozenset[OpId] = frozenset()  #: moves whose bytes are in the new extent
        self.problem: str | None = None
        self._saying: list[tuple[Any, ...]] = []
        for ino in setup.inos:
            self.owner.create(ino)
            self.owner.files[ino] = cores.file(setup.personality, self.owner.budget)
            self.owner.request(ino, "size", resize(setup.pages if setup.size < 0 else setup.size))
            for page in setup.populated:
                self._do(self.owner.request(ino, "fill", allocate(page, page + 1)))
                while self.works:
                    self._do(self._perform(0))

    def sid(self, p: int, session: int) -> int:
        return 1 + p + self.setup.users * session

    # --- a part of the world ------------------------------------------------------------------

    def copy(self) -> Self:
        twin = type(self).__new__(type(self))
        twin.__dict__ = self.__dict__ | {"_saying": []}
        return twin

    def key(self) -> Hashable:
        return (self.owner.key(), self.generation, self.held, self.calls, self.works, self.timers,
                self.chains, self.gets, self.copied, self.problem)  # fmt: skip

    def take(self, event: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        """Do what ``event`` says; the words (user, what, …) that come back are for users."""
        self.owner = self.owner.copy()
        getattr(self, f"_on_{event[0]}")(*event[1:])
        talking = self.open()
        self.gets = tuple([get for get in self.gets if get[0] in talking])
        if not self.setup.stale:
            self.timers = tuple([t for t in self.timers if self.owner.waiting_for(*t[:2])])
        self.problem = self.problem or self._audit()
        said = tuple(self._saying)
        self._saying.clear()
        return said

    # --- what others look at ------------------------------------------------------------------

    def alive(self) -> frozenset[Page]:
        """Return the pages that may be reached, with their generations."""
        return frozenset([(i, p, self.generation[i - 1][p]) for i, p in self.held])

    def open(self) -> frozenset[int]:
        """Return the ids of the sessions whose socket the owner reads."""
        sessions = self.owner.sessions.values()
        return frozenset([s.sid for s in sessions if s.state in (State.NEW, State.OPEN)])

    def deaf(self) -> frozenset[int]:
        """Return the users with a session that has ended and is not gone."""
        sessions = self.owner.sessions.values()
        return frozenset([
            (s.sid - 1) % self.setup.users for s in sessions
            if s.state not in (State.NEW, State.OPEN)
        ])  # fmt: skip

    def in_call(self) -> frozenset[int]:
        """Return the users in a system call: in state D, they cannot exit before the answer."""
        pairs = zip(self.setup.calls, self.calls, strict=True)
        return frozenset([
            c.caller for c, s in pairs
            if c.caller >= 0 and not c.record and s.started and s.status is None
        ])  # fmt: skip

    def unanswered(self) -> frozenset[int]:
        """Return who waits for an answer: -1 for a caller of the mount."""
        pairs = zip(self.setup.calls, self.calls, strict=True)
        return frozenset([
            c.caller if c.record else -1 for c, s in pairs if s.started and s.status is None
        ])  # fmt: skip

    def quiet(self) -> bool:
        """No work, nothing under way, nothing parked; who should be gone is.

        A file that is released and has no users is gone; one that was revoked has no users,
        unless the exit of one is never seen.
        """
        owner = self.owner
        if self.works or any(not f.idle for f in owner.files.values()) or owner._parked:
            return False
        for call, state in zip(self.setup.calls, self.calls, strict=True):
            if not state.started or call.ino not in owner.files:
                continue
            users = owner.users[call.ino]
            if isinstance(call.request, Release) and not users:
                return False
            if isinstance(call.request, Shutdown) and users and not self.setup.immortal:
                return False
        return True

    # --- what can happen ----------------------------------------------------------------------

    def events(self) -> Iterator[tuple[tuple[Any, ...], frozenset[int]]]:
        """Return (event, users none of whom may be healthy).

        A timer is far slower than a healthy user; a stale one may fire at any time.
        """
        nobody: frozenset[int] = frozenset()
        for event in self._call_events():
            yield event, nobody
        for i, (_, perform) in enumerate(self.works):
            yield ("perform", i, perform.step.value, perform.op), nobody
            if perform.step in (Step.ALLOCATE, Step.COPY):
                for code in self.setup.fails:
                    yield ("fail", i, code, 0, perform.op), nobody
                    if perform.step is Step.ALLOCATE and perform.end - perform.start > 1:
                        yield ("fail", i, code, 1, perform.op), nobody
        for i, (ino, op, number, rung) in enumerate(self.timers):
            waiting = self.owner.waiting_for(ino, op)
            if dict(self.chains)[op] != number:
                waiting = nobody
            users = frozenset([(sid - 1) % self.setup.users for sid in waiting])
            yield ("timer", i, rung.value, op), users

    def _call_events(self) -> Iterator[tuple[Any, ...]]:
        for i, (call, state) in enumerate(zip(self.setup.calls, self.calls, strict=True)):
            if not state.started:
                yield "call", i
                return
            if call.cancel and state.status is None:
                yield "cancel", i

    # --- calls, memory, timers ----------------------------------------------------------------

    def _on_call(self, i: int) -> None:
        call = self.setup.calls[i]
        before = tuple(sorted(page for page in self.alive() if page[0] == call.ino))
        self._call(i, CallState(True, None, before))
        if call.record:
            self._saying.append((call.caller, "call", i, *_record(call)))
            return
        if isinstance(call.request, Release | Shutdown):
            self._call(i, CallState(True, 0))
            goes = isinstance(call.request, Shutdown)
            self._do(self.owner.shutdown() if goes else self.owner.release(call.ino))
        else:
            caller = 100 + call.caller if call.caller >= 0 else 0
            self._do(self.owner.request(call.ino, i, call.request, caller))

    def _on_cancel(self, i: int) -> None:
        self._do(self.owner.cancel(i, errno.EINTR))

    def _on_perform(self, i: int, *_: Hashable) -> None:
        self._do(self._perform(i))

    def _on_fail(self, i: int, code: int, pages: int, _: Hashable) -> None:
        self._do(self._perform(i, code, self.works[i].perform.start + pages))

    def _perform(self, i: int, failed: int = 0, upto: int | None = None) -> list[Effect]:
        ino, perform = self.works[i]
        end = perform.end if upto is None else upto
        pages = range(perform.start, min(end, self.setup.pages))
        if perform.step is Step.ALLOCATE:
            self.held |= {(ino, page) for page in pages}
        elif perform.kind is Kind.MIGRATE:
            if not failed:
                self._move(ino, perform, pages)
        else:
            self._free(ino, perform, pages)
        self.works = without(self.works, i)
        return self.owner.performed(ino, perform.op, failed, upto)

    def _move(self, ino: int, perform: Perform, pages: range) -> None:
        """Copy an extent, or end the old one.

        From the moment in which a page is copied, the old one is gone: what is stored there now is
        lost, though it is still there to be stored to.
        """
        here = {page for page in pages if (ino, page) in self.held}
        if perform.step is Step.COPY:
            self._again(ino, here)
            self.copied |= {perform.op}
        elif here:
            if perform.op not in self.copied:
                self._wrong(f"call {perform.op} ends an extent whose bytes are nowhere else")
            if set(perform.dead) & set(self.owner.files[ino].instances.items()):
                self._wrong(f"call {perform.op} ends the extent that users are given")

    def _again(self, ino: int, pages: set[int]) -> None:
        """Begin a new generation of pages."""
        counts = [n + (page in pages) for page, n in enumerate(self.generation[ino - 1])]
        self.generation = put(self.generation, ino - 1, tuple(counts))

    def _free(self, ino: int, perform: Perform, pages: range) -> None:
        self._again(ino, {page for page in pages if (ino, page) in self.held})
        self.held -= {(ino, page) for page in pages}
        if isinstance(perform.op, int) and self.calls[perform.op].status is not None:
            self._wrong(f"call {perform.op} frees after it was answered")

    def _on_timer(self, i: int, _rung: str, _op: OpId, stopped: tuple[int, ...]) -> None:
        ino, op, number, rung = self.timers[i]
        SEEN.add(rung)
        self.timers = without(self.timers, i)
        sids = {s for s in self.owner.sessions if (s - 1) % self.setup.users in stopped}
        self._do(self.owner.timer(ino, op, frozenset(sids)), number)

    # --- users --------------------------------------------------------------------------------

    def _on_connect(self, p: int, session: int) -> None:
        self.owner.connect(self.sid(p, session), 100 + p)

    def _on_gone(self, p: int) -> None:
        """The exit of the process is seen, by the watch of each of its sessions."""
        for session in range(self.setup.sessions):
            self._do(self.owner.gone(self.sid(p, session)))

    def _on_fenced(self, p: int) -> None:
        """No thread of the process will return to its program."""
        for session in range(self.setup.sessions):
            self._do(self.owner.fenced(self.sid(p, session)))

    def _on_echo(self, p: int) -> None:
        """The shell tells twice that a socket has ended."""
        for session in range(self.setup.sessions):
            if self.sid(p, session) not in self.open():
                self._do(self.owner.broken(self.sid(p, session), "end of file"))

    def _on_parcel(self, p: int, session: int, parcel: Parcel | None) -> None:
        sid = self.sid(p, session)
        if parcel is None:
            self._do(self.owner.broken(sid, "end of file"))
            return
        record, ino = parcel
        if record.op == Op.HELLO and record.end:  # the user counts its sessions, we name them
            record = record._replace(end=self.sid(p, record.end - 1))
        if record.op == Op.GET:
            self.gets = (*self.gets, (sid, record.req, record.obj))
        found = (ino, p not in self.setup.readers) if record.op == Op.REGISTER else None
        self._do(self.owner.received(sid, record, found))

    def _on_answered(self, _: int, i: int, code: int) -> None:
        self._answered(i, code)

    # --- effects ------------------------------------------------------------------------------

    def _do(self, effects: list[Effect], number: int = 0) -> None:
        """Perform the owner's effects as its shell does, in their order."""
        todo = deque(self._decided(effects))
        users = self.setup.users
        while todo:
            effect, made_for = todo.popleft()
            SEEN.add(type(effect))
            match effect:
                case Send(sid, record, _):
                    p, k = (sid - 1) % users, (sid - 1) // users
                    self._saying.append((p, "letter", k, Letter(record, made_for)))
                    if record.op == Op.PAGE:
                        self.gets = tuple([g for g in self.gets if g[:2] != (sid, record.req)])
                case Drop(sid, why):
                    p, k = (sid - 1) % users, (sid - 1) // users
                    self._saying.append((p, "dropped", k))
                    if not why.startswith("refused"):  # of HELLO: no fault of the user
                        self._saying.append((p, "judged", k, why))
                case Kill(sid):
                    self._saying.append(((sid - 1) % users, "condemned"))
                case Arm(ino, op, rung):
                    self._arm(ino, op, rung, number)
                case Work():
                    self.works = (*self.works, effect)
                    if self.setup.inline:
                        more = self._decided(self._perform(len(self.works) - 1))
                        todo.extendleft(reversed(more))
                case Answer(op, code, _):
                    if isinstance(op, int):
                        self._answered(op, code)
                case _:
                    pass

    def _decided(self, effects: list[Effect]) -> list[tuple[Effect, tuple[int, ...]]]:
        """Judge every grant at the moment at which the owner decided it."""
        out: list[tuple[Effect, tuple[int, ...]]] = []
        for effect in effects:
            made_for: tuple[int, ...] = ()
            if isinstance(effect, Send) and effect.record.op == Op.PAGE and effect.record.end:
                record = effect.record
                ino = self._file_of(effect.sid, record.req)
                made_for = self.generation[ino - 1][record.start : record.end]
                for _, step, start, end in self.owner.files[ino].operations():
                    hits = start < record.end and record.start < end and step != "allocate"
                    if hits and self.cores.audits_grants:
                        self._wrong(f"pages [{start}, {end}) are granted while they go away")
            out.append((effect, made_for))
        return out

    def _file_of(self, sid: int, req: int) -> int:
        """Say which file a grant is of: PAGE names a request, and that its file."""
        return next(ino for *get, ino in self.gets if get == [sid, req])

    def _arm(self, ino: int, op: OpId, rung: Rung, number: int) -> None:
        chains = dict(self.chains)
        if rung is Rung.LOG:
            number = chains[op] = chains.get(op, 0) + 1
        self.timers = (*self.timers, (ino, op, number, rung))
        self.chains = tuple(chains.items())

    def _answered(self, i: int, code: int) -> None:
        call, state = self.setup.calls[i], self.calls[i]
        if state.status is not None:
            self._wrong(f"call {i} is answered twice")
        self._call(i, state._replace(status=code, before=()))
        self.copied -= {i}
        gone = freed_by(call.request, self.setup.personality)
        for ino, page, generation in state.before:
            if not code and page in gone and self.generation[ino - 1][page] == generation:
                self._wrong(f"call {i} was answered, but page {page} was never freed")

    # --- the audit ----------------------------------------------------------------------------

    def _audit(self) -> str | None:
        if self.works:
            return None
        for ino, file in self.owner.files.items():
            held = {page for file_ino, page in self.held if file_ino == ino}
            if set(file.pages) != held:
                return f"the bitmap of file {ino} holds {set(file.pages)}, the memory {held}"
        used = self.owner.budget.used - sum(
            active.reserved for file in self.owner.files.values() for active in file._active
        )
        if used != len(self.held):
            return f"{used} pages are paid for, {len(self.held)} held"
        return None

    def _wrong(self, problem: str) -> None:
        self.problem = self.problem or problem

    def _call(self, i: int, state: CallState) -> None:
        self.calls = put(self.calls, i, state)


def _record(call: Call) -> tuple[int, int, int, int]:
    """Return op, inode and pages of a call that a user makes by a record."""
    assert not isinstance(call.request, Release | Shutdown)
    mode, offset, length = call.request  # type: ignore[misc]
    op = Op.PUNCH if mode == 0x03 else Op.ALLOCATE
    return int(op), call.ino, offset // PAGE_SIZE, (offset + length) // PAGE_SIZE
