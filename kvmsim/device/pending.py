# SPDX-License-Identifier: GPL-2.0-or-later
"""A call that is not over: its outcome, told once to whoever waits."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvmsim.device.results import Failure, Pending, Value

Outcome = Value | Failure


class Call:
    """The :class:`~kvmsim.device.results.Pending` of this device.

    ``on_cancel`` is called, at most until the outcome is known, by :meth:`cancel`.
    """

    def __init__(self, on_cancel: Callable[[Call], None]) -> None:
        self._on_cancel = on_cancel
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._outcome: Outcome | None = None
        self._callbacks: list[Callable[[Outcome], None]] = []
        self._cancelled = False
        self._followed: Pending | None = None

    def on_done(self, callback: Callable[[Outcome], None]) -> None:
        """Have ``callback`` called once with the outcome, by any thread, or at once."""
        with self._lock:
            if self._outcome is None:
                self._callbacks.append(callback)
                return
        callback(self._outcome)

    def cancel(self) -> None:
        """End soon."""
        with self._lock:
            if self._outcome is not None:
                return
            self._cancelled = True
            followed = self._followed
        if followed is None:
            self._on_cancel(self)
        else:
            followed.cancel()

    def follow(self, other: Pending) -> None:
        """End as ``other`` does, and when this is cancelled cancel it."""
        with self._lock:
            self._followed = other
            cancelled = self._cancelled
        if cancelled:
            other.cancel()
        other.on_done(self.finish)

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait for the outcome; None if there is none after ``timeout`` seconds."""
        with self._lock:
            self._changed.wait_for(lambda: self._outcome is not None, timeout)
            return self._outcome

    def finish(self, outcome: Outcome) -> None:
        """The outcome; once."""
        with self._lock:
            assert self._outcome is None
            self._outcome = outcome
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            callback(outcome)
