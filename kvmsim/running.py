# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM at work: its vCPUs on engines, its runner thread, its zaps proven.

One thread, the *runner*, owns all engines of the VM and takes runnable vCPUs in turn; a vCPU that
waits for a page of the owner is not runnable, so an engine never sleeps.  Other threads touch a
vCPU only by a kick.

What makes an acknowledgement true: the table is zapped under ``lock``; the vCPU that is in guest
code has left it; every other vCPU flushes before its next guest instruction (``Shootdown``, which
is KVM's request and OUTSIDE_GUEST_MODE).
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar

from hwemu.arena import new_table_pool
from hwemu.cpu import api as cpu_api
from hwemu.cpu.unicorn_svm import SvmCpu
from hwemu.shootdown import Shootdown
from kvmsim import exits
from kvmsim.delivery import event_delivery
from kvmsim.fault import (
    Access,
    Effect,
    Fault,
    Installed,
    LeaveGuest,
    NeedPage,
    PageGrant,
    Retry,
    RetryReason,
)
from kvmsim.fence import FencedStage2
from kvmsim.guard import Guard, GuardRefusal
from kvmsim.hostmem import HostMemory
from kvmsim.kind import SHARED_BIT_KIND, VmKind
from kvmsim.level import MAX_LEVEL
from kvmsim.migration import Migration
from kvmsim.private import PrivateMemory, Session
from kvmsim.uapi import KVM_INTERNAL_ERROR_EMULATION, PAGE_SHIFT, Abi
from kvmsim.vcpus import Handler, RunnerStatistics, State, Supervisor, Vcpu
from kvmsim.verdicts import Verdicts
from kvmsim.vm import Vm, Zapped
from privfs.notifier.lane import LinkError
from privfs.notifier.user import Granted

log = logging.getLogger(__name__)

POOL_HPA = 256 << 20
#: Bytes of second-stage tables: 4 KiB leaves for 64 GiB on either side.
POOL_SIZE = 256 << 20
SLICE = 0.001
_NICE = 10
_GP = 13


class RunningVm:
    """Engines, table and private memory of one VM, joined by one lock.

    ``handler(vcpu, exit)`` is called in the runner thread for every exit; it returns False to end
    the VM.  ``lock`` is KVM's ``mmu_lock``: held over every look at and change of slots,
    attributes, table and grants, never while anything is waited for.
    """

    core: ClassVar[type[Vm]] = Vm  #: the class of :attr:`vm`

    def __init__(
        self,
        host: HostMemory,
        vcpus: int,
        label: str,
        *,
        abi: Abi = "upstream",
        kind: VmKind = SHARED_BIT_KIND,
        supervisor: Supervisor | None = None,
        in_place: bool = False,
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
        self.stop_reason = ""
        self.batches = False  #: the VMM takes many ranges in one exit (kvmsim.rangelist)
        self.storing: int | None = None  #: gpa of the write fault at work (lock held)
        self.death: GuardRefusal | None = None  #: why no vCPU runs any more (kvm->vm_dead)
        self._handler: Handler = lambda vcpu, exit: False
        self._supervisor = supervisor
        self._pending: dict[tuple[Session, int], tuple[int, Callable[[PageGrant], None]]] = {}
        self._work = threading.Condition(self.lock)
        self._gate_lock = threading.RLock()
        self._gate = threading.Condition(self._gate_lock)
        self._inbox: deque[Callable[[], None]] = deque()
        self._current: Vcpu | None = None
        self._entered: Vcpu | None = None  #: in its guest, as the guard has it
        self._stopping = False
        self._last = 0
        self._slice_over = False
        self._reclaimed = 0
        self._runner: threading.Thread | None = None
        self._ticker: threading.Thread | None = None
        self._ended = threading.Event()
        self.guard: Guard | None = None
        self._verdicts: Verdicts | None = None
        for _ in range(vcpus):
            self.add_vcpu()

    def add_vcpu(self) -> Vcpu:
        """Make another vCPU, also while others run; it is IDLE."""
        vcpu: Vcpu
        index = len(self.vcpus)

        def on_fault(gpa: int, access: cpu_api.Access) -> bool:
            return self._on_fault(vcpu, gpa, access)

        engine = SvmCpu(
            self.host.arena, self._pool, POOL_HPA, self.stage2.root_hpa, index, on_fault
        )
        vcpu = Vcpu(index, engine)
        with self.lock, self._gate_lock:
            self.shootdown.add()
            self.vcpus.append(vcpu)
        if self.guard is not None:
            engine.protect(self.guard.instructions)
        return vcpu

    def protect(self, guard: Guard) -> None:
        """Let a confidential processor's tables decide; before any vCPU runs or slot is made."""
        self.guard = self.vm.mmu.gate = guard
        self.private.exclusive = True
        self.private.movable = guard.movable
        self._verdicts = Verdicts(self, guard)
        for vcpu in self.vcpus:
            vcpu.cpu.protect(guard.instructions)

    # --- life ---------------------------------------------------------------------------------

    def start(self, handler: Handler) -> None:
        """Run every vCPU that is not IDLE until a handler says otherwise."""
        self._handler = handler
        self._runner = threading.Thread(target=self._run, name=f"runner {self.label}")
        self._ticker = threading.Thread(target=self._tick, name=f"ticker {self.label}")
        self._runner.start()
        self._ticker.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end of the VM; False after ``timeout`` seconds."""
        return self._ended.wait(timeout)

    @property
    def started(self) -> bool:
        """Whether a vCPU may have run."""
        return self._runner is not None

    @property
    def stopping(self) -> bool:
        """Whether it has ended, or is about to."""
        return self._stopping

    def stop(self, why: str) -> None:
        """End the VM from any thread."""
        with self.lock:
            if not self._stopping:
                self._stopping = True
                self.stop_reason = why
            self._work.notify_all()
        self._kick()

    def close(self) -> None:
        """End the threads, the engines and the sessions."""
        self.stop("closed")
        for thread in (self._runner, self._ticker):
            if thread is not None:
                thread.join()
        for vcpu in self.vcpus:
            vcpu.cpu.close()
        if self.guard is not None:
            with self.lock:
                self.guard.close()
        self.private.close()

    def post(self, work: Callable[[], None]) -> None:
        """Have the runner thread do something between two slices."""
        with self.lock:
            self._inbox.append(work)
            self._work.notify_all()
        self._kick()

    def make_runnable(self, index: int) -> None:
        """Start or wake a vCPU."""
        with self.lock:
            if self.vcpus[index].state in (State.IDLE, State.HALTED):
                self.vcpus[index].state = State.RUNNABLE
                self._work.notify_all()

    def halt(self, index: int) -> None:
        """Take a vCPU off its turns until :meth:`make_runnable`; runner thread only."""
        with self.lock:
            self.vcpus[index].state = State.HALTED

    def interrupt(self, index: int) -> None:
        """Have a vCPU leave with InterruptedExit, from any thread, whatever it waits for.

        Nothing is lost: its next run goes on where it stood. Another exit that it is about to
        leave with comes first; :meth:`forget_interrupt` then.
        """
        vcpu = self.vcpus[index]
        with self.lock:
            vcpu.interrupted = True
            self._work.notify_all()
        vcpu.cpu.kick()

    def forget_interrupt(self, index: int) -> None:
        """Take back what is left of :meth:`interrupt`; runner thread, vCPU halted."""
        with self.lock:
            self.vcpus[index].interrupted = self.vcpus[index].settling = False

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

    def _arrived(self, vcpu: Vcpu, fault: Fault, grant: PageGrant) -> None:
        effect = self.vm.page_arrived(fault, grant)
        if vcpu.awaited is not fault:
            return  # it was interrupted meanwhile: the instruction will fault again, or not
        vcpu.awaited = None
        vcpu.again = effect == Retry(RetryReason.INSTANCE)
        if isinstance(effect, LeaveGuest):
            vcpu.exit = effect.exit
        vcpu.state = State.RUNNABLE  # a retry executes the instruction, and faults, again
        self._work.notify_all()

    # --- the runner ---------------------------------------------------------------------------

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            while (vcpu := self._next()) is not None:
                self._turn(vcpu)
        except LinkError as error:
            self.stop(f"machine check: {error}")
        except Exception as error:
            log.exception("%s: the runner failed", self.label)
            self.stop(f"internal error: {error}")
        finally:
            self._ended.set()
            if self._supervisor is not None:
                self._supervisor.ended(self.stop_reason)

    def _next(self) -> Vcpu | None:
        """Do what was posted, then take the next runnable vCPU in turn; None at the end."""
        while True:
            with self.lock:
                if self._reclaimed != self.shootdown.epoch:
                    self._reclaimed = self.shootdown.epoch
                    self.stage2.reclaim()  # no engine of this VM is in the middle of a walk here
                while not self._inbox and not self._stopping:
                    if self._slice_over:
                        self._slice_over = False
                        self._last += 1
                    for step in range(len(self.vcpus)):
                        vcpu = self.vcpus[(self._last + step) % len(self.vcpus)]
                        if vcpu.state is State.RUNNABLE or vcpu.interrupted:
                            self._last = vcpu.index
                            return vcpu
                    self._work.wait()
                if self._stopping:
                    return None
                work = self._inbox.popleft()
            work()

    def _turn(self, vcpu: Vcpu) -> None:
        if vcpu.exit is not None:
            left, vcpu.exit = vcpu.exit, None
            self.deliver(vcpu, left)
            return
        # complete_userspace_io before signals: what a device said is in the guest when it leaves
        settling = vcpu.settling or (vcpu.interrupted and vcpu.cpu.unfinished)
        if settling and vcpu.awaited is None:
            settled = self._in_guest(vcpu, vcpu.cpu.settle)
            if not isinstance(settled, cpu_api.KickExit):
                self._left(vcpu, settled)
                return
            vcpu.interrupted = True
        if vcpu.interrupted:
            with self.lock:
                vcpu.interrupted = vcpu.settling = False
                vcpu.awaited = None
                vcpu.state = State.HALTED
            self.deliver(vcpu, exits.InterruptedExit())
            return
        if self._supervisor is not None and not self._supervisor.enter(vcpu.index):
            return
        self._left(vcpu, self._in_guest(vcpu, vcpu.cpu.run))

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

    def _left(self, vcpu: Vcpu, left: cpu_api.CpuExit) -> None:
        """Go on after the engine's exit."""
        match left:
            case cpu_api.KickExit():
                return
            case cpu_api.Stage2Fault() if self._verdicts and vcpu.verdict is not None:
                self._verdicts.stopped(vcpu)
            case cpu_api.Stage2Fault():
                self.stopped(vcpu)
            case cpu_api.InterceptExit():
                assert self._verdicts is not None
                self._verdicts.intercepted(vcpu, left)
            case cpu_api.IoExit(port, size, is_write, data, count):
                self.deliver(vcpu, exits.IoExit(port, size, is_write, data, count))
            case cpu_api.MmioExit(gpa, size, is_write, data):
                gpa &= ~self.vm.kind.side_bit
                self.deliver(vcpu, exits.MmioExit(gpa, size, is_write, data))
            case cpu_api.HltExit():
                self.deliver(vcpu, exits.HltExit())
            case cpu_api.HypercallExit(nr, args, instruction):
                if instruction in ("vmmcall", "vmcall"):
                    self.deliver(vcpu, exits.HypercallExit(nr, args))
                else:
                    log.warning(
                        "%s: vCPU %d: %s is not modelled", self.label, vcpu.index, instruction
                    )
                    self.deliver(vcpu, exits.InternalErrorExit(KVM_INTERNAL_ERROR_EMULATION))
            case cpu_api.MsrExit():
                value = self._supervisor.msr(vcpu.index, left) if self._supervisor else None
                if value is None:
                    vcpu.cpu.inject(_GP, 0)  # kvm_inject_gp: an MSR that does not exist
                elif not left.is_write:
                    vcpu.cpu.complete(value)
            case cpu_api.ShutdownExit():
                self.deliver(vcpu, exits.ShutdownExit())
            case cpu_api.CpuError(reason, delivery):
                log.warning("%s: vCPU %d: %s", self.label, vcpu.index, reason)
                left_with = exits.InternalErrorExit(KVM_INTERNAL_ERROR_EMULATION)
                if delivery is not None:
                    gpa = delivery.gpa & ~self.vm.kind.side_bit
                    left_with = event_delivery(gpa, delivery.access, vcpu.index)
                self.deliver(vcpu, left_with)

    def deliver(self, vcpu: Vcpu, left: exits.Exit) -> None:
        """Hand an exit to the VMM, who may end the VM; of a dead one nothing is left to do."""
        if self.death is None and not self._handler(vcpu.index, left):
            self.stop(self.stop_reason or "ended by its VMM")

    def complete(self, index: int, data: bytes | int | None) -> None:
        """Answer the last exit of a vCPU; runner thread, or one that stands in for it."""
        vcpu = self.vcpus[index]
        if vcpu.left_by_guard and self._verdicts is not None:
            self._verdicts.complete(vcpu, data)
        else:
            vcpu.cpu.complete(data)

    # --- faults -------------------------------------------------------------------------------

    def _on_fault(self, vcpu: Vcpu, gpa: int, access: cpu_api.Access) -> bool:
        """Resolve a fault inside the engine if nothing has to be waited for."""
        said = self._verdicts.fault(vcpu, gpa, access) if self._verdicts is not None else None
        return self.resolve(vcpu, gpa, access) if said is None else said

    def resolve(self, vcpu: Vcpu, gpa: int, access: cpu_api.Access) -> bool:
        """Begin a fault and end it if nothing has to be waited for; False: the vCPU stops at it."""
        wanted = Access(
            write=bool(access & cpu_api.Access.WRITE), fetch=bool(access & cpu_api.Access.EXEC)
        )
        fault = Fault(vcpu.index, gpa, wanted)
        with self.lock:
            self.storing = gpa & ~self.vm.kind.side_bit if wanted.write else None
            effect = self.vm.begin_fault(fault)
            self.storing = None
        if isinstance(effect, Installed):
            return True
        vcpu.stopped_at = (fault, effect)
        return False

    def stopped(self, vcpu: Vcpu) -> None:
        """Go on with the fault that a vCPU stopped at."""
        assert vcpu.stopped_at is not None
        fault, effect = vcpu.stopped_at
        vcpu.stopped_at = None
        self._faulted(vcpu, fault, effect)

    def _faulted(self, vcpu: Vcpu, fault: Fault, effect: Effect) -> None:
        vcpu.faults += 1
        match effect:
            case NeedPage():
                with self.lock:
                    arrived = partial(self._arrived, vcpu, fault)
                    send = self.ask_page(effect, arrived, again=vcpu.again)
                    if send is None:
                        return
                    vcpu.awaited = fault
                    vcpu.state = State.WAITS
                send()
            case LeaveGuest(exits.MmioExit()):
                if self._verdicts is not None and self._verdicts.mmio(vcpu, fault):
                    return
                left = self._in_guest(vcpu, lambda: vcpu.cpu.run_mmio(fault.gpa))
                self._left(vcpu, left)
            case LeaveGuest(left_with):
                self.deliver(vcpu, left_with)
            case Retry() | Installed():
                return

    # --- time ---------------------------------------------------------------------------------

    def _tick(self) -> None:
        """End a slice when another vCPU is waiting for its turn; exits do not end it."""
        while not self._ended.wait(SLICE):
            runnable = [vcpu for vcpu in self.vcpus if vcpu.state is State.RUNNABLE]
            if len(runnable) > 1 or any(vcpu.polled for vcpu in runnable):
                self._slice_over = True
                self._kick()

    def _kick(self) -> None:
        current = self._current
        if current is not None:
            current.cpu.kick()
