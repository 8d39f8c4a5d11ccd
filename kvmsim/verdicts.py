# SPDX-License-Identifier: GPL-2.0-or-later
"""What a confidential processor decides about the vCPUs of a VM at work, and doing it.

The decisions are a :class:`~kvmsim.guard.Guard`'s; here they become registers, exceptions, exits
and faults. All of it belongs to the runner thread, and no vCPU is in guest code meanwhile but one
that is stopped in its fault hook.
"""

from __future__ import annotations

import threading
from typing import Protocol

from hwemu.cpu import api as cpu_api
from kvmsim import exits
from kvmsim.fault import Fault
from kvmsim.guard import Again, Answer, Guard, Inject, Leave, Resolve, Verdict
from kvmsim.mmu import Zapped
from kvmsim.vcpus import Vcpu


class Runner(Protocol):
    """What of a running VM the decisions need."""

    lock: threading.Lock

    def deliver(self, vcpu: Vcpu, left: exits.Exit) -> None:
        """Hand an exit to the VMM."""

    def resolve(self, vcpu: Vcpu, gpa: int, access: cpu_api.Access) -> bool:
        """Begin a fault; False if the vCPU stopped at it."""

    def stopped(self, vcpu: Vcpu) -> None:
        """Go on with the fault that a vCPU stopped at."""

    def request_flush(self, zapped: Zapped) -> int:
        """Have every vCPU forget a range before its next entry (lock held)."""


class Verdicts:
    """The decisions of ``guard`` about the vCPUs of ``runner``."""

    def __init__(self, runner: Runner, guard: Guard) -> None:
        self._runner = runner
        self._guard = guard

    def fault(self, vcpu: Vcpu, gpa: int, access: cpu_api.Access) -> bool | None:
        """In the fault hook: whether to try again (True) or to leave (False); None: KVM's fault."""
        with self._runner.lock:
            vcpu.verdict = self._guard.fault(vcpu.index, gpa, access)
        if vcpu.verdict is None:
            return None
        if vcpu.verdict == Again():
            vcpu.verdict = None
            return True
        return False

    def stopped(self, vcpu: Vcpu) -> None:
        """The vCPU has left guest code at the fault that was decided."""
        verdict, vcpu.verdict = vcpu.verdict, None
        assert verdict is not None
        self._do(vcpu, verdict)

    def intercepted(self, vcpu: Vcpu, left: cpu_api.InterceptExit) -> None:
        """An instruction that is not the guest's own to execute."""
        with self._runner.lock:
            verdict = self._guard.instruction(vcpu.index, left, vcpu.cpu.get_regs())
        self._do(vcpu, verdict)

    def mmio(self, vcpu: Vcpu, fault: Fault) -> bool:
        """An access where no memory is; False: KVM emulates it."""
        wanted = cpu_api.Access.WRITE if fault.access.write else cpu_api.Access.READ
        with self._runner.lock:
            verdict = self._guard.mmio(vcpu.index, fault.gpa, wanted)
        if verdict is not None:
            self._do(vcpu, verdict)
        return verdict is not None

    def complete(self, vcpu: Vcpu, data: bytes | int | None) -> None:
        """The VMM has answered an exit that the guard asked for."""
        vcpu.left_by_guard = False
        with self._runner.lock:
            verdict = self._guard.complete(vcpu.index, data, vcpu.cpu.get_regs())
        if isinstance(verdict, Leave):  # not from inside the VMM's answer: at its next turn
            vcpu.exit = self._leave(vcpu, verdict)
        else:
            self._do(vcpu, verdict)

    def _do(self, vcpu: Vcpu, verdict: Verdict) -> None:
        match verdict:
            case Inject(vector, error_code):
                try:
                    vcpu.cpu.inject(vector, error_code)
                except cpu_api.CpuStateError:  # a fault of the delivery of another: #DF at best
                    self._runner.deliver(vcpu, exits.ShutdownExit())
            case Answer(regs, zapped):
                vcpu.cpu.set_regs(regs)
                self._forget(zapped)
            case Again(zapped):
                vcpu.cpu.repeat()
                self._forget(zapped)
            case Leave():
                self._runner.deliver(vcpu, self._leave(vcpu, verdict))
            case Resolve(gpa, access):
                vcpu.cpu.repeat()
                if not self._runner.resolve(vcpu, gpa, access):
                    self._runner.stopped(vcpu)

    def _leave(self, vcpu: Vcpu, leave: Leave) -> exits.Exit:
        vcpu.left_by_guard = leave.regs is None
        if leave.regs is not None:
            vcpu.cpu.set_regs(leave.regs)
        return leave.exit

    def _forget(self, zapped: Zapped) -> None:
        if zapped.ranges:
            with self._runner.lock:
                self._runner.request_flush(zapped)
