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

from kvmsim.device.results import Failure, NewFd, Pending, Result, Value
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
        self._epoll = select.epoll()
        self._epoll.register(listener.fd, select.EPOLLIN)
        self._objects = Objects(self._epoll)
        self._objects.known[node] = device
        self._processes: dict[int, Process] = {}
        self._gone: dict[int, int] = {}  #: pids by their pidfd
        self._threads: dict[int, Thread] = {}  #: by tid, as they were when they last called
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
            for pidfd in list(self._gone):
                self._forget(pidfd)
            self._epoll.close()

    def _turn(self) -> bool:
        for fd, events in self._epoll.poll():
            if fd == self._listener.fd:
                if not events & select.EPOLLIN:
                    return False  # EPOLLHUP: no task has the filter any more
                self._receive()
            elif fd in self._gone:
                self._forget(fd)
            else:
                self._objects.happened(fd)
        return True

    def _forget(self, pidfd: int) -> None:
        """A process is gone."""
        process = self._processes.pop(self._gone.pop(pidfd))
        self._threads = {
            tid: thread for tid, thread in self._threads.items() if thread.process is not process
        }
        self._epoll.unregister(pidfd)
        process.close()

    # --- calls --------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            call = self._listener.receive()
            thread = self._threads.get(call.tid)
            identity = None if thread is None else thread.identify(call.fd)
            if thread is None or identity is None:  # nothing is open there, or it was another's tid
                thread = self._thread(call.tid)
                identity = thread.identify(call.fd)
                if not self._listener.valid(call.id):
                    return  # the thread died, and what was looked at may be another's
        except (Gone, OSError) as error:
            log.debug("a call whose caller is gone: %s", error)
            return
        device = self._objects.known.get(identity) if identity is not None else None
        try:
            if device is None:
                self._listener.let_go(call.id)
                return
            process = thread.process
            process.plan = []
            try:
                result = device.ioctl(call.request, call.argument, thread)
            finally:
                plan, process.plan = process.plan, None
                process.returned()
            self._deliver(call, process, plan, result)
        except Gone:
            log.debug("thread %d left before its answer", call.tid)

    def _thread(self, tid: int) -> Thread:
        """Find out whose thread it is; OSError."""
        pid = thread_group(tid)
        process = self._processes.get(pid)
        if process is None:
            process = self._processes[pid] = Process(pid, self._objects.known)
            self._gone[process.pidfd] = pid
            self._epoll.register(process.pidfd, select.EPOLLIN)
        thread = self._threads[tid] = Thread(process, tid)
        return thread

    def _deliver(
        self, call: Notification, process: Process, plan: list[Replacement], result: Result
    ) -> None:
        if plan and isinstance(result, Value):
            self._remap(call, process, plan, result.value)
            return
        for replacement in plan:  # the ioctl failed
            os.close(replacement.fd)
        if isinstance(result, Value):
            self._listener.answer(call.id, result.value)
        elif isinstance(result, Failure):
            log.debug("ioctl %#x of thread %d: %s", call.request, call.tid, result.reason)
            self._listener.answer(call.id, -result.errno)
        elif isinstance(result, NewFd):
            self._give(call, result)
        else:
            with self._lock:
                self._waiting[call.id] = _Waiting(call, result.pending, result.signal_mask)
            self._some.set()
            result.pending.on_done(partial(self._done, call.id))

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
