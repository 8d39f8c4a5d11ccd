# SPDX-License-Identifier: GPL-2.0-or-later
"""The contract with one rule switched off at a time, by deriving from the code that ships.

Each of these must be caught: a check that no mutation trips over checks nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from contract_values import INO, Call, Proc, Release, Setup, grow, punch
from contract_world import ContractWorld

from privfs.memfile import Look, MemFile
from privfs.notifier.effects import Effect, Send
from privfs.notifier.owner import Owner
from privfs.notifier.session import Event, Session
from privfs.notifier.user import Happening, User, Zap
from privfs.notifier.wire import Op, Record
from privfs.operation import Effect as FileEffect
from privfs.operation import Kind, OpId, Perform, Step

Found = tuple[int, bool] | int | None

# --- a user's core --------------------------------------------------------------------------------


class InstallsAnything(User):
    def installable(self, ino: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return start, end


class ForgetsWithoutFloor(User):
    def received(self, record: Record) -> Happening:
        happening = super().received(record)
        if isinstance(happening, Zap) and happening.ino in self._files:
            self._files[happening.ino].floor = 0
        return happening


# --- a user's shell -------------------------------------------------------------------------------


class UnmapsLater(ContractWorld):
    """What was unmapped by an event of its own is unmapped at leisure."""

    __slots__ = ()

    def _process_events(self, p: int, proc: Proc) -> Iterator[tuple[Hashable, ...]]:
        yield from super()._process_events(p, proc)
        if proc.unmapped:
            yield "unmap", p

    def _on_unmap(self, p: int) -> None:
        self._proc(p, unmapped=())
        self._unmap(p, 0, self.setup.pages)


class AcksBeforeZap(UnmapsLater):
    __slots__ = ()

    def _zap(self, p: int, zap: Zap) -> None:
        self._proc(p, owed=(*self.procs[p].owed, zap.seq), unmapped=(0,))


class UnregistersBeforeUnmap(UnmapsLater):
    __slots__ = ()

    def _on_unregister(self, p: int) -> None:
        self._leave(p)
        self._proc(p, unmapped=(0,))


class DoesNotDrain(ContractWorld):
    __slots__ = ()

    def _may_ack(self, proc: Proc) -> bool:
        return True


class DoesNotFlush(ContractWorld):
    """Who is not in guest code at the zap keeps its translations."""

    __slots__ = ()

    def _unmap(self, p: int, start: int, end: int) -> None:
        before = [vcpu.tlb for vcpu in self.procs[p].vcpus]
        super()._unmap(p, start, end)
        for v, tlb in enumerate(before):
            self._vcpu(p, v, tlb=tlb)


# --- the file -------------------------------------------------------------------------------------


class NeverParks(MemFile):
    __slots__ = ()

    def look(self, page: int) -> Look:
        found = super().look(page)
        if found is not Look.PARK or self._parks():
            return found
        return Look.PRESENT if page in self.pages else Look.HOLE

    def _parks(self) -> bool:
        return False


class ParksOnlyWhileFreeing(NeverParks):
    __slots__ = ()

    def _parks(self) -> bool:
        return any(step == "free" for _, step, _, _ in self.operations())


class FreesBeforeProof(MemFile):
    __slots__ = ()

    def _advance(self, active: Any) -> list[FileEffect]:
        if active.left == (Step.INVALIDATE, Step.FREE) and active.kind is Kind.PUNCH:
            active.left = (Step.FREE, Step.INVALIDATE)
            return [Perform(active.op, Step.FREE, active.kind, active.start, active.end)]
        return super()._advance(active)


class FreesAfterCancel(MemFile):
    __slots__ = ()

    def cancel(self, op: OpId, code: int) -> list[FileEffect]:
        effects = super().cancel(op, code)
        for active in self._active:
            active.answered = False
        return effects


class GrowsSideBySide(MemFile):
    __slots__ = ()

    def _must_wait(self, claim: Any, ahead: Any) -> bool:
        others = [other._replace(sizes=False) for other in self._claims(ahead)]
        return any(claim._replace(sizes=False).excludes(other) for other in others)


# --- the owner ------------------------------------------------------------------------------------


class TakesAnyAck(Owner):
    def received(self, sid: int, record: Record, file: Found = None) -> list[Effect]:
        session = self.sessions.get(sid)
        if record.op != Op.ACK or session is None:
            return super().received(sid, record, file)
        out: list[Effect] = []
        keys, session.sent = list(session.sent.values()), {}
        for key in keys:
            out += self._proven(key, sid) if key else []
        return out


class TakesEofForAnAck(Owner):
    def broken(self, sid: int, why: str) -> list[Effect]:
        out = super().broken(sid, why)
        session = self.sessions.get(sid)
        return out + (self._end(session, Event.EXIT) if session else [])


class SkipsTheHung(Owner):
    def timer(self, ino: int, op: OpId, stopped: frozenset[int] = frozenset()) -> list[Effect]:
        out: list[Effect] = []
        for sid in self.waiting_for(ino, op):
            out += self._proven((ino, op), sid)
        return out


class SkipsZombies(Owner):
    def _invalidate(self, ino: int, perform: Perform) -> list[Effect]:
        out = super()._invalidate(ino, perform)
        for sid in self.waiting_for(ino, perform.op):
            if not self.sessions[sid].talks:
                out += self._proven((ino, perform.op), sid)
        return out


class Samples(Owner):
    """Waits only for the users that there were at the sample."""

    sample: frozenset[int] | None = None

    def copy(self) -> Self:
        twin = super().copy()
        assert isinstance(twin, type(self))
        twin.sample = self.sample
        return twin

    def key(self) -> Hashable:
        return super().key(), self.sample

    def _invalidate(self, ino: int, perform: Perform) -> list[Effect]:
        out = super()._invalidate(ino, perform)
        for sid in self.waiting_for(ino, perform.op) - (self.sample or frozenset()):
            self.sessions[sid].sent.clear()
            out = [e for e in out if not (isinstance(e, Send) and e.sid == sid)]
            out += self._proven((ino, perform.op), sid)
        return out


class CountsUsersFirst(ContractWorld):
    """The wait set is taken in one step, the operation becomes active in another."""

    __slots__ = ()

    def _call_events(self) -> Iterator[tuple[Hashable, ...]]:
        assert isinstance(self.owner, Samples)
        if self.owner.sample is None:
            yield ("sample",)
        else:
            yield from super()._call_events()

    def _on_sample(self) -> None:
        owner = self._owner()
        assert isinstance(owner, Samples)
        owner.sample = frozenset(owner.users[INO])


class StampsTooLate(Owner):
    def _page(self, *args: Any) -> Send:
        send = super()._page(*args)
        return send._replace(record=send.record._replace(seq=send.record.seq + 1))


class HasNoTombstones(Owner):
    def _detach(self, session: Session, ino: int) -> None:
        super()._detach(session, ino)
        session.sent = {seq: key for seq, key in session.sent.items() if key is not None}


class RegistersWithoutSeq(Owner):
    def received(self, sid: int, record: Record, file: Found = None) -> list[Effect]:
        out = super().received(sid, record, file)
        if record.op == Op.REGISTER and out:
            (send,) = out
            assert isinstance(send, Send)
            self.sessions[sid].next_seq -= 1
            return [send._replace(record=send.record._replace(seq=send.record.seq - 1))]
        return out


class NamesCallsByRequest(Owner):
    def received(self, sid: int, record: Record, file: Found = None) -> list[Effect]:
        if sid in self.sessions:
            self.sessions[sid].calls = 0
        return super().received(sid, record, file)


class WakesNobody(Owner):
    def _unpark(self, ino: int) -> list[Effect]:
        return []


class LeavesParkedUnanswered(Owner):
    def received(self, sid: int, record: Record, file: Found = None) -> list[Effect]:
        out = super().received(sid, record, file)
        if record.op != Op.UNREGISTER:
            return out
        return [e for e in out if not (isinstance(e, Send) and e.record.op == Op.PAGE)]


class ReapsOnlyTheIdle(Owner):
    def _reap(self, ino: int) -> list[Effect]:
        return super()._reap(ino) if ino in self.files and self.files[ino].idle else []


class HasNoTimer(ContractWorld):
    __slots__ = ()

    def _due(self, op: OpId, number: int) -> bool:
        return False


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    """A rule that is off, the world that shows it, and what must be found there."""

    rule: str
    setup: Setup
    finds: str
    world: type[ContractWorld] = ContractWorld
    owner: type[Owner] = Owner
    user: type[User] = User
    file: type[MemFile] = MemFile
    audits_grants: bool = True

    def build(self) -> ContractWorld:
        members: dict[str, object] = {
            "__slots__": (),
            "owner_type": self.owner,
            "user_type": self.user,
            "file_type": self.file,
            "audits_grants": self.audits_grants,
        }
        return type("Mutant", (self.world,), members)(self.setup)  # type: ignore[no-any-return]


ONE = frozenset({0})
P = Call(punch(0, 1))
Q = Call(punch(1, 2))
OWN = Call(punch(0, 1), caller=0, record=True)

FULL = Setup(calls=(P,), populated=(0,))
TWO = Setup(pages=2, calls=(P, Q), populated=(0, 1))
HANG = Setup(calls=(P,), populated=(0,), hang=ONE)
CLOSE = Setup(calls=(P,), populated=(0,), close=ONE)
COMES_BACK = Setup(calls=(P,), populated=(0,), reregister=1)

REACHES, STUCK, DROPPED = "is gone", "stuck", "honest user 0 was dropped"

MUTATIONS = [
    Mutation("install rule", FULL, REACHES, user=InstallsAnything),
    Mutation("floor of the ring", Setup(pages=2, calls=(P, Q), populated=(0, 1), ring=1),
             REACHES, user=ForgetsWithoutFloor),
    Mutation("snapshot at the grant", FULL, REACHES, owner=StampsTooLate),
    Mutation("zap before ack", FULL, REACHES, world=AcksBeforeZap),
    Mutation("drain before ack", FULL, REACHES, world=DoesNotDrain),
    Mutation("flush before entry", FULL, REACHES, world=DoesNotFlush),
    Mutation("unmap before unregister", COMES_BACK, REACHES, world=UnregistersBeforeUnmap),
    Mutation("no grant of what goes away", FULL, "granted while they go away", file=NeverParks),
    Mutation("parking", FULL, REACHES, file=NeverParks, audits_grants=False),
    Mutation("parking from the first step on", FULL, REACHES, file=ParksOnlyWhileFreeing,
             audits_grants=False),
    Mutation("proof before free", FULL, REACHES, file=FreesBeforeProof),
    Mutation("nothing freed after an answer",
             Setup(calls=(Call(punch(0, 1), cancel=True),), populated=(0,)),
             "frees after it was answered", file=FreesAfterCancel),
    Mutation("one change of size at a time",
             Setup(pages=2, size=0, calls=(Call(grow(0, 2)), Call(grow(1, 2))), fails=True),
             REACHES, file=GrowsSideBySide, audits_grants=False),
    Mutation("exact acks", TWO, REACHES, owner=TakesAnyAck),
    Mutation("EOF is not an ack", CLOSE, REACHES, owner=TakesEofForAnAck),
    Mutation("hung users are waited for", HANG, REACHES, owner=SkipsTheHung),
    Mutation("zombies are waited for", CLOSE, REACHES, owner=SkipsZombies),
    Mutation("active and wait set in one step",
             Setup(calls=(P,), populated=(0,), late=ONE), REACHES,
             world=CountsUsersFirst, owner=Samples),
    Mutation("tombstones", COMES_BACK, DROPPED, owner=HasNoTombstones),
    Mutation("a registration voids older grants",
             Setup(vcpus=2, calls=(P,), populated=(0,), reregister=1), REACHES,
             owner=RegistersWithoutSeq),
    Mutation("operations have names of their own",
             Setup(calls=(OWN, Call(punch(0, 1), caller=0, record=True)), populated=(0,),
                   stale=True), DROPPED, owner=NamesCallsByRequest),
    Mutation("the ladder", HANG, STUCK, world=HasNoTimer),
    Mutation("parked faults are served", FULL, STUCK, owner=WakesNobody),
    Mutation("unregister answers parked faults", COMES_BACK, STUCK, owner=LeavesParkedUnanswered),
    Mutation("a released file goes when it can",
             Setup(calls=(Call(Release()),), kill=ONE), STUCK, owner=ReapsOnlyTheIdle),
]  # fmt: skip
