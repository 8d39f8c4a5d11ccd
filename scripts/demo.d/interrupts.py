# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals that ask the demonstration to end: an exception, but never between a birth and its entry.

Whoever makes something that must be removed later makes it under :meth:`Signals.held`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN_SECONDS = 0.01


class Interrupted(BaseException):
    """A signal asks us to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Held from the beginning, until :meth:`heed`."""

    def __init__(self) -> None:
        self._held = True
        self._waiting = 0
        for number in _HANDLED:
            signal.signal(number, self._arrive)
        signal.signal(signal.SIGALRM, lambda number, frame: self._arrive(self._lost, frame))
        self._lost = 0
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable

    def _unraisable(self, what: sys.UnraisableHookArgs) -> None:
        """A finalizer or the like had the signal's exception: it comes again, elsewhere."""
        if isinstance(what.exc_value, Interrupted):
            self._lost = what.exc_value.number
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            self._hook(what)

    def _arrive(self, number: int, frame: object) -> None:
        if self._held:
            self._waiting = number
        else:
            raise Interrupted(number)

    def heed(self) -> None:
        """Raise Interrupted from now on, and now if a signal has come already."""
        self._held = False
        if self._waiting:
            raise Interrupted(self._waiting)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let signals wait until the end of the block."""
        self._held = True
        try:
            yield
        finally:
            self.heed()

    def ignore(self) -> None:
        """Hear no more signals."""
        for number in (*_HANDLED, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
