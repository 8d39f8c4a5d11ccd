# SPDX-License-Identifier: GPL-2.0-or-later
"""One call at a time, also where a call outlives the thread that made it: KVM's vcpu->mutex.

A call that comes while another is at work is queued, as its caller would sleep on the mutex, and
answered later. A call that began something keeps the mutex until :meth:`Serial.unlock`.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable

from kvmsim.device.pending import Call
from kvmsim.device.results import Begun, Failure, Result, Value

Work = Callable[[], Result]


class Serial:
    """The mutex. ``lock`` is for the owner's own few fields; nothing is waited for with it."""

    def __init__(self, name: str, on_cancel: Callable[[Call], None]) -> None:
        self.lock = threading.Lock()
        self._name = name
        self._on_cancel = on_cancel
        self._busy = False
        self._idle = threading.Condition(self.lock)
        self._queue: deque[tuple[Call, Work]] = deque()

    def call(self, work: Work) -> Result:
        """Do ``work`` now, or later if the mutex is taken: then it is Begun."""
        with self.lock:
            if self._busy:
                pending = Call(self._on_cancel)
                self._queue.append((pending, work))
                return Begun(pending)
            self._busy = True
        try:
            result = work()
        except BaseException:
            self.unlock()
            raise
        if not isinstance(result, Begun):
            self.unlock()
        return result

    def unlock(self) -> None:
        """Let go of the mutex; who waits for it goes on in a thread of its own."""
        with self.lock:
            if self._queue:
                threading.Thread(target=self._serve, name=f"{self._name} ioctls").start()
                return
            self._busy = False
            self._idle.notify_all()

    def _serve(self) -> None:
        """Do what is queued, in order, up to a call that keeps the mutex."""
        while True:
            with self.lock:
                if not self._queue:
                    self._busy = False
                    self._idle.notify_all()
                    return
                pending, work = self._queue.popleft()
            try:
                result = work()
            except BaseException as error:
                pending.finish(Failure(errno.EIO, f"internal error: {error}"))
                self.unlock()
                raise
            if isinstance(result, Begun):
                pending.follow(result.pending)
                return
            assert isinstance(result, Value | Failure)
            pending.finish(result)

    def remove(self, pending: Call) -> bool:
        """Take a call out of the queue; False if it is not there (any more). ``lock`` held."""
        for queued in self._queue:
            if queued[0] is pending:
                self._queue.remove(queued)
                return True
        return False

    def queued(self) -> list[Call]:
        """The calls that wait for the mutex. ``lock`` held."""
        return [pending for pending, _ in self._queue]

    def wait_idle(self) -> None:
        """Wait until the mutex is free."""
        with self.lock:
            self._idle.wait_for(lambda: not self._busy)
