# SPDX-License-Identifier: GPL-2.0-or-later
"""The code that ships with one rule switched off at a time, by deriving from it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, Self

from contract_guest import Guest
from contract_host import Host
from contract_world import Contract, State

from hwemu.shootdown import Shootdown
from kvmsim.fault import Effect, Fault, PageGrant
from kvmsim.invalidate import MmuInvalidate
from kvmsim.mmu import Mmu
from kvmsim.vm import Vm
from privfs.memfile import Look, MemFile
from privfs.notifier.effects import Effect as OwnerEffect
from privfs.notifier.effects import Send
from privfs.notifier.owner import Owner
from privfs.notifier.session import Event, Session
from privfs.notifier.user import Happening, User, Zap, _File
from privfs.notifier.wire import Fence, Op, Record
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


class NotesAsItComes(_File):
    __slots__ = ()

    def note(self, seq: int, start: int, end: int) -> None:
        if len(self.ring) == self.ring.maxlen:
            self.floor = self.ring[0][0]
        self.ring.append((seq, start, end))

    def copy(self) -> NotesAsItComes:
        twin = type(self)(0)
        twin.ring, twin.floor, twin.extents = self.ring.copy(), self.floor, self.extents.copy()
        return twin


class TrustsTheOrder(User):
    """Takes it that invalidations come in the order of their seqs."""

    def received(self, record: Record) -> Happening:
        happening = super().received(record)
        for ino, file in self._files.items():
            if not isinstance(file, NotesAsItComes):
                plain = NotesAsItComes(self._ring)
                plain.floor = file.floor
                self._files[ino] = plain
        return happening


class ForgetsBeforeRegistered(User):
    """Takes it that no invalidation of a file comes before the answer to its registration."""

    def received(self, record: Record) -> Happening:
        happening = super().received(record)
        self._newest = 0
        return happening


# --- kvmsim's fault path --------------------------------------------------------------------------


class LateSnapshot(Fault):
    """Takes its snapshot when everything was looked at already."""

    def page_arrived(self, mmu: Mmu, grant: PageGrant) -> Effect:
        self.snap = mmu.invalidate.seq
        return super().page_arrived(mmu, grant)


class MergedRange(MmuInvalidate):
    """As first posted (found by Xu Yilun, September 2023): tests the count, not the range."""

    def range_add(self, start: int, end: int) -> None:
        if self.in_progress == 1:
            self.range = (start, end)
        else:
            super().range_add(start, end)


class NewestRange(MmuInvalidate):
    """The newest range replaces those of the brackets in progress."""

    def range_add(self, start: int, end: int) -> None:
        self.range = None
        super().range_add(start, end)


class NoSeq(MmuInvalidate):
    """The end does not count."""

    def end(self) -> None:
        super().end()
        self.seq = 0


class SeqOnly(MmuInvalidate):
    """The retry test looks at the count of ends and not at what is in progress."""

    def retry(self, gfn: int, snapshot: int) -> bool:
        return self.seq != snapshot


class NeverEnds(MmuInvalidate):
    """Once begun, always in progress."""

    def end(self) -> None:
        self.seq += 1


class BlindVm(Vm):
    """Opens no bracket: zaps and changes, and tells the counter nothing."""

    __slots__ = ()

    def _begin(self, *args: Any, **keywords: Any) -> Any:
        begun = super()._begin(*args, **keywords)
        if begun.bracketed:
            self.mmu.invalidate.in_progress -= 1
        return type(begun)(begun.zapped, False, begun.then)


class ZapsOneSlot(Vm):
    """Zaps the first slot that it finds for a file page, and no other."""

    __slots__ = ()

    def _begin(self, gfns: Any, **keywords: Any) -> Any:
        return super()._begin(gfns[:1], **keywords)


class DoesNotFlush(Shootdown):
    """Who enters guest code keeps its translations."""

    __slots__ = ()

    def enter(self, vcpu: int) -> bool:
        super().enter(vcpu)
        return False

    def copy(self) -> Shootdown:
        other = super().copy()
        other.__class__ = type(self)
        return other


# --- a user's shell -------------------------------------------------------------------------------


class Keeps(Guest):
    """Drops nothing of a TLB but by the flush at entry."""

    def _forget(self, v: int) -> None:
        pass


class UnmapsLater(Guest):
    """What is to be unmapped is unmapped at leisure, by an event of its own."""

    later: tuple[int, ...] = ()  #: the files

    def key(self) -> Hashable:
        return super().key(), self.later

    def events(self) -> Iterator[tuple[Any, ...]]:
        yield from super().events()
        if self.later and not self.flags:
            yield ("unmap",)

    @property
    def quiet(self) -> bool:
        return super().quiet and not self.later

    def _on_unmap(self) -> None:
        for ino in self.later:
            gone = {leaf for leaf in self.leaves if leaf.page and leaf.page[0] == ino}
            self.leaves -= gone
        self.later = ()
        self._request_flush()


class AcksBeforeZap(UnmapsLater):
    def _zap(self, zap: Zap) -> None:
        kept = self.leaves
        super()._zap(zap)
        self.leaves = kept
        self.later = (zap.ino,)


class UnregistersBeforeUnmap(UnmapsLater):
    def _unbind(self, ino: int) -> None:
        self.later = (ino,)


class DoesNotDrain(Guest):
    def _may_ack(self, debt: Any) -> bool:
        return True


class AcksAnOldEpoch(Guest):
    """Takes it that a zap which found no leaf has nothing to wait for."""

    def _zap(self, zap: Zap) -> None:
        before = self.shootdown.epoch
        super()._zap(zap)
        if self.shootdown.epoch == before:
            self.owed = (*self.owed[:-1], self.owed[-1]._replace(epoch=0))


class HoldsTheLock(Guest):
    """A fault holds the VM's lock until its page is there; the lane may take that page."""

    def _lane_events(self) -> Iterator[tuple[Any, ...]]:
        asking = any(v.state in ("asks", "waits", "granted") for v in self.vcpus)
        for event in super()._lane_events():
            if event[0] == "lane" and asking:
                letter = self.inbox[event[1]]
                if letter is not None and letter.record.op == Op.INVALIDATE:
                    continue
            yield event


class ReconnectsMapped(Guest):
    def _forget_everything(self) -> None:
        pass


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


class LosesExtents(Guest):
    """Runs out of descriptors when the first extent comes: recvmsg(2) cuts it off."""

    lost: bool = False

    def key(self) -> Hashable:
        return super().key(), self.lost

    def _on_lane(self, i: int) -> None:
        before = self.extents
        super()._on_lane(i)
        if not self.lost and self.extents - before:
            self.lost, self.extents = True, before


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
