# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers the ioctls of a program's processes from a simulated device, until the last one ends.

One thread receives calls and makes them; what takes long (KVM_RUN) is answered by whoever ends
it (:mod:`kvmsim.exec.waiting`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import threading

from kvmsim.device.caller import Efault, PrivateFd
from kvmsim.device.gmemfile import GmemFile
from kvmsim.device.results import DeviceObject, Failure, NewFd, Result, Value
from kvmsim.device.system import KvmDevice
from kvmsim.exec.filemappings import collapses, maps_privately
from kvmsim.exec.filter import CLONE, CLONE3, CLONE_VM, COLLAPSE, FORK, MADVISE, MMAP
from kvmsim.exec.forks import Fork
from kvmsim.exec.notification import Gone, Listener, Notification
from kvmsim.exec.objects import Objects
from kvmsim.exec.process import Identity, Process, Thread
from kvmsim.exec.requests import Requests
from kvmsim.exec.sharing import Sharing
from kvmsim.exec.waiting import Waiting, WaitingCalls
from kvmsim.exec.watcher import Watcher
from privfs.notifier.fds import thread_group

log = logging.getLogger(__name__)

_Device = DeviceObject | GmemFile


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
        self._waiting = WaitingCalls(listener)
        self._epoll.register(self._waiting.fd, select.EPOLLIN)
        self._sharing = Sharing(listener, self._watcher, self._waiting)

    def serve(self) -> None:
        """Serve until nobody is left who could call, or we are asked to end."""
        try:
            while self._turn():
                pass
        finally:
            self._waiting.close()
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
            elif fd == self._waiting.fd:
                for one in self._waiting.lacking():
                    self._serve_guest(one)
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
        except (Gone, ProcessLookupError):
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
            self._sharing.for_slot(call, thread, device, plan)
        else:
            for one in plan:  # the ioctl failed
                os.close(one.fd)
            if slots.done(failed=isinstance(result, Failure)):
                self._watcher.add(thread.process)
            self._deliver(call, thread, result)

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

    def _deliver(self, call: Notification, thread: Thread, result: Result) -> None:
        if isinstance(result, Value):
            self._listener.answer(call.id, result.value)
        elif isinstance(result, Failure):
            request = call.second & 0xFFFF_FFFF
            log.debug("ioctl %#x of thread %d: %s", request, call.tid, result.reason)
            self._listener.answer(call.id, -result.errno)
        elif isinstance(result, NewFd):
            self._give(call, result)
        else:
            self._waiting.add(Waiting(call, thread, result.pending, result.signal_mask))

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

    def _serve_guest(self, one: Waiting) -> None:
        """A guest met private memory of its program."""
        vms = self._objects.vms(one.thread.process)
        try:
            self._sharing.for_guest(one, [range for vm in vms for range in vm.memory.host_ranges()])
        except (Gone, ProcessLookupError):
            log.debug("a caller of KVM_RUN left before its answer")
        except OSError as error:
            log.warning("memory under a slot of thread %d: %s", one.call.tid, error)
            with contextlib.suppress(Gone):
                self._listener.answer(one.call.id, -errno.EFAULT)
        finally:
            self._waiting.settled(one)

    def _changed(self, process: Process, start: int, end: int) -> None:
        """In the watcher's thread: the process has other memory at [start, end), or none."""
        with self._objects_lock:
            for vm in self._objects.vms(process):
                vm.memory.host_range_changed(start, end - start)
