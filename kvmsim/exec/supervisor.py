# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers the ioctls of a program's processes from a simulated device, until the last one ends.

One thread receives calls and makes them; what takes long (KVM_RUN) is answered by whoever ends
it.  A second thread looks for signals of those that wait, since their callers can be interrupted
by nobody but us (SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from dataclasses import dataclass
from functools import partial
from typing import Final

from kvmsim.device.results import Begun, Failure, NewFd, Pending, Result, Value
from kvmsim.device.system import KvmDevice
from kvmsim.exec.notification import Gone, Listener, Notification
from kvmsim.exec.objects import Objects
from kvmsim.exec.process import Identity, Process, Thread, pending_signals
from kvmsim.exec.remap import RemapError, Remapper, Replacement
from privfs.notifier.fds import thread_group

log = logging.getLogger(__name__)

_SIGNAL_SECONDS: Final = 0.002


@dataclass(frozen=True, slots=True)
class _Waiting:
    notification: Notification
    pending: Pending
    mask: int | None


class Supervisor:
    """``node`` is what /dev/kvm is for the program: its identity."""

    def __init__(self, device: KvmDevice, listener: Listener, node: Identity) -> None:
        self._device = device
        self._listener = listener
        self._objects = Objects()
        self._objects.known[node] = device
        self._processes: dict[int, tuple[Process, int]] = {}  #: and its pidfd here
        self._lock = threading.Lock()
        self._waiting: dict[int, _Waiting] = {}
        self._remapping = False
        self._held: list[tuple[int, int]] = []
        self._some = threading.Event()
        self._ended = threading.Event()

    def serve(self) -> None:
        """Serve until nobody is left who could call."""
        poller = threading.Thread(target=self._watch_signals, name="signals")
        poller.start()
        try:
            while self._turn():
                pass
        finally:
            self._ended.set()
            self._some.set()
            poller.join()
            with self._lock:
                waiting = list(self._waiting.values())
            for one in waiting:
                one.pending.cancel()
                one.pending.wait()
            self._objects.close()
            for process, pidfd in self._processes.values():
                process.close()
                os.close(pidfd)

    def _turn(self) -> bool:
        poll = select.poll()
        poll.register(self._listener.fd, select.POLLIN)
        poll.register(self._objects.inotify, select.POLLIN)
        for end in self._objects.ends:
            poll.register(end, select.POLLIN)
        gone = {pidfd: pid for pid, (_, pidfd) in self._processes.items()}
        for pidfd in gone:
            poll.register(pidfd, select.POLLIN)
        for fd, events in poll.poll():
            if fd == self._listener.fd:
                if not events & select.POLLIN:
                    return False  # POLLHUP: no task has the filter any more
                self._receive()
            elif fd == self._objects.inotify:
                self._objects.closed()
            elif fd in gone:
                process, pidfd = self._processes.pop(gone[fd])
                process.close()
                os.close(pidfd)
            else:
                self._objects.hung_up(fd)
        return True

    # --- calls --------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            call = self._listener.receive()
            process = self._process(call.tid)
        except (Gone, OSError) as error:
            log.debug("a call whose caller is gone: %s", error)
            return
        identity = process.identify(call.fd)
        if not self._listener.valid(call.id):
            return  # the thread died, and what was looked at may be another's
        device = self._objects.known.get(identity) if identity is not None else None
        try:
            if device is None:
                self._listener.let_go(call.id)
                return
            process.plan = []
            try:
                result = device.ioctl(call.request, call.argument, Thread(process, call.tid))
            finally:
                plan, process.plan = process.plan, None
                process.returned()
            self._deliver(call, process, plan, result)
        except Gone:
            log.debug("thread %d left before its answer", call.tid)

    def _process(self, tid: int) -> Process:
        pid = thread_group(tid)
        if pid not in self._processes:
            process = Process(pid, self._objects.known)
            self._processes[pid] = process, os.pidfd_open(pid)
        return self._processes[pid][0]

    def _deliver(
        self, call: Notification, process: Process, plan: list[Replacement], result: Result
    ) -> None:
        if plan and isinstance(result, Value):
            self._remap(call, process, plan, result.value)
            return
        for replacement in plan:  # the ioctl failed
            os.close(replacement.fd)
        match result:
            case Value(value):
                self._listener.answer(call.id, value)
            case Failure(code, reason):
                log.debug("ioctl %#x of thread %d: %s", call.request, call.tid, reason)
                self._listener.answer(call.id, -code)
            case NewFd():
                self._give(call, result)
            case Begun(pending, mask):
                with self._lock:
                    self._waiting[call.id] = _Waiting(call, pending, mask)
                self._some.set()
                pending.on_done(partial(self._done, call.id))

    def _done(self, id: int, outcome: Value | Failure) -> None:
        value = outcome.value if isinstance(outcome, Value) else -outcome.errno
        with self._lock:
            del self._waiting[id]
            if self._remapping:
                self._held.append((id, value))
                return
        self._answer(id, value)

    def _answer(self, id: int, value: int) -> None:
        try:
            self._listener.answer(id, value)
        except Gone:
            log.debug("a caller of KVM_RUN left before its answer")

    def _give(self, call: Notification, new: NewFd) -> None:
        try:
            made = self._objects.make(new)
            try:
                self._listener.give(call.id, made.fd, cloexec=made.cloexec, answer=True)
            finally:
                os.close(made.fd)
        except OSError as error:
            log.debug("a descriptor for thread %d: %s", call.tid, error)
            self._listener.answer(call.id, -(error.errno or errno.EMFILE))

    # --- memory -------------------------------------------------------------------------------

    def _remap(
        self, call: Notification, process: Process, plan: list[Replacement], value: int
    ) -> None:
        answered = False

        def answer() -> None:
            nonlocal answered
            answered = True
            self._listener.answer(call.id, value)

        with self._lock:
            waiting = frozenset(one.notification.tid for one in self._waiting.values())
            self._remapping = True
        try:
            numbers = [
                self._listener.give(call.id, replacement.fd, cloexec=True, answer=False)
                for replacement in plan
            ]
            Remapper(process.pid).replace(
                call.tid, list(zip(plan, numbers, strict=True)), waiting, answer
            )
            process.adopted(plan)
        except (RemapError, OSError) as error:
            log.warning(
                "process %d: %d pages of a slot stay private to it: %s",
                process.pid, sum(one.length for one in plan) >> 12, error,
            )  # fmt: skip
            for replacement in plan:
                os.close(replacement.fd)
            if not answered:  # it could not even be stopped: somebody else traces it
                answer()
        finally:
            with self._lock:
                self._remapping = False
                held, self._held = self._held, []
            for id, outcome in held:
                self._answer(id, outcome)

    # --- signals ------------------------------------------------------------------------------

    def _watch_signals(self) -> None:
        while not self._ended.is_set():
            with self._lock:
                waiting = list(self._waiting.values())
            if not waiting:
                self._some.wait()
                self._some.clear()
                continue
            for one in waiting:
                if pending_signals(one.notification.tid, one.mask) or not self._listener.valid(
                    one.notification.id
                ):
                    one.pending.cancel()
            self._ended.wait(_SIGNAL_SECONDS)
