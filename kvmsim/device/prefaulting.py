# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver of KVM_PRE_FAULT_MEMORY: asks the owner, waits, and tells how far it came."""

from __future__ import annotations

import errno
import threading

from kvmsim.device.caller import Efault
from kvmsim.device.pending import Call as PendingCall
from kvmsim.device.pending import Outcome
from kvmsim.device.results import Failure, Value
from kvmsim.device.table import Call
from kvmsim.effect import NeedPage, PageGrant, Retry, RetryReason
from kvmsim.prefault import Finished, PreFault, Progress, Step
from kvmsim.running import RunningVm
from kvmsim.uapi import structs
from privfs.notifier.lane import LinkError


class PreFaulting:
    """One call, in a thread of its own, since an owner may let it wait."""

    def __init__(self, running: RunningVm, work: PreFault, call: Call) -> None:
        self._running = running
        self._work = work
        self._call = call
        self._pending = PendingCall(self._cancel)
        self._answered = threading.Condition(running.lock)
        self._grants: list[PageGrant] = []
        self._cancelled = False

    def begin(self) -> PendingCall:
        """Start; the outcome comes to what is returned."""
        threading.Thread(target=self._drive, name=f"pre-fault {self._running.label}").start()
        return self._pending

    def _cancel(self, _: PendingCall) -> None:
        with self._running.lock:
            self._cancelled = True
            self._answered.notify_all()

    def _drive(self) -> None:
        try:
            outcome = self._finish(self._steps())
        except LinkError as error:
            outcome = Failure(errno.EIO, f"{self._call.name}: {error}")
        self._pending.finish(outcome)

    def _steps(self) -> Finished:
        step: Step = Retry(RetryReason.INVALIDATED)
        again = False
        while not isinstance(step, Finished):
            if self._running.stopping:
                raise LinkError(errno.EIO, self._running.stop_reason)
            if self._cancelled:
                return self._work.interrupted()
            if isinstance(step, NeedPage):
                step = self._ask(step, again=again)
                again = step == Retry(RetryReason.INSTANCE)
            else:
                assert isinstance(step, Retry | Progress)
                with self._running.lock:
                    step = self._work.step(self._running.vm)
        return step

    def _ask(self, need: NeedPage, *, again: bool) -> Step:
        with self._running.lock:
            self._grants.clear()
            send = self._running.ask_page(need, self._arrived, again=again)
        if send is None:
            return Retry(RetryReason.INVALIDATED)
        send()
        with self._running.lock:
            while not self._grants:
                if self._running.stopping:
                    raise LinkError(errno.EIO, self._running.stop_reason)
                if self._cancelled:
                    return self._work.interrupted()
                self._answered.wait()
            return self._work.page_arrived(self._running.vm, self._grants.pop())

    def _arrived(self, grant: PageGrant) -> None:
        """Take the owner's answer (lock held)."""
        self._grants.append(grant)
        self._answered.notify_all()

    def _finish(self, finished: Finished) -> Outcome:
        """Tell the caller what is left, as the kernel does after any progress."""
        left = structs.U64_PAIR.pack(finished.gpa, finished.size)
        try:
            self._call.write(left)
        except Efault as error:
            return Failure(errno.EFAULT, f"{self._call.name}: {error}")
        if finished.errno:
            what = f"gpa {finished.gpa:#x}+{finished.size:#x}"
            return Failure(finished.errno, f"{self._call.name}: {what} cannot be mapped")
        return Value(0)
