# SPDX-License-Identifier: GPL-2.0-or-later
"""The lane of a user: it takes records, zaps, and acknowledges what is drained.

As ``privfs.notifier.lane`` and ``kvmsim.private`` do it, one record at a time.
"""

from __future__ import annotations

import errno

from contract_process import Debt
from contract_stage2 import RAM, SHARED, Extent
from contract_values import SEEN, put, without
from contract_vcpus import Vcpus

from kvmsim.fault import PageGrant
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import KVM_MEM_GUEST_MEMFD, PAGE_SIZE
from privfs.notifier.user import (
    Closed,
    Denied,
    ExtentArrived,
    Granted,
    Opened,
    Registered,
    Replied,
    Zap,
)
from privfs.notifier.wire import MAX_PAGES, Record


class Lane(Vcpus):
    """A process that answers its owner."""

    # --- the lane -----------------------------------------------------------------------------

    def _on_lane(self, i: int) -> None:
        """Take one record; an INVALIDATE is zapped under the same lock."""
        letter = self.inbox[i]
        self.inbox = without(self.inbox, i)
        if letter is None:  # no invalidation can come any more: a machine check, then exit
            more = len(self.outboxes) < self.setup.sessions
            self._flag("closed" if more else "killed")
            return
        happening = self._user().received(letter.record)
        SEEN.add(type(happening))
        match happening:
            case Zap():
                self._zap(happening)
            case Granted():
                v = self._waiting(happening.req)
                self._vcpu(v, state="granted", grant=happening, made_for=letter.made_for, req=0)
                if self.setup.direct:
                    self._on_install(v)
            case Denied(req, ino, status):
                v = self._waiting(req)
                fault = self.vcpus[v].fault
                assert fault is not None
                self._arrived(v, fault, PageGrant(ino, 0, 0, 0, 0, status=status))
            case ExtentArrived(ino, instance, start, end):
                if self.registered[ino - 1] == "yes":
                    self.extents |= {Extent(ino, instance, start, end)}
            case Registered():
                self._registered(happening)
            case Replied():
                self._replied(letter.record)
            case Opened(status=status):
                pass  # if it was refused, the end of the socket follows
            case Closed():
                raise AssertionError("this owner says no BYE")

    def _zap(self, zap: Zap) -> None:
        """As Session.zap and ProvenVm.zap_file do: the epoch to wait for is the newest."""
        self._let_go({(zap.ino, instance) for instance in zap.dead})
        if self.setup.delivery == "fifo" and self.registered[zap.ino - 1] == "no":
            self.wrong(f"an invalidation of file {zap.ino} comes after UNREGISTER was answered")
        begun = self._vm().begin_invalidate_file(zap.ino, zap.start, min(zap.end, MAX_PAGES))
        if not self.setup.brackets:
            self.vm.end(begun)
        else:
            for gpa, npages in begun.zapped.ranges:
                gfn = gpa // PAGE_SIZE % SHARED
                self.ranges += ((gfn, gfn + npages),)
        if begun.zapped.leaves:
            self._request_flush()
        kept = begun if self.setup.brackets else None
        self.owed = (*self.owed, Debt(zap.seq, self.shootdown.epoch, kept))

    def _let_go(self, dead: set[tuple[int, int]]) -> None:
        self.extents = frozenset([extent for extent in self.extents if extent[:2] not in dead])

    def _request_flush(self) -> int:
        epoch = self._shootdown().request()
        for v, vcpu in enumerate(self.vcpus):
            if vcpu.state != "inside":
                self._forget(v)
        return epoch

    def _forget(self, v: int) -> None:
        """Drop what the flush at the next entry will drop: no state depends on it."""
        self._vcpu(v, tlb=frozenset())

    def _on_ack(self) -> None:
        debt = self.owed[0]
        self.owed = self.owed[1:]
        if debt.open is not None:
            self._vm().end(debt.open)
            gone = [(gpa // PAGE_SIZE, n) for gpa, n in debt.open.zapped.ranges]
            for gfn, npages in gone:
                kept = list(self.ranges)
                kept.remove((gfn % SHARED, gfn % SHARED + npages))
                self.ranges = tuple(kept)
        self._post(self.user.ack(debt.seq))

    def _registered(self, registered: Registered) -> None:
        _, ino = self._answered(registered.req)
        self.registered = put(self.registered, ino - 1, "no" if registered.status else "yes")
        if registered.status:
            if ino in self.alone and registered.status == errno.EBUSY:
                self.wrong(f"file {ino} was its alone, and is another's")
            return
        if "exclusive" in self.fates:
            self.alone |= {ino}
        if registered.writable:
            self.stores |= {ino}
        for number, (gfn, pages, file, first) in enumerate(self.setup.bound):
            if file == ino and self.vm.mmu.slots.get(number) is None:
                region = Region(
                    number, KVM_MEM_GUEST_MEMFD, gfn * PAGE_SIZE, pages * PAGE_SIZE,
                    guest_memfd_offset=first * PAGE_SIZE,
                )  # fmt: skip
                self._vm().set_user_memory_region2(
                    region, shared=RAM, file=PrivateFile(ino, self.setup.pages)
                )

    def _replied(self, record: Record) -> None:
        what, number = self._answered(record.req)
        if what == "call":
            self._say("answered", number, record.status)
        else:
            self.registered = put(self.registered, number - 1, "no")

    def _answered(self, req: int) -> tuple[str, int]:
        ((what, number),) = [(what, n) for asked, what, n in self.requests if asked == req]
        self.requests = tuple([request for request in self.requests if request[0] != req])
        return what, number
