# SPDX-License-Identifier: GPL-2.0-or-later
"""The contract as a world: the owner and the users that ship, between them FIFOs, memory, vCPUs.

One file of one extent.  What the world itself plays is what the shells play: it performs steps on
"memory", carries records, zaps, drains, kills.  Every page of memory has a *generation*, which
counts how often it was freed; a mapping remembers the generation it was made for.  The one
unforgivable state is a process that reaches a generation that is gone.

A world is a value: parts that an event does not touch are shared between worlds.  Keys of parts
are interned, since hashing an owner costs more than stepping it.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from typing import ClassVar, Self, TypeVar

from contract_values import (
    INO,
    Call,
    CallState,
    Ghost,
    Proc,
    Release,
    Setup,
    Shutdown,
    Vcpu,
    allocate,
    freed_by,
    resize,
)

from privfs.memfile import MemFile
from privfs.notifier.effects import Answer, Arm, Drop, Effect, Forget, Kill, Rung, Send, Work
from privfs.notifier.owner import Owner
from privfs.notifier.user import Denied, Granted, Registered, User, Zap
from privfs.notifier.wire import Op, Record
from privfs.operation import Fallocate, OpId, Step
from privfs.personality import PAGE_SIZE

UNFAIR = frozenset({"call", "cancel", "hang", "close", "kill", "unregister", "register", "sample"})
V = TypeVar("V")


def fair(event: Hashable) -> bool:
    """Say whether liveness may rely on ``event``."""
    assert isinstance(event, tuple)
    return event[0] not in UNFAIR


def put(items: tuple[V, ...], index: int, item: V) -> tuple[V, ...]:
    return (*items[:index], item, *items[index + 1 :])


class ContractWorld:
    """Owner, users, memory.  Subclasses switch rules off: see the mutations."""

    owner_type: ClassVar[type[Owner]] = Owner
    user_type: ClassVar[type[User]] = User
    file_type: ClassVar[type[MemFile]] = MemFile
    audits_grants: ClassVar[bool] = True

    __slots__ = ("_interned", "ghost", "owner", "owner_key", "problem", "procs", "setup")

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._interned: dict[Hashable, int] = {}
        self.problem: str | None = None
        self.ghost = Ghost((0,) * setup.pages, frozenset(), (CallState(),) * len(setup.calls))
        self.owner = self.owner_type(setup.personality, 100, patience=0)
        self.owner.create(INO)
        self.owner.files[INO] = self.file_type(setup.personality, self.owner.budget)
        self.owner.request(INO, "size", resize(setup.pages if setup.size < 0 else setup.size))
        for page in setup.populated:
            self._do(self.owner.request(INO, "fill", allocate(page, page + 1)))
            while self.ghost.works:
                self._do(self._perform(0))
        self.procs: tuple[Proc, ...] = ()
        for p in range(setup.users):
            self._begin(p)
        self.owner_key = self._intern(self.owner.key())

    def _begin(self, p: int) -> None:
        """Let user ``p`` say HELLO and, unless it is late, register."""
        user = self.user_type(self.setup.ring)
        proc = Proc(user, -1, (Vcpu(),) * self.setup.vcpus, comebacks=self.setup.reregister)
        self.owner.connect(p, 100 + p)
        self.procs += (proc,)
        self._do(self.owner.received(p, user.hello(f"u{p}")))
        if p not in self.setup.late:
            self._do(self.owner.received(p, user.register(), (INO, True)))
        for letter in self.procs[p].inbox:
            assert letter is not None
            user.received(letter[0])
        self._proc(
            p,
            inbox=(),
            user_key=self._intern(user.key()),
            registered="no" if p in self.setup.late else "yes",
        )

    # --- the protocol of the explorer ---------------------------------------------------------

    def key(self) -> Hashable:
        procs = [self._intern(proc[1:]) for proc in self.procs]
        return (self.owner_key, self._intern(self.ghost), self.problem, *procs)

    def violations(self) -> str | None:
        return self.problem

    def events(self) -> Iterable[tuple[Hashable, ...]]:
        yield from self._call_events()
        for i, perform in enumerate(self.ghost.works):
            yield "perform", i, perform.step.value, perform.op
            if self.setup.fails and perform.step is Step.ALLOCATE:
                yield "fail", i, 0, perform.op
                if perform.end - perform.start > 1:
                    yield "fail", i, 1, perform.op
        for i, (op, number, rung) in enumerate(self.ghost.timers):
            if self._due(op, number):
                yield "timer", i, rung.value, op
        for p, proc in enumerate(self.procs):
            if proc.outbox and self._open(p):
                yield "deliver", p
            if proc.dead:
                if not proc.reaped and p not in self.setup.immortal:
                    yield "exit", p
                continue
            yield from self._process_events(p, proc)
            for v, vcpu in enumerate(proc.vcpus):
                yield from self._vcpu_events(p, proc, v, vcpu)

    def step(self, event: Hashable) -> Self | None:
        assert isinstance(event, tuple)
        after = self._twin()
        getattr(after, f"_on_{event[0]}")(*event[1:])
        if after.owner_key < 0:
            after.owner_key = after._intern(after.owner.key())
        for p, proc in enumerate(after.procs):
            if proc.user_key < 0:
                after._proc(p, user_key=after._intern(proc.user.key()))
        if after.problem is None:
            after.problem = after._audit()
        return after

    def quiet(self) -> bool:
        """Every call has ended, every healthy fault is served, every healthy FIFO is empty.

        A file that is released and has no users is gone; one that was revoked has no users,
        unless the exit of one is never seen.
        """
        ghost = self.ghost
        if ghost.works or any(self._unanswered(i) for i in range(len(ghost.calls))):
            return False
        if any(not f.idle for f in self.owner.files.values()) or self.owner._parked:
            return False
        for call, state in zip(self.setup.calls, ghost.calls, strict=True):
            if not state.started or INO not in self.owner.files:
                continue
            users = self.owner.users[INO]
            if isinstance(call.request, Release) and not users:
                return False
            if isinstance(call.request, Shutdown) and users and not self.setup.immortal:
                return False
        return all(
            not p.healthy
            or (
                not (p.inbox or p.outbox or p.owed or p.unmapped)
                and all(v.state in ("idle", "inside") for v in p.vcpus)
            )
            for p in self.procs
        )

    def _unanswered(self, i: int) -> bool:
        """Nobody answers a process that has left."""
        call, state = self.setup.calls[i], self.ghost.calls[i]
        gone = call.record and not self.procs[call.caller].healthy
        return state.started and state.status is None and not gone

    # --- what can happen ----------------------------------------------------------------------

    def _call_events(self) -> Iterator[tuple[Hashable, ...]]:
        states = self.ghost.calls
        for i, (call, state) in enumerate(zip(self.setup.calls, states, strict=True)):
            if not state.started:
                if self._may_call(call):
                    yield "call", i
                return
            if call.cancel and state.status is None:
                yield "cancel", i

    def _may_call(self, call: Call) -> bool:
        if call.caller < 0:
            return True
        proc = self.procs[call.caller]
        if not call.record:
            return not proc.dead
        return self._can_send(call.caller) and proc.registered == "yes" and not proc.dead

    def _due(self, op: OpId, number: int) -> bool:
        """A timer is far slower than a healthy user; a stale one may fire at any time."""
        waiting = self.owner.waiting_for(INO, op)
        if not waiting or dict(self.ghost.chains)[op] != number:
            return True
        return not any(self.procs[p].healthy for p in waiting)

    def _open(self, p: int) -> bool:
        session = self.owner.sessions.get(p)
        return session is not None and session.talks

    def _can_send(self, p: int) -> bool:
        proc = self.procs[p]
        return not proc.closed and len(proc.outbox) < self.setup.room

    def _process_events(self, p: int, proc: Proc) -> Iterator[tuple[Hashable, ...]]:
        if proc.killed and p not in self.setup.immortal and not self._in_call(p):
            yield "die", p
        if p in self.setup.kill and not proc.killed:
            yield "kill", p
        if p in self.setup.hang and not proc.hung:
            yield "hang", p
        if p in self.setup.close and not proc.closed:
            yield "close", p
        if proc.hung or proc.closed:
            return
        if proc.inbox:
            yield "lane", p
        if proc.owed and self._may_ack(proc) and self._can_send(p):
            yield "ack", p
        if proc.registered == "yes" and proc.comebacks and self._can_send(p):
            if all(v.inside is None for v in proc.vcpus):
                yield "unregister", p
        elif proc.registered == "no" and not proc.dead and self._can_send(p):
            yield "register", p

    def _in_call(self, p: int) -> bool:
        """A process inside a FUSE request is in state D: it cannot exit before the answer."""
        return any(
            c.caller == p and not c.record and s.started and s.status is None
            for c, s in zip(self.setup.calls, self.ghost.calls, strict=True)
        )

    def _vcpu_events(
        self, p: int, proc: Proc, v: int, vcpu: Vcpu
    ) -> Iterator[tuple[Hashable, ...]]:
        if vcpu.state == "inside":
            yield "end", p, v
        elif vcpu.state == "granted":
            yield "install", p, v
        elif vcpu.state == "idle":
            for page in range(self.setup.pages):
                if any(at == page for at, _ in vcpu.tlb | proc.mapped):
                    yield "begin", p, v, page
                elif proc.registered == "yes" and self._can_send(p):
                    yield "fault", p, v, page

    def _may_ack(self, proc: Proc) -> bool:
        """Every access that was inside at the zap has left; the others flush before they enter."""
        return not any(v.flush for v in proc.vcpus)

    # --- calls, memory, timers ----------------------------------------------------------------

    def _on_call(self, i: int) -> None:
        call = self.setup.calls[i]
        ghost = self.ghost
        before = tuple([(page, ghost.generation[page]) for page in sorted(ghost.held)])
        if call.record:
            assert isinstance(call.request, Fallocate)
            pages = call.request.offset // PAGE_SIZE, call.request.length // PAGE_SIZE
            record = self._user(call.caller).punch(INO, pages[0], sum(pages))
            self._call(i, CallState(True, None, before, record.req))
            self._post(call.caller, record)
            return
        self._call(i, CallState(True, None, before))
        if isinstance(call.request, Release | Shutdown):
            self._call(i, CallState(True, 0))
            owner = self._owner()
            goes = isinstance(call.request, Shutdown)
            self._do(owner.shutdown() if goes else owner.release(INO))
        else:
            caller = 100 + call.caller if call.caller >= 0 else 0
            self._do(self._owner().request(INO, i, call.request, caller))

    def _on_cancel(self, i: int) -> None:
        self._do(self._owner().cancel(i, errno.EINTR))

    def _on_perform(self, i: int, *_: Hashable) -> None:
        self._owner()
        self._do(self._perform(i))

    def _on_fail(self, i: int, pages: int, _: Hashable) -> None:
        self._owner()
        self._do(self._perform(i, errno.ENOSPC, self.ghost.works[i].start + pages))

    def _perform(self, i: int, failed: int = 0, upto: int | None = None) -> list[Effect]:
        ghost = self.ghost
        perform = ghost.works[i]
        end = perform.end if upto is None else upto
        pages = range(perform.start, min(end, self.setup.pages))
        if perform.step is Step.ALLOCATE:
            held, generation = ghost.held | set(pages), ghost.generation
        else:
            held = ghost.held - set(pages)
            generation = tuple(
                [g + (page in pages and page in ghost.held) for page, g in
                 enumerate(ghost.generation)]
            )  # fmt: skip
            if isinstance(perform.op, int) and ghost.calls[perform.op].status is not None:
                self._wrong(f"call {perform.op} frees after it was answered")
        works = ghost.works[:i] + ghost.works[i + 1 :]
        self.ghost = ghost._replace(held=frozenset(held), generation=generation, works=works)
        return self.owner.performed(INO, perform.op, failed, upto)

    def _on_timer(self, i: int, *_: Hashable) -> None:
        timers = self.ghost.timers
        op, number, _rung = timers[i]
        self.ghost = self.ghost._replace(timers=timers[:i] + timers[i + 1 :])
        self._do(self._owner().timer(INO, op), number)

    def _on_exit(self, p: int) -> None:
        self._proc(p, reaped=True, outbox=(), inbox=())
        self._do(self._owner().gone(p))

    # --- the owner's socket -------------------------------------------------------------------

    def _on_deliver(self, p: int) -> None:
        proc = self.procs[p]
        record = proc.outbox[0]
        self._proc(p, outbox=proc.outbox[1:])
        owner = self._owner()
        if record is None:
            self._do(owner.broken(p, "end of file"))
        else:
            found = (INO, True) if record.op == Op.REGISTER else None
            self._do(owner.received(p, record, found))

    def _do(self, effects: list[Effect], number: int = 0) -> None:
        """Perform the owner's effects as its shell does, in their order."""
        todo = deque(self._decided(effects))
        while todo:
            effect, made_for = todo.popleft()
            match effect:
                case Send(sid, record, _):
                    self._deliver(sid, record, made_for)
                case Drop(sid, _):
                    proc = self.procs[sid]
                    if proc.healthy:
                        self._wrong(f"the honest user {sid} was dropped: {effect.why}")
                    self._proc(sid, inbox=(*proc.inbox, None), outbox=())
                case Kill(sid):
                    self._proc(sid, killed=True)
                case Arm(_, op, rung):
                    self._arm(op, rung, number)
                case Work(_, perform):
                    self.ghost = self.ghost._replace(works=(*self.ghost.works, perform))
                    if self.setup.inline:
                        more = self._decided(self._perform(len(self.ghost.works) - 1))
                        todo.extendleft(reversed(more))
                case Answer(op, code, _):
                    if isinstance(op, int):
                        self._answered(op, code)
                case Forget():
                    pass
        if not self.setup.stale:
            live = [t for t in self.ghost.timers if self.owner.waiting_for(INO, t[0])]
            if len(live) != len(self.ghost.timers):
                self.ghost = self.ghost._replace(timers=tuple(live))

    def _decided(self, effects: list[Effect]) -> list[tuple[Effect, tuple[int, ...]]]:
        """Judge every grant at the moment at which the owner decided it."""
        out: list[tuple[Effect, tuple[int, ...]]] = []
        for effect in effects:
            made_for: tuple[int, ...] = ()
            if isinstance(effect, Send) and effect.record.op == Op.PAGE and effect.record.end:
                record = effect.record
                made_for = self.ghost.generation[record.start : record.end]
                for _, step, start, end in self.owner.files[INO].operations():
                    hits = start < record.end and record.start < end and step != "allocate"
                    if hits and self.audits_grants:
                        self._wrong(f"pages [{start}, {end}) are granted while they go away")
            out.append((effect, made_for))
        return out

    def _deliver(self, p: int, record: Record, made_for: tuple[int, ...]) -> None:
        proc = self.procs[p]
        if not proc.dead and not proc.closed:
            self._proc(p, inbox=(*proc.inbox, (record, made_for)))

    def _arm(self, op: OpId, rung: Rung, number: int) -> None:
        chains = dict(self.ghost.chains)
        if rung is Rung.LOG:
            number = chains[op] = chains.get(op, 0) + 1
        timers = (*self.ghost.timers, (op, number, rung))
        self.ghost = self.ghost._replace(timers=timers, chains=tuple(chains.items()))

    def _answered(self, i: int, code: int) -> None:
        call, state = self.setup.calls[i], self.ghost.calls[i]
        if state.status is not None:
            self._wrong(f"call {i} is answered twice")
        self._call(i, state._replace(status=code, before=()))
        gone = freed_by(call.request)
        for page, generation in state.before:
            if not code and page in gone and self.ghost.generation[page] == generation:
                self._wrong(f"call {i} was answered, but page {page} was never freed")

    # --- a user's lane ------------------------------------------------------------------------

    def _on_lane(self, p: int) -> None:
        """Take one record; an INVALIDATE is zapped under the same lock."""
        proc = self.procs[p]
        letter = proc.inbox[0]
        self._proc(p, inbox=proc.inbox[1:])
        if letter is None:  # no invalidation can come any more: a machine check, then exit
            self._proc(p, killed=True)
            return
        happening = self._user(p).received(letter[0])
        match happening:
            case Zap():
                self._zap(p, happening)
            case Granted(req=req):
                v = self._waiting(p, req)
                self._vcpu(p, v, state="granted", grant=happening, made_for=letter[1], req=0)
            case Denied(req=req):
                self._vcpu(p, self._waiting(p, req), state="idle", page=-1, req=0)
            case Registered(status=status):
                self._proc(p, registered="no" if status else "yes")
            case _:
                self._replied(p, letter[0])

    def _replied(self, p: int, record: Record) -> None:
        if record.op != Op.REPLY:
            return
        for i, call in enumerate(self.setup.calls):
            state = self.ghost.calls[i]
            ours = call.record and call.caller == p and state.req == record.req
            if ours and state.started and state.status is None:
                self._answered(i, record.status)
                return
        assert self.procs[p].registered == "leaves"
        self._proc(p, registered="no")

    def _zap(self, p: int, zap: Zap) -> None:
        self._unmap(p, zap.start, zap.end)
        self._proc(p, owed=(*self.procs[p].owed, zap.seq))

    def _unmap(self, p: int, start: int, end: int) -> None:
        """Clear the second stage; whoever is in guest code must leave, the others flush first."""
        mapped = frozenset([m for m in self.procs[p].mapped if not start <= m[0] < end])
        self._proc(p, mapped=mapped)
        for v, vcpu in enumerate(self.procs[p].vcpus):
            if vcpu.inside is None:
                self._vcpu(p, v, tlb=frozenset())
            else:
                self._vcpu(p, v, flush=True)

    def _on_ack(self, p: int) -> None:
        proc = self.procs[p]
        self._proc(p, owed=proc.owed[1:])
        self._post(p, proc.user.ack(proc.owed[0]))

    def _on_unregister(self, p: int) -> None:
        self._unmap(p, 0, self.setup.pages)
        self._leave(p)

    def _leave(self, p: int) -> None:
        record = self._user(p).unregister(INO)
        self._proc(p, registered="leaves", comebacks=self.procs[p].comebacks - 1)
        self._post(p, record)

    def _on_register(self, p: int) -> None:
        record = self._user(p).register()
        self._proc(p, registered="asked")
        self._post(p, record)

    # --- a user's fate ------------------------------------------------------------------------

    def _on_hang(self, p: int) -> None:
        """The lane stops for ever; guest code runs on."""
        self._proc(p, hung=True)

    def _on_close(self, p: int) -> None:
        self._proc(p, closed=True, inbox=(), owed=(), outbox=self._hangup(p))

    def _on_kill(self, p: int) -> None:
        self._proc(p, killed=True)

    def _on_die(self, p: int) -> None:
        """The process ends: its socket closes, nothing of it reaches anything."""
        gone = (Vcpu(),) * len(self.procs[p].vcpus)
        self._proc(p, dead=True, mapped=frozenset(), vcpus=gone, inbox=(), owed=(),
                   unmapped=(), outbox=self._hangup(p))  # fmt: skip

    def _hangup(self, p: int) -> tuple[Record | None, ...]:
        proc = self.procs[p]
        if not self._open(p):
            return ()
        return proc.outbox if proc.closed else (*proc.outbox, None)

    # --- vCPUs --------------------------------------------------------------------------------

    def _on_fault(self, p: int, v: int, page: int) -> None:
        again = self.procs[p].vcpus[v].again
        get = self._user(p).get(INO, page, 0, self.setup.pages, write=True, again=again)
        self._vcpu(p, v, state="waits", page=page, req=get.req, again=False)
        self._post(p, get)

    def _on_install(self, p: int, v: int) -> None:
        """The install rule, under the lock that a zap holds."""
        proc = self.procs[p]
        vcpu = proc.vcpus[v]
        grant = vcpu.grant
        assert grant is not None
        self._vcpu(p, v, state="idle", page=-1, grant=None, made_for=())
        start, end = proc.user.installable(INO, vcpu.page, grant.start, grant.end, grant.seq)
        if start == end:
            return
        if proc.user.extent(INO, grant.instance) is None:
            self._vcpu(p, v, again=True)
            return
        old = {m for m in proc.mapped if not start <= m[0] < end}
        new = {(page, vcpu.made_for[page - grant.start]) for page in range(start, end)}
        self._proc(p, mapped=frozenset(old | new))

    def _on_begin(self, p: int, v: int, page: int) -> None:
        proc = self.procs[p]
        vcpu = proc.vcpus[v]
        hits = [t for t in vcpu.tlb if t[0] == page] or [m for m in proc.mapped if m[0] == page]
        self._vcpu(p, v, state="inside", inside=hits[0], tlb=vcpu.tlb | {hits[0]})

    def _on_end(self, p: int, v: int) -> None:
        vcpu = self.procs[p].vcpus[v]
        tlb = frozenset() if vcpu.flush else vcpu.tlb
        self._vcpu(p, v, state="idle", inside=None, tlb=tlb, flush=False)

    # --- the audit ----------------------------------------------------------------------------

    def _audit(self) -> str | None:
        generation, held = self.ghost.generation, self.ghost.held
        for p, proc in enumerate(self.procs):
            reach = set(proc.mapped)
            for vcpu in proc.vcpus:
                reach |= vcpu.tlb
            for page, made_for in sorted(reach):
                if page not in held or generation[page] != made_for:
                    return f"user {p} reaches page {page} of generation {made_for}, which is gone"
        file = self.owner.files.get(INO)
        if not self.ghost.works and file is not None and set(file.pages) != held:
            return f"the bitmap holds {set(file.pages)}, the memory {set(held)}"
        if not self.ghost.works and self.owner.budget.used != len(held):
            return f"{self.owner.budget.used} pages are paid for, {len(held)} held"
        return None

    def _wrong(self, problem: str) -> None:
        self.problem = self.problem or problem

    # --- parts --------------------------------------------------------------------------------

    def _intern(self, key: Hashable) -> int:
        return self._interned.setdefault(key, len(self._interned))

    def _owner(self) -> Owner:
        """Return an owner that this step may change."""
        self.owner, self.owner_key = self.owner.copy(), -1
        return self.owner

    def _user(self, p: int) -> User:
        """Return a user that this step may change."""
        user = self.procs[p].user.copy()
        self._proc(p, user=user, user_key=-1)
        return user

    def _twin(self) -> Self:
        twin = type(self).__new__(type(self))
        twin.setup, twin._interned = self.setup, self._interned
        twin.owner, twin.owner_key = self.owner, self.owner_key
        twin.ghost, twin.procs, twin.problem = self.ghost, self.procs, None
        return twin

    def _call(self, i: int, state: CallState) -> None:
        self.ghost = self.ghost._replace(calls=put(self.ghost.calls, i, state))

    def _proc(self, p: int, **fields: object) -> None:
        self.procs = put(self.procs, p, self.procs[p]._replace(**fields))  # type: ignore[arg-type]

    def _vcpu(self, p: int, v: int, **fields: object) -> None:
        vcpus = self.procs[p].vcpus
        self._proc(p, vcpus=put(vcpus, v, vcpus[v]._replace(**fields)))  # type: ignore[arg-type]

    def _post(self, p: int, record: Record) -> None:
        self._proc(p, outbox=(*self.procs[p].outbox, record))

    def _waiting(self, p: int, req: int) -> int:
        return next(v for v, c in enumerate(self.procs[p].vcpus) if c.req == req)
