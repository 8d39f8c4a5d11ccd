# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers the ioctls of a program's processes from a simulated device, until the last one ends.

One thread receives calls and makes them; what takes long (KVM_RUN) is answered by whoever ends
it.  A second thread looks for signals of those that wait, since their callers can be interrupted
by nobody but us (SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import threading
from dataclasses import dataclass
from functools import partial
from typing import Final

from kvmsim.device.caller import Efault, PrivateFd
from kvmsim.device.gmemfile import GmemFile
from kvmsim.device.results import DeviceObject, Failure, NewFd, Pending, Result, Value
from kvmsim.device.system import KvmDevice
from kvmsim.exec.filemappings import collapses, maps_privately
from kvmsim.exec.filter import CLONE, CLONE3, CLONE_VM, COLLAPSE, FORK, MADVISE, MMAP
from kvmsim.exec.forks import Fork
from kvmsim.exec.notification import Gone, Listener, Notification
from kvmsim.exec.objects import Objects
from kvmsim.exec.process import Identity, Process, Repeating, Thread, pending_signals
from kvmsim.exec.remap import Remapper, Replacement
from kvmsim.exec.requests import Requests
from kvmsim.exec.watcher import Watcher
from kvmsim.uapi import KVM_SET_USER_MEMORY_REGION, PAGE_SHIFT, USERSPACE_MEMORY_REGION
from privfs.notifier.fds import thread_group

log = logging.getLogger(__name__)

_SIGNAL_SECONDS: Final = 0.002
_Device = DeviceObject | GmemFile


@dataclass(frozen=True, slots=True)
class _Waiting:
    notification: Notification
    pending: Pending
    mask: int | None


class Supervisor:
    """``node`` is what /dev/kvm is for the program: its identity.

    ``requests`` are those to end.
    """

    def __init__(
        self, device: KvmDevice, listener: Listener, node: Identity, requests: Requests
    ) -> None:
        self._device = device
        self._listener = listener
        self._objects_lock = threading.Lock()  # over the end of VMs
        self._watcher = Watcher(self._changed)
        self._epoll = select.epoll()
        self._epoll.register(listener.fd, select.EPOLLIN)
        self._requests = requests
        self._epoll.register(requests.fd, select.EPOLLIN)
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
        """Serve until nobody is left who could call, or we are asked to end."""
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
            with self._objects_lock:
                self._objects.close()
            for pidfd in list(self._gone):
                self._forget(pidfd)
            self._watcher.close()
            self._epoll.close()

    def _turn(self) -> bool:
        for fd, events in self._epoll.poll():
            if fd == self._listener.fd:
                if not events & select.EPOLLIN:
                    return False  # EPOLLHUP: no task has the filter any more
                self._receive()
            elif fd == self._requests.fd:
                if self._requests.hear():
                    return False
            elif fd in self._gone:
                self._forget(fd)
            else:
                with self._objects_lock:
                    self._objects.happened(fd)
        return True

    def _forget(self, pidfd: int) -> None:
        """A process is gone."""
        process = self._processes.pop(self._gone.pop(pidfd))
        self._threads = {
            tid: thread for tid, thread in self._threads.items() if thread.process is not process
        }
        self._epoll.unregister(pidfd)
        self._watcher.remove(process)
        process.close()

    # --- calls --------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            call = self._listener.receive()
        except Gone:
            return
        try:
            if call.nr == MMAP:
                self._unless(call, maps_privately(self._device.mapped, call.tid, call.fifth))
            elif call.nr == MADVISE and call.third == COLLAPSE:
                start, size = call.first, call.second
                self._unless(call, collapses(self._device.mapped, call.tid, start, size))
            elif call.nr == MADVISE:
                self._discard(call)
            elif call.nr in (FORK, CLONE, CLONE3):
                self._fork(call)
            else:
                self._ioctl(call)
        except Gone:
            log.debug("thread %d left before its answer", call.tid)
        except OSError as error:  # of ours: no descriptors left, say
            log.warning("a call of thread %d: %s", call.tid, error)
            with contextlib.suppress(Gone):
                self._listener.answer(call.id, -(error.errno or errno.EIO))

    def _discard(self, call: Notification) -> None:
        """madvise(MADV_DONTNEED): the kernel does it, and we where the memory is ours."""
        process = self._processes.get(thread_group(call.tid)) if self._processes else None
        if process is not None:
            process.slots.discard(call.first, call.second)
        self._listener.let_go(call.id)

    def _fork(self, call: Notification) -> None:
        """fork(2), or clone(2) without CLONE_VM: the child gets copies of what is ours."""
        process = self._processes.get(thread_group(call.tid)) if self._processes else None
        if process is None or not process.slots.replaced or self._shares(call, process):
            self._listener.let_go(call.id)
            return
        with Fork(process.pid, call.tid, call.nr) as fork:
            try:
                fork.seize()
            except OSError as error:  # somebody else traces it
                log.warning(
                    "process %d is forked, and its child shares the memory under its slots, since "
                    "it cannot be stopped: %s", process.pid, error,
                )  # fmt: skip
                self._listener.let_go(call.id)
                return
            self._listener.answer(call.id, -errno.EAGAIN)  # what it gets if we die now
            child = fork.again()
            if child:
                fork.separate(process.slots.inherited(child))

    def _shares(self, call: Notification, process: Process) -> bool:
        """Whether a clone3(2) makes something that has the memory of its maker: CLONE_VM."""
        if call.nr != CLONE3:
            return False
        try:
            return bool(int.from_bytes(process.read(call.first, 8), "little") & CLONE_VM)
        except Efault:
            return True  # the kernel says so

    def _unless(self, call: Notification, refused: bool) -> None:
        """Let the kernel do what is asked, or answer as it does for a guest_memfd: EINVAL."""
        if refused:
            self._listener.answer(call.id, -errno.EINVAL)
        else:
            self._listener.let_go(call.id)

    def _ioctl(self, call: Notification) -> None:
        fd = call.first & 0xFFFF_FFFF
        thread = self._threads.get(call.tid)
        identity = None if thread is None else thread.identify(fd)
        if thread is None or identity is None:  # nothing is open there, or it was another's tid
            thread = self._thread(call.tid)
            identity = thread.identify(fd)
            if not self._listener.valid(call.id):
                return  # the thread died, and what was looked at may be another's
        device: _Device | None = None
        if identity is not None:
            device = self._objects.known.get(identity)
        if device is None and identity in self._device.owners:  # a guest_memfd of a VM
            found = thread.fd(fd)
            device = self._device.private_file(found.fd) if isinstance(found, PrivateFd) else None
        if device is None:
            self._listener.let_go(call.id)
            return
        slots = thread.process.slots
        slots.begin()
        try:
            result = device.ioctl(call.second, call.third, thread)
        finally:
            plan = slots.end()
        if plan and isinstance(result, Value):
            self._remap(call, thread, device, plan)
        else:
            for one in plan:  # the ioctl failed
                os.close(one.fd)
            if slots.done(failed=isinstance(result, Failure)):
                self._watcher.add(thread.process)
            self._deliver(call, result)

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

    def _deliver(self, call: Notification, result: Result) -> None:
        if isinstance(result, Value):
            self._listener.answer(call.id, result.value)
        elif isinstance(result, Failure):
            request = call.second & 0xFFFF_FFFF
            log.debug("ioctl %#x of thread %d: %s", request, call.tid, result.reason)
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
        self, call: Notification, thread: Thread, device: _Device, plan: list[Replacement]
    ) -> None:
        """Put memfds in the place of private memory, then let the ioctl return; or let it fail."""
        with self._lock:
            waiting = frozenset(one.notification.tid for one in self._waiting.values())
            self._remapping = True
        replaced: list[Replacement] = []
        try:
            with Remapper(thread.process.pid, call.tid) as remapper:
                code = self._give_memory(remapper, call, plan, waiting, replaced)
                if code:
                    self._take_slot_back(device, thread, plan, code)
                thread.process.slots.done(replaced, failed=bool(code))
        finally:
            for one in plan:
                if one not in replaced:
                    os.close(one.fd)
            with self._lock:
                self._remapping = False
                held, self._held = self._held, []
            for id, outcome in held:
                self._answer(id, outcome)

    def _give_memory(
        self,
        remapper: Remapper,
        call: Notification,
        plan: list[Replacement],
        waiting: frozenset[int],
        replaced: list[Replacement],
    ) -> int:
        """Replace what is planned and answer the call; return the errno that it fails with, or 0.

        Every thread is stopped then.
        """
        try:
            remapper.seize()
        except OSError as error:  # somebody else traces it
            log.warning("process %d cannot be stopped: %s", remapper.pid, error)
            code = error.errno or errno.EPERM
            self._listener.answer(call.id, -code)
            return code
        numbers: list[int] = []
        code = 0
        try:
            for one in plan:
                numbers.append(self._listener.give(call.id, one.fd, cloexec=True, answer=False))
        except OSError as error:  # no number is left, say
            log.warning("process %d takes no descriptors: %s", remapper.pid, error)
            code = error.errno or errno.EMFILE
        self._listener.answer(call.id, -code)
        remapper.stop()
        try:
            if not code:
                remapper.stop_others(waiting)
                for one, number in zip(plan, numbers, strict=True):
                    remapper.replace(one, number)
                    replaced.append(one)
        except OSError as error:
            log.warning("memory of process %d: %s", remapper.pid, error)
            code = error.errno or errno.EIO
        for number in numbers:
            remapper.close(number)
        if code:
            remapper.answer(code)
        else:
            self._tell_of_changes(remapper, replaced)
        return code

    def _take_slot_back(
        self, device: _Device, thread: Thread, plan: list[Replacement], code: int
    ) -> None:
        """Memory of a new slot cannot be shared: there is no slot."""
        log.warning(
            "process %d gets %s for a slot, since %d pages of it would stay private",
            thread.process.pid, errno.errorcode.get(code, str(code)),
            sum(one.length for one in plan) >> PAGE_SHIFT,
        )  # fmt: skip
        number = thread.said[:4]  # of the slot, in the region that was read
        nothing = number + bytes(USERSPACE_MEMORY_REGION.size - len(number))
        device.ioctl(KVM_SET_USER_MEMORY_REGION, 0, Repeating(thread, nothing))

    def _tell_of_changes(self, remapper: Remapper, replaced: list[Replacement]) -> None:
        """Hear of what the process does to its new mappings."""
        process = self._processes[remapper.pid]
        slots = process.slots
        try:
            if slots.events is None:
                slots.events = remapper.open_events(process.pidfd)
            for one in replaced:
                slots.events.register(one.start, one.length)
        except OSError as error:
            log.info("process %d: changes of its memory are seen late: %s", process.pid, error)
        self._watcher.add(process)

    def _changed(self, process: Process, start: int, end: int) -> None:
        """In the watcher's thread: the process has other memory at [start, end), or none."""
        with self._objects_lock:
            for vm in self._objects.vms(process):
                vm.memory.host_range_changed(start, end - start)

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
