# SPDX-License-Identifier: GPL-2.0-or-later
"""Users with one rule switched off at a time: core, fault path, shell."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from contract_guest import Guest

from hwemu.shootdown import Shootdown
from kvmsim.fault import Effect, Fault, PageGrant
from kvmsim.invalidate import MmuInvalidate
from kvmsim.mmu import Mmu
from kvmsim.vm import Vm
from privfs.notifier.user import Happening, User, Zap, _File
from privfs.notifier.wire import Op, Record

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
