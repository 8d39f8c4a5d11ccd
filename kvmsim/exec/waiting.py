# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls that are answered later, by whoever ends them: KVM_RUN above all.

A thread of its own looks for signals of those that wait, since their callers can be interrupted
by nobody but us (SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from kvmsim.device.results import Failure, Pending, Value
from kvmsim.exec.notification import Gone, Listener, Notification
from kvmsim.exec.process import Thread, pending_signals
from kvmsim.uapi import KVM_RUN

log = logging.getLogger(__name__)

_SIGNAL_SECONDS: Final = 0.002


@dataclass(frozen=True, slots=True)
class Waiting:
    """A call that waits; ``mask`` takes the place of the thread's own if it is not None."""

    call: Notification
    thread: Thread
    pending: Pending
    mask: int | None


class WaitingCalls:
    """All of them. ``fd`` is readable when there are some for :meth:`lacking`."""

    def __init__(self, listener: Listener) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._listener = listener
        self._lock = threading.Lock()  # over the three below
        self._waiting: dict[int, Waiting] = {}
        self._lacking: list[Waiting] = []
        self._held: list[tuple[int, int]] | None = None  #: answers; None: they are given at once
        self._some = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch_signals, name="signals")
        self._thread.start()

    def add(self, one: Waiting) -> None:
        """Answer a call when its outcome is known."""
        with self._lock:
            self._waiting[one.call.id] = one
        self._some.set()
        one.pending.on_done(partial(self._done, one.call.id))

    def lacking(self) -> list[Waiting]:
        """Take those whose guest met memory that the program must be stopped for.

        They wait until somebody else answers them.
        """
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        with self._lock:
            return list(self._lacking)

    def settled(self, one: Waiting) -> None:
        """One of those was answered."""
        with self._lock:
            self._lacking.remove(one)

    @contextlib.contextmanager
    def held(self) -> Iterator[frozenset[int]]:
        """Keep all answers until the end of the context; the threads that wait."""
        with self._lock:
            self._held = []
            tids = {one.call.tid for one in (*self._waiting.values(), *self._lacking)}
        try:
            yield frozenset(tids)
        finally:
            with self._lock:
                held, self._held = self._held, None
            for id, value in held:
                self._answer(id, value)

    def close(self) -> None:
        """End all of them."""
        self._ended.set()
        self._some.set()
        self._thread.join()
        with self._lock:
            waiting = list(self._waiting.values())
        for one in waiting:
            one.pending.cancel()
            one.pending.wait()
        os.close(self.fd)

    def _done(self, id: int, outcome: Value | Failure) -> None:
        value = outcome.value if isinstance(outcome, Value) else -outcome.errno
        with self._lock:
            one = self._waiting.pop(id)
            if value == -errno.EFAULT and _lacks(one):
                self._lacking.append(one)
                os.eventfd_write(self.fd, 1)
                return
            if self._held is not None:
                self._held.append((id, value))
                return
        self._answer(id, value)

    def _answer(self, id: int, value: int) -> None:
        try:
            self._listener.answer(id, value)
        except Gone:
            log.debug("a caller of KVM_RUN left before its answer")

    def _watch_signals(self) -> None:
        while not self._ended.is_set():
            with self._lock:
                waiting = list(self._waiting.values())
            if not waiting:
                self._some.wait()
                self._some.clear()
                continue
            for one in waiting:
                if pending_signals(one.call.tid, one.mask) or not self._listener.valid(one.call.id):
                    one.pending.cancel()
            self._ended.wait(_SIGNAL_SECONDS)


def _lacks(one: Waiting) -> bool:
    return one.call.second & 0xFFFF_FFFF == KVM_RUN and one.thread.process.slots.wanting
