# SPDX-License-Identifier: GPL-2.0-or-later
"""A vCPU's descriptor: its lock, its state, and KVM_RUN from begin to outcome.

KVM holds vcpu->mutex over every ioctl, KVM_RUN for as long as the guest runs. Here an ioctl that
finds the vCPU running is queued and answered later, as its caller would sleep on the mutex.
KVM_RUN follows kvm_arch_vcpu_ioctl_run() and vcpu_run() of arch/x86/kvm/x86.c (v6.18).
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import TYPE_CHECKING, Final

from hwemu.cpu.api import EFER_LMA, MsrExit
from hwemu.cpu.fpu import Fpu
from kvmsim import exits
from kvmsim.device.caller import Caller
from kvmsim.device.cpuid import GuestCpuid
from kvmsim.device.events import Events
from kvmsim.device.guestpage import GuestPage
from kvmsim.device.hypercall import Answer, ReadList, hypercall, listed
from kvmsim.device.kvmclock import KvmClock
from kvmsim.device.msrs import MsrStore
from kvmsim.device.pending import Call as PendingCall
from kvmsim.device.pending import Outcome
from kvmsim.device.registers import RESET_REGS, RESET_SREGS
from kvmsim.device.results import Begun, Failure, Pending, Result, Value
from kvmsim.device.runbuffer import RunBuffer
from kvmsim.device.serial import Serial
from kvmsim.device.table import Call, Level, dispatch
from kvmsim.device.vcpuregisters import store_sync_regs, take_sync_regs
from kvmsim.device.vcputable import TABLE
from kvmsim.uapi import (
    KVM_EXIT_INTR,
    KVM_EXIT_IRQ_WINDOW_OPEN,
    KVM_EXIT_UNKNOWN,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
)
from kvmsim.uapi.encoding import KVMIO

if TYPE_CHECKING:
    from kvmsim.device.vm import VmDevice
    from kvmsim.vcpus import Vcpu

_CS_L: Final = 1 << 9
_IF: Final = 1 << 9
_IMMEDIATE: Final = "immediate_exit"
_SIGNAL: Final = "a signal was pending"


class Completion(Enum):
    """What the next KVM_RUN must do first (complete_userspace_io)."""

    NOTHING = "nothing"
    PORT = "hand the data of an IN to the guest"
    MMIO = "hand the data of a load to the guest"
    HYPERCALL = "hand the result of a hypercall to the guest"


class VcpuDevice:
    """vCPU ``id`` of ``vm`` on the engine ``engine``."""

    def __init__(self, vm: VmDevice, id: int, engine: Vcpu, *, bsp: bool) -> None:
        self.vm = vm
        self.id = id
        self.engine = engine
        self.cpu = engine.cpu
        self.cpuid = GuestCpuid()
        self.msrs = MsrStore(vm.clock.tsc, bsp=bsp, amd=lambda: self.cpuid.amd_compatible)
        self.clock = KvmClock(vm, self.msrs)
        self.events = Events()
        self.cr8 = 0
        self.debugregs: tuple[int, ...] = (0, 0, 0, 0, 0xFFFF0FF0, 0x400)
        self.lapic = b""
        self.signal_mask: int | None = None
        self.has_run = False
        self.stale_code = False
        waits = vm.irqchip and not bsp
        self.mp_state = KVM_MP_STATE_UNINITIALIZED if waits else KVM_MP_STATE_RUNNABLE
        self.buffer: RunBuffer | None = None
        self.completion = Completion.NOTHING
        self._asked = 0  # bytes that the completion needs
        self._serial = Serial(f"vcpu {id}", self._cancel)
        self._lock = self._serial.lock  # over the five below
        self._running: PendingCall | None = None
        self._caller: Caller | None = None
        self._only_settle = ""  # why the run is to end when what waits is complete; empty: it runs
        self._other: Pending | None = None  # a call other than KVM_RUN that waits
        self._released = False
        self.cpu.watch_code()
        self.cpu.set_cpuid(self.cpuid)
        self.cpu.set_sregs(RESET_SREGS)
        self.cpu.set_regs(RESET_REGS)
        self.cpu.set_fpu(Fpu())

    # --- the descriptor -----------------------------------------------------------------------

    def attach(self, memory: memoryview) -> None:
        """Use ``memory`` as struct kvm_run; ValueError if it is too small or read-only."""
        self.buffer = RunBuffer(memory, self.vm.abi)

    def ioctl(self, request: int, argument: int, caller: Caller) -> Result:
        """One ioctl on the vCPU's descriptor (kvm_vcpu_ioctl())."""
        if caller.mm != self.vm.mm or self.vm.dead:
            return Failure(errno.EIO, self.vm.dead or "the VM belongs to another address space")
        if request >> 8 & 0xFF != KVMIO:
            return Failure(errno.EINVAL, f"request {request:#x} is not of KVM")
        return self._serial.call(
            lambda: dispatch(self, Level.VCPU, TABLE, request, argument, caller)
        )

    def release(self) -> None:
        """The last reference is gone; a guest that runs leaves first. The id stays taken."""
        with self._lock:
            if self._released:
                return
            self._released = True
            waiting: list[Pending] = [*self._serial.queued()]
            waiting += [pending for pending in (self._running, self._other) if pending]
        for pending in waiting:
            pending.cancel()
        self._serial.wait_idle()
        if self.buffer is not None:
            self.buffer.release()
            self.buffer = None
        self.clock.close()
        self.vm.unpin()

    def _cancel(self, pending: PendingCall) -> None:
        with self._lock:
            if not self._serial.remove(pending):
                if self._running is pending:
                    self.vm.running.interrupt(self.engine.index)
                return
        pending.finish(Failure(errno.EINTR, "interrupted while the vCPU was busy"))

    # --- KVM_RUN ------------------------------------------------------------------------------

    def run(self, call: Call) -> Result:
        """KVM_RUN: complete what waits, then let the guest run."""
        if call.argument:
            raise call.refused(errno.EINVAL, "the argument must be 0")
        buffer = self.buffer
        if buffer is None:
            raise call.refused(errno.EINVAL, "no memory was attached for kvm_run")
        immediate_exit = buffer.immediate_exit
        buffer.begin()
        self.has_run = True
        unfinished = self.completion is not Completion.NOTHING
        if self.mp_state != KVM_MP_STATE_UNINITIALIZED:
            take_sync_regs(self, buffer, call)
            if not self.vm.irqchip:
                cr8 = buffer.cr8
                if cr8 & ~0xF:
                    raise call.refused(errno.EINVAL, f"cr8 {cr8:#x} is not valid")
                self.cr8 = cr8
            self._complete(buffer)
        if immediate_exit:
            if unfinished:
                return self._start(call.caller, buffer, only_settle=_IMMEDIATE)
            self._save(buffer)
            return Failure(errno.EINTR, _IMMEDIATE)
        refused = self.vm.launch.run_refused(self) if self.vm.launch is not None else ""
        if refused:
            raise call.refused(errno.EINVAL, refused)
        buffer.set_exit_reason(KVM_EXIT_UNKNOWN)
        if call.caller.signal_pending(self.signal_mask):
            buffer.set_exit_reason(KVM_EXIT_INTR)
            if unfinished:
                return self._start(call.caller, buffer, only_settle=_SIGNAL)
            self._save(buffer)
            return Failure(errno.EINTR, _SIGNAL)
        return self._start(call.caller, buffer)

    def _start(self, caller: Caller, buffer: RunBuffer, *, only_settle: str = "") -> Result:
        self.cpu.recheck_code()  # user space may have written anything, code too
        if self.stale_code:
            self.stale_code = False
            self.cpu.flush()
        if self.mp_state == KVM_MP_STATE_HALTED and self.events.waiting:
            self.mp_state = KVM_MP_STATE_RUNNABLE
        pending = PendingCall(self._cancel)
        self.engine.polled = buffer.request_interrupt_window
        self.vm.start()
        with self._lock:  # together: a cancel finds the run, and ended() finds it or we its cause
            if self.vm.dead:
                return Failure(errno.EIO, self.vm.dead)
            self._running = pending
            self._caller = caller
            self._only_settle = only_settle
            self.engine.settling = bool(only_settle)
            if self.mp_state == KVM_MP_STATE_RUNNABLE:
                self.vm.running.make_runnable(self.engine.index)
        return Begun(pending, self.signal_mask)

    def wait_for(self, pending: Pending) -> Begun:
        """Keep the mutex until ``pending`` is over; it is no KVM_RUN."""

        def done(_: Outcome) -> None:
            with self._lock:
                self._other = None
            self._serial.unlock()

        with self._lock:
            self._other = pending
        pending.on_done(done)
        return Begun(pending)

    def _complete(self, buffer: RunBuffer) -> None:
        completion, self.completion = self.completion, Completion.NOTHING
        match completion:
            case Completion.PORT:
                self._answer(buffer.port_data(self._asked))
            case Completion.MMIO:
                self._answer(buffer.mmio_data(self._asked))
            case Completion.HYPERCALL:
                result = buffer.hypercall_result()
                self._answer(result if self._long_mode() else result & 0xFFFF_FFFF)

    def _answer(self, data: bytes | int) -> None:
        self.vm.running.complete(self.engine.index, data)

    @property
    def protected(self) -> bool:
        """Whether nobody sees its registers (guest_state_protected)."""
        launch = self.vm.launch
        return launch is not None and launch.protected(self)

    def start_up(self) -> None:
        """Its state is defined now: it waits for no INIT."""
        self.mp_state = KVM_MP_STATE_RUNNABLE

    # --- in the runner thread -----------------------------------------------------------------

    def enter(self) -> bool:
        """Inject what waits; False if KVM_RUN ended instead, since an interrupt may come."""
        self.clock.enter()
        injection = self.events.next()
        if injection is not None:
            self.cpu.inject(injection.vector, injection.error_code)
            return True
        buffer = self.buffer
        if (
            self.engine.polled
            and buffer is not None
            and not self.vm.irqchip
            and buffer.request_interrupt_window
            and self.cpu.interruptible
        ):
            self._end(KVM_EXIT_IRQ_WINDOW_OPEN, Value(0))
            return False
        return True

    def msr(self, access: MsrExit) -> int | None:
        """RDMSR or WRMSR of what the engine does not keep; None: #GP."""
        if access.is_write:
            return 0 if self.msrs.write(access.index, access.value, host=False) else None
        return self.msrs.read(access.index, host=False)

    def exited(self, left: exits.Exit) -> None:
        """The guest left: go on if the kernel would, else end KVM_RUN."""
        match left:
            case exits.HltExit() if self.vm.irqchip:
                self.mp_state = KVM_MP_STATE_HALTED
                self.vm.running.halt(self.engine.index)
                return
            case exits.HypercallExit():
                forwarded = self._hypercall(left)
                if forwarded is None:
                    return
                left = forwarded
            case exits.InterruptedExit() if self._only_settle:
                self._end(None, Failure(errno.EINTR, self._only_settle))
                return
            case exits.BadHvaExit(gpa):
                if self._caller is not None and self.vm.memory.resolve(gpa, self._caller):
                    return
        self._end(left, None)

    def ended(self, why: str) -> None:
        """No vCPU of the VM runs any more."""
        with self._lock:
            running, other = self._running, self._other
        if running is not None:
            self._finish(Failure(errno.EIO, why))
        if other is not None:
            other.cancel()

    def _hypercall(self, left: exits.HypercallExit) -> exits.HypercallExit | None:
        by_guard = self.engine.left_by_guard  # who asks is nobody else's to look at
        answer = hypercall(
            left.nr,
            left.args,
            cpl=0 if by_guard else self.cpu.get_sregs().ss.attributes >> 5 & 3,
            long_mode=by_guard or self._long_mode(),
            forwarded=self.vm.forwarded_hypercalls,
            batches=self.vm.running.batches,
        )
        if isinstance(answer, ReadList):
            answer = listed(self._read_guest(answer.gpa, answer.size))
        if isinstance(answer, Answer):
            self._answer(answer.value)
            return None
        return answer

    def _read_guest(self, gpa: int, size: int) -> bytes | None:
        """Bytes of shared memory within a page, None if they are not there."""
        page = GuestPage(self.vm.running, "KVMSIM_HC_MAP_GPA_RANGES")
        try:
            page.activate(gpa, size)
            return page.read()
        finally:
            page.deactivate()

    def _end(self, left: exits.Exit | int | None, outcome: Outcome | None) -> None:
        """Write the exit (None: none), say what the next KVM_RUN must complete, and answer."""
        self.vm.running.halt(self.engine.index)
        buffer = self.buffer
        assert buffer is not None
        if isinstance(left, int):
            buffer.set_exit_reason(left)
        elif left is not None:
            long_mode = isinstance(left, exits.HypercallExit) and self._long_mode()
            result = buffer.write_exit(left, long_mode=long_mode)
            outcome = Failure(-result, _why(left)) if result else Value(0)
            self._note_completion(left)
        store_sync_regs(self, buffer)
        self._save(buffer)
        assert outcome is not None
        self._finish(outcome)

    def _note_completion(self, left: exits.Exit) -> None:
        match left:
            case exits.IoExit(write=False, size=size, count=count):
                self.completion, self._asked = Completion.PORT, size * count
            case exits.MmioExit(write=False, length=length):
                self.completion, self._asked = Completion.MMIO, length
            case exits.HypercallExit():
                self.completion = Completion.HYPERCALL

    def _finish(self, outcome: Outcome) -> None:
        with self._lock:
            pending, self._running = self._running, None
            self._caller = None
            self.vm.running.forget_interrupt(self.engine.index)
        assert pending is not None
        self._serial.unlock()
        pending.finish(outcome)

    def _save(self, buffer: RunBuffer) -> None:
        ready = self.vm.irqchip or (self.cpu.interruptible and not self.events.waiting)
        buffer.save(
            ready=ready,
            if_flag=bool(self.cpu.get_regs().rflags & _IF),
            cr8=self.cr8,
            apic_base=self.msrs.apic_base,
        )

    def _long_mode(self) -> bool:
        """is_64_bit_hypercall()."""
        sregs = self.cpu.get_sregs()
        return bool(sregs.efer & EFER_LMA and sregs.cs.attributes & _CS_L)


def _why(left: exits.Exit) -> str:
    match left:
        case exits.MemoryFaultExit(gpa, size, private, _, reason):
            side = "private" if private else "shared"
            return f"KVM_EXIT_MEMORY_FAULT: {side} gpa {gpa:#x}+{size:#x}: {reason}"
        case exits.BadHvaExit(gpa):
            return f"no memory of the caller behind gpa {gpa:#x}"
        case exits.InterruptedExit():
            return "interrupted by a signal"
    return type(left).__name__
