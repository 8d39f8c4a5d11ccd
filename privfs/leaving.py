# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals that end the program by unwinding it, also from where Python ignores exceptions.

A finalizer, a weak reference's callback or a fork hook that is at work when the signal comes loses
the exception to sys.unraisablehook(). The signal is sent again then, a moment later.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Final

BY_SIGNAL: Final = 128  #: + n is the status of a program that signal n ended, as shells say it
_AGAIN_SECONDS: Final = 0.01

_lost: list[int] = []


class Leave(SystemExit):
    """Signal ``number`` asks the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(BY_SIGNAL + number)
        self.number = number


def unwind_on(*numbers: signal.Signals) -> Callable[[], None]:
    """Raise :class:`Leave` in the main thread, which calls this, when one of these signals comes.

    One that is ignored already stays so: nohup(1). SIGALRM is taken for it. What is returned puts
    everything back as it was.
    """
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _leave) for number in heard}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _send_again)
    hook = sys.unraisablehook

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        match what.exc_value:
            case Leave(number=number):
                _lost.append(number)
            case KeyboardInterrupt():
                _lost.append(signal.SIGINT)
            case _:
                hook(what)
                return
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)

    def put_back() -> None:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)

    sys.unraisablehook = unraisable
    return put_back


def _leave(number: int, frame: object) -> None:
    raise Leave(number)


def _send_again(number: int, frame: object) -> None:
    """Who handles the signal by now gets it."""
    if _lost:
        signal.raise_signal(_lost.pop())
