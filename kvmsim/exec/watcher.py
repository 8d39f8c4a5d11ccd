# SPDX-License-Identifier: GPL-2.0-or-later
"""What the program does to memory under its slots reaches its guests: KVM's mmu_notifier.

A thread of its own: whoever unmaps memory waits for it (:mod:`kvmsim.exec.mapevents`), also while
others are busy. What has no events (mprotect(2), memory that the program itself had shared, old
kernels) is found out within a second.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections.abc import Callable
from typing import Final

from kvmsim.exec.mapevents import MapEvents
from kvmsim.exec.process import Process

log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 1.0


class Watcher:
    """Watches processes; ``changed(process, start, end)`` is called for bytes [start, end).

    When that returns no guest may reach what was mapped there.
    """

    def __init__(self, changed: Callable[[Process, int, int], None]) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._processes: list[Process] = []
        self._events: set[MapEvents] = set()
        self._epoll = select.epoll()
        self._wake, self._woken = socket.socketpair()
        self._epoll.register(self._woken, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="mappings")
        self._thread.start()

    def add(self, process: Process) -> None:
        """Watch a process, again when it has events."""
        with self._lock:
            events = process.slots.events
            if process not in self._processes:
                self._processes.append(process)
            if events is not None and events not in self._events:
                self._events.add(events)
                self._epoll.register(events.fd, select.EPOLLIN)

    def remove(self, process: Process) -> None:
        """A process is gone."""
        with self._lock:
            if process in self._processes:
                self._processes.remove(process)
                if process.slots.events in self._events:
                    self._events.remove(process.slots.events)
                    self._epoll.unregister(process.slots.events.fd)

    def close(self) -> None:
        """End; nobody is watched any more."""
        self._wake.send(b"E")
        self._thread.join()
        self._epoll.close()
        self._wake.close()
        self._woken.close()

    def _run(self) -> None:
        while True:
            ready = {fd for fd, _ in self._epoll.poll(_LOOK_SECONDS)}
            if self._woken.fileno() in ready:
                return
            with self._lock:
                for process in self._processes:
                    events = process.slots.events
                    if not ready:
                        self._look(process)
                    elif events is not None and events.fd in ready:
                        self._look(process)
                        events.let_go()

    def _look(self, process: Process) -> None:
        for start, end in process.slots.changed():
            log.debug("process %d has changed [%#x, %#x) under a slot", process.pid, start, end)
            self._changed(process, start, end)
