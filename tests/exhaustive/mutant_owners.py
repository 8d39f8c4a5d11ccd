# SPDX-License-Identifier: GPL-2.0-or-later
"""Owners with one rule switched off at a time: files, sessions, the daemon's shell."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Set
from typing import Any, Self

from contract_host import Host
from contract_world import Contract, State

from privfs.memfile import Look, MemFile
from privfs.notifier.effects import Effect as OwnerEffect
from privfs.notifier.effects import Send
from privfs.notifier.exclusive import Exclusive
from privfs.notifier.owner import Owner
from privfs.notifier.session import Event, Session
from privfs.notifier.wire import Fence, Op, Record
from privfs.operation import STEPS, Kind, OpId, Perform, Step
from privfs.operation import Effect as FileEffect

Found = tuple[int, bool] | int | None

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


class FreesAfterGivingUp(MemFile):
    """Frees what no one has proven, when the ladder has come to its end."""

    __slots__ = ()

    def abandon(self, op: OpId, code: int, why: str) -> list[FileEffect]:
        return self.step_done(op)


class CopiesBeforeProof(MemFile):
    """Copies while users run, and takes the old extent away afterwards."""

    __slots__ = ()

    def _advance(self, active: Any) -> list[FileEffect]:
        if active.left == STEPS[Kind.MIGRATE]:
            active.left = (Step.COPY, Step.INVALIDATE, Step.FREE)
        return super()._advance(active)


class SwapsBeforeCopy(MemFile):
    """Lets the new extent be found, and ends the old one, before the bytes are there."""

    __slots__ = ()

    def _advance(self, active: Any) -> list[FileEffect]:
        if active.left == STEPS[Kind.MIGRATE][1:]:
            active.left = (Step.FREE, Step.COPY)
        return super()._advance(active)


class EndsTheNew(MemFile):
    """Forgets, once it has copied, which of the two was the old one."""

    __slots__ = ()

    def _copied(self, active: Any) -> list[FileEffect]:
        moved, free = super()._copied(active)
        assert isinstance(free, Perform)
        ((index, _),) = free.dead
        return [moved, free._replace(dead=((index, self.instances[index]),))]


# --- the owner ------------------------------------------------------------------------------------


class TakesAnyAck(Owner):
    def received(self, sid: int, record: Record, file: Found = None) -> list[OwnerEffect]:
        session = self.sessions.get(sid)
        if record.op != Op.ACK or session is None:
            return super().received(sid, record, file)
        out: list[OwnerEffect] = []
        keys, session.sent = list(session.sent.values()), {}
        for key in keys:
            out += self._proven(key, sid) if key else []
        return out


class TakesEofForAnAck(Owner):
    def broken(self, sid: int, why: str) -> list[OwnerEffect]:
        out = super().broken(sid, why)
        session = self.sessions.get(sid)
        return out + (self._end(session, Event.EXIT) if session else [])


class SkipsTheHung(Owner):
    def timer(self, ino: int, op: OpId, stopped: frozenset[int] = frozenset()) -> list[OwnerEffect]:
        out: list[OwnerEffect] = []
        for sid in self.waiting_for(ino, op):
            out += self._proven((ino, op), sid)
        return out


class SkipsZombies(Owner):
    def _invalidate(self, ino: int, perform: Perform) -> list[OwnerEffect]:
        out = super()._invalidate(ino, perform)
        for sid in self.waiting_for(ino, perform.op):
            if not self.sessions[sid].talks:
                out += self._proven((ino, perform.op), sid)
        return out


class TrustsTheKilled(Owner):
    """Takes an end of all threads for a fence."""

    def fenced(self, sid: int) -> list[OwnerEffect]:
        session = self.sessions.get(sid)
        if session is not None:
            session.fence = Fence.UFFD
        return super().fenced(sid)


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

    def _invalidate(self, ino: int, perform: Perform) -> list[OwnerEffect]:
        out = super()._invalidate(ino, perform)
        for sid in self.waiting_for(ino, perform.op) - (self.sample or frozenset()):
            self.sessions[sid].sent.clear()
            out = [e for e in out if not (isinstance(e, Send) and e.sid == sid)]
            out += self._proven((ino, perform.op), sid)
        return out


class CountsUsersFirst(Host):
    """The wait set is taken in one step, the operation becomes active in another."""

    owner: Samples

    def _call_events(self) -> Iterator[tuple[Any, ...]]:
        if self.owner.sample is None:
            yield ("sample",)
        else:
            yield from super()._call_events()

    def _on_sample(self) -> None:
        self.owner.sample = frozenset(self.owner.users[1])


class StampsTooLate(Owner):
    def _page(self, *args: Any) -> Send:
        send = super()._page(*args)
        return send._replace(record=send.record._replace(seq=send.record.seq + 1))


class HeedsNoHolder(Exclusive):
    __slots__ = ()

    def refuses(self, ino: int, sid: int, users: Set[int], *, exclusive: bool) -> bool:
        return exclusive and bool(users)


class HeedsNoUsers(Exclusive):
    __slots__ = ()

    def refuses(self, ino: int, sid: int, users: Set[int], *, exclusive: bool) -> bool:
        return super().refuses(ino, sid, frozenset(), exclusive=exclusive)


class HandsNothingOver(Exclusive):
    __slots__ = ()

    def replaced(self, old: int, sid: int) -> None:
        pass


class LetsOthersIn(Owner):
    """Keeps a file from those alone that want it for themselves."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.exclusive = HeedsNoHolder()


class CountsNoUsers(Owner):
    """Gives a file to one alone that has a user already."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.exclusive = HeedsNoUsers()


class InheritsNothing(Owner):
    """Forgets, when a session is replaced, what it had for itself."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.exclusive = HandsNothingOver()


class SharesWhatIsBroken(Owner):
    """Takes the end of a socket for that of exclusive use."""

    def broken(self, sid: int, why: str) -> list[OwnerEffect]:
        self.exclusive.ended(sid)
        return super().broken(sid, why)


class HasNoTombstones(Owner):
    def _detach(self, session: Session, ino: int) -> None:
        super()._detach(session, ino)
        session.sent = {seq: key for seq, key in session.sent.items() if key is not None}


class RegistersWithoutSeq(Owner):
    def received(self, sid: int, record: Record, file: Found = None) -> list[OwnerEffect]:
        out = super().received(sid, record, file)
        if record.op == Op.REGISTER and out:
            (send,) = out
            assert isinstance(send, Send)
            self.sessions[sid].next_seq -= 1
            return [send._replace(record=send.record._replace(seq=send.record.seq - 1))]
        return out


class NamesCallsByRequest(Owner):
    def received(self, sid: int, record: Record, file: Found = None) -> list[OwnerEffect]:
        if sid in self.sessions:
            self.sessions[sid].calls = 0
        return super().received(sid, record, file)


class WakesNobody(Owner):
    def _unpark(self, ino: int) -> list[OwnerEffect]:
        return []


class LeavesParkedUnanswered(Owner):
    def received(self, sid: int, record: Record, file: Found = None) -> list[OwnerEffect]:
        out = super().received(sid, record, file)
        if record.op != Op.UNREGISTER:
            return out
        return [e for e in out if not (isinstance(e, Send) and e.record.op == Op.PAGE)]


class ReapsOnlyTheIdle(Owner):
    def _reap(self, ino: int) -> list[OwnerEffect]:
        return super()._reap(ino) if ino in self.files and self.files[ino].idle else []


class SendsExtentsOnce(Owner):
    """An extent's descriptor is sent once, and to a user that lost it not again."""

    def received(self, sid: int, record: Record, file: Found = None) -> list[OwnerEffect]:
        return super().received(sid, record._replace(flags=record.flags & ~4), file)


# --- the daemon's shell ---------------------------------------------------------------------------


class HasNoTimer(Host):
    def events(self) -> Iterator[tuple[tuple[Any, ...], frozenset[int]]]:
        for event, slow in super().events():
            if event[0] != "timer":
                yield event, slow


class ReaderWaits(Contract):
    """Who reads a user's socket waits for the end of each call that came by it."""

    def _reads(self, p: int, state: State) -> bool:
        return p not in self._host_views[state[0]].unanswered


class SendsWithoutQueue(Contract):
    """The owner waits for room in a user's socket, of two letters, before it does anything else."""

    def successors(self, state: State) -> Iterator[tuple[Hashable, State]]:
        full = any(len(self.guests[number].inbox) > 2 for number in state[1:])
        for event, after in super().successors(state):
            if not full or after[0] == state[0]:
                yield event, after
