# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of a VM at work: granted to it, zapped under it, and every zap proven.

What makes an acknowledgement true: the table is zapped under ``lock``; the vCPU that is in guest
code has left it; every other vCPU flushes before its next guest instruction (``Shootdown``, which
is KVM's request and OUTSIDE_GUEST_MODE).
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar

from hwemu.arena import new_table_pool
from hwemu.cpu import api as cpu_api
from hwemu.shootdown import Shootdown
from kvmsim.fault import NeedPage, PageGrant
from kvmsim.fence import FencedStage2
from kvmsim.guard import Guard, GuardRefusal
from kvmsim.hostmem import HostMemory
from kvmsim.kind import VmKind
from kvmsim.level import MAX_LEVEL
from kvmsim.migration import Migration
from kvmsim.private import PrivateMemory, Session
from kvmsim.uapi import PAGE_SHIFT, Abi
from kvmsim.vcpus import RunnerStatistics, Vcpu
from kvmsim.vm import Vm, Zapped
from privfs.notifier.user import Granted

log = logging.getLogger(__name__)

POOL_HPA = 256 << 20
#: Bytes of second-stage tables: 4 KiB leaves for 64 GiB on either side.
POOL_SIZE = 256 << 20


class ProvenVm(ABC):
    """Table, private memory and the vCPUs that reach it, joined by one lock.

    It is the :class:`~kvmsim.private.Guest` of its private memory; who runs the vCPUs makes them
    and enters guest code by :meth:`_in_guest` alone.  ``lock`` is KVM's ``mmu_lock``: held over
    every look at and change of slots, attributes, table and grants, never while anything is
    waited for.
    """

    core: ClassVar[type[Vm]] = Vm  #: the class of :attr:`vm`

    def __init__(
        self, host: HostMemory, label: str, *, abi: Abi, kind: VmKind, in_place: bool
    ) -> None:
        self.lock = threading.Lock()
        self.label = label
        self.host = host
        self.private = PrivateMemory(self, host, label, movable=kind.movable)
        self._pool = new_table_pool(POOL_SIZE)
        self.stage2 = FencedStage2(self._pool, POOL_HPA, host.admit)
        self.vm = self.core(
            self.stage2, self.private, abi=abi, kind=kind, max_level=MAX_LEVEL, in_place=in_place
        )
        self.shootdown = Shootdown()
        self.statistics = RunnerStatistics()
        self.vcpus: list[Vcpu] = []
        self.guard: Guard | None = None
        self.death: GuardRefusal | None = None  #: why no vCPU runs any more (kvm->vm_dead)
        self._pending: dict[tuple[Session, int], tuple[int, Callable[[PageGrant], None]]] = {}
        self._gate_lock = threading.RLock()
        self._gate = threading.Condition(self._gate_lock)
        self._current: Vcpu | None = None
        self._entered: Vcpu | None = None  #: in its guest, as the guard has it

    @abstractmethod
    def stop(self, why: str) -> None:
        """End the VM from any thread."""

    # --- zaps and proofs ----------------------------------------------------------------------

    def bound_pages(self, file: int, start: int, end: int) -> Iterable[tuple[int, int]]:
        """Return the parts of file pages ``[start, end)`` that are used here (lock held).

        Of a file that converts in place that is all: the host reaches it without a slot.
        """
        known = (self.vm.mmu.files or {}).get(file)
        if known is not None:
            if start < min(end, known.npages):
                yield start, min(end, known.npages)
            return
        for slot, first, last in self.vm.mmu.slots.find_file(file, start, end):
            yield slot.private_page(first), slot.private_page(last)

    def zap_file(self, file: int, start: int, end: int, *, moving: bool = False) -> int:
        """Zap file pages; return the epoch whose drain proves it (lock held).

        ``moving``: what they hold will lie somewhere else (:meth:`migrated`).
        Where no leaf was, an earlier zap of the same pages may still wait for its flush: that
        epoch, the newest, is the one to wait for.
        """
        zapped = self.vm.invalidate_file(file, start, end, moving=moving)
        self.vm.freed(file, start, end)  # they are another's once this is acknowledged
        self.statistics.shootdowns += 1
        return self.request_flush(zapped) if zapped.leaves else self.shootdown.epoch

    def request_flush(self, zapped: Zapped) -> int:
        """Tell every vCPU what it must forget before its next entry, then take the epoch."""
        for vcpu in self.vcpus:
            vcpu.zapped.extend(zapped.ranges)
        return self.shootdown.request()

    def drain(self, epoch: int) -> None:
        """Wait until no vCPU runs with a translation from before ``epoch`` (no lock held)."""
        self._drain(epoch)
        while self.guard is not None:
            with self.lock:
                if not self.guard.drained():
                    return
                epoch = self.shootdown.request()
            self._drain(epoch)

    def _drain(self, epoch: int) -> None:
        with self._gate_lock:
            while not self.shootdown.drained(epoch):
                for index in self.shootdown.stragglers(epoch):
                    self.vcpus[index].cpu.kick()
                self._gate.wait()

    def die(self, why: GuardRefusal) -> None:
        """kvm_vm_dead(): no vCPU is in guest code any more, nor enters it (no lock held)."""
        with self.lock:
            if self.death is None:
                self.death = why
                log.error("%s: dead: %s", self.label, why)
        self.stop(f"dead: {self.death}")
        with self._gate_lock:
            while self._entered is not None:
                self._entered.cpu.kick()
                self._gate.wait()

    def flush_zapped(self, zapped: Zapped) -> None:
        """Request and prove a flush of every vCPU (no lock held)."""
        with self.lock:
            epoch = self.request_flush(zapped)
        self.drain(epoch)

    def released(self, hpa: int, size: int) -> None:
        """Tell the confidential processor that these bytes are no guest's (lock held).

        GuardRefusal: not while this one lives.
        """
        if self.guard is not None:
            self.guard.released(hpa, size)

    def leaving(self, hpa: int, size: int) -> bool:
        """Tell it that these bytes will lie somewhere else: whether it keeps them until then
        (lock held).
        """
        return self.guard is not None and self.guard.leaving(hpa, size)

    def keeps(self, hpa: int, size: int) -> bool:
        """Whether its tables still name these bytes, until they are told of a move (lock held)."""
        return self.guard is not None and self.guard.keeps(hpa, size)

    # --- grants -------------------------------------------------------------------------------

    def page_granted(self, session: Session, granted: Granted) -> None:
        """Install what the owner granted, if it still may be (lock held)."""
        _, arrived = self._pending.pop((session, granted.req))
        file = session.file_id(granted.ino)
        instance = self.private.extent_id(file, granted.instance)
        writable = session.files.get(granted.ino, False)
        arrived(PageGrant(file, granted.start, granted.end, granted.seq, instance, writable))

    def page_denied(self, session: Session, req: int, status: int) -> None:
        """Let the fault become an exit (lock held)."""
        file, arrived = self._pending.pop((session, req))
        arrived(PageGrant(file, 0, 0, 0, 0, status=status))

    def ask_page(
        self, need: NeedPage, arrived: Callable[[PageGrant], None], *, again: bool = False
    ) -> Callable[[], None] | None:
        """Begin a request to the owner (lock held); what to call without the lock to send it.

        ``arrived`` is called with the answer (lock held). None: the file is used no more.
        """
        session, ino = self.private.locate(need.file)
        if ino not in session.files:
            return None
        record = session.lane.get(
            ino, need.page, need.start, need.end, write=need.write, again=again
        )
        self._pending[session, record.req] = (need.file, arrived)
        self.statistics.pages_asked += 1
        return partial(session.lane.send, record)

    def migrated(self, migration: Migration) -> None:
        """Count what has moved; the next faults map it where it is now (lock held)."""
        file, start, end, old, new = migration
        self.statistics.pages_moved += end - start
        if self.guard is None:
            return
        for slot, first, last in self.vm.mmu.slots.find_file(file, start, end):
            offset = slot.private_page(first) - start << PAGE_SHIFT
            self.guard.migrated(first, last - first, old + offset, new + offset)

    def owner_lost(self, why: str) -> None:
        """Stop: without its owner this memory is nobody's (no lock held)."""
        self.stop(f"machine check: the owner of private memory is gone ({why})")

    def trespassed(self, why: str) -> None:
        """Stop: a flush was forgotten, or the owner took what we hold (no lock held)."""
        self.stop(f"internal error: {why}")

    # --- guest code ---------------------------------------------------------------------------

    def _in_guest(self, vcpu: Vcpu, run: Callable[[], cpu_api.CpuExit]) -> cpu_api.CpuExit:
        """Run guest code; the flush that was asked for comes first."""
        self._current = vcpu
        self.statistics.slices += 1
        if self.guard is not None:
            with self.lock:
                if self.death is not None:
                    self._current = None
                    return cpu_api.KickExit()
                self.guard.enter(vcpu.index)
                self._entered = vcpu
        with self._gate_lock:
            must_flush = self.shootdown.enter(vcpu.index)
        try:
            if must_flush:
                self.statistics.flushes += 1
                self._flush(vcpu)
            return run()
        finally:
            self._current = None
            if self.guard is not None:
                with self.lock:
                    self.guard.leave(vcpu.index)
            with self._gate_lock:
                self._entered = None
                self.shootdown.leave(vcpu.index)
                self._gate.notify_all()

    def _flush(self, vcpu: Vcpu) -> None:
        """Forget translations, and code of what was zapped.

        What is appended meanwhile was zapped before the TLB goes: no stale translation of it is
        left, and its own epoch asks for another flush.
        """
        zapped = []
        while vcpu.zapped:
            zapped.append(vcpu.zapped.popleft())
        vcpu.cpu.flush(zapped)

    def _kick(self) -> None:
        current = self._current
        if current is not None:
            current.cpu.kick()
