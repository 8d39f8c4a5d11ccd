# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM at work: its vCPUs on engines, and the thread that runs them.

One thread, the *runner*, owns all engines of the VM and takes runnable vCPUs in turn; a vCPU that
waits for a page of the owner is not runnable, so an engine never sleeps.  Other threads touch a
vCPU only by a kick.  The memory under them, and the proof of its zaps: :mod:`kvmsim.proven`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from hwemu.cpu import api as cpu_api
from hwemu.cpu.unicorn_svm import SvmCpu
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
from kvmsim.guard import Guard
from kvmsim.hostmem import HostMemory
from kvmsim.kind import SHARED_BIT_KIND, VmKind
from kvmsim.proven import POOL_HPA, ProvenVm
from kvmsim.uapi import KVM_INTERNAL_ERROR_EMULATION, Abi
from kvmsim.vcpus import Handler, State, Supervisor, Vcpu
from kvmsim.verdicts import Verdicts
from privfs.notifier.lane import LinkError

log = logging.getLogger(__name__)

SLICE = 0.001
_NICE = 10
_GP = 13


class RunningVm(ProvenVm):
    """The engines of one VM and its runner.

    ``handler(vcpu, exit)`` is called in the runner thread for every exit; it returns False to end
    the VM.
    """

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
        super().__init__(host, label, abi=abi, kind=kind, in_place=in_place)
        self.stop_reason = ""
        self.batches = False  #: the VMM takes many ranges in one exit (kvmsim.rangelist)
        self.storing: int | None = None  #: gpa of the write fault at work (lock held)
        self._handler: Handler = lambda vcpu, exit: False
        self._supervisor = supervisor
        self._work = threading.Condition(self.lock)
        self._inbox: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._last = 0
        self._slice_over = False
        self._reclaimed = 0
        self._runner: threading.Thread | None = None
        self._ticker: threading.Thread | None = None
        self._ended = threading.Event()
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

    # --- time ---------------------------------------------------------------------------------

    def _tick(self) -> None:
        """End a slice when another vCPU is waiting for its turn; exits do not end it."""
        while not self._ended.wait(SLICE):
            runnable = [vcpu for vcpu in self.vcpus if vcpu.state is State.RUNNABLE]
            if len(runnable) > 1 or any(vcpu.polled for vcpu in runnable):
                self._slice_over = True
                self._kick()
