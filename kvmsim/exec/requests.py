# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals for us are the program's: passed on, while we serve on until it has ended in order.

They are heard between two calls, never in the middle of one: a handler that raises
(:mod:`privfs.leaving`) in a call that had just set a vCPU going would leave it running, and nobody
who knows of it. Nor does a handler run while the main thread waits, if the signal came as it was
about to: so they wake it by a descriptor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from subprocess import Popen
from typing import Final, Self

log = logging.getLogger(__name__)

PASSED_ON: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
#: What a terminal sends to the whole group, of which the program is.
OF_THE_GROUP: Final = (signal.SIGINT, signal.SIGQUIT)
#: How long a program that was asked to end may take.
PATIENCE_SECONDS: Final = 10.0
#: timeout(1) signals its child, and then the group of both: not a second wish.
ONE_WISH_SECONDS: Final = 1.0


class Requests:
    """Takes the signals while its context lasts; for the main thread.

    ``fd`` is readable when there may be something to :meth:`hear`. What comes before the program
    is told of (:meth:`pass_to`) waits for it; what comes when all is over is dropped.
    """

    def __init__(
        self, patience: float = PATIENCE_SECONDS, one_wish: float = ONE_WISH_SECONDS
    ) -> None:
        self._patience = patience
        self._one_wish = one_wish
        self._program: Popen[bytes] | None = None
        self._asked: float | None = None  #: when we were first asked to end, monotonic
        self._timer: threading.Timer | None = None
        self.over = False  #: whether to end now: the program does not

    def __enter__(self) -> Self:
        self.fd, self._woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # One that is ignored stays so, here and for the program: nohup(1).
        heard = [one for one in PASSED_ON if signal.getsignal(one) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, _hold) for number in heard}
        self._before_fd = signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        signal.set_wakeup_fd(self._before_fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.fd)
        os.close(self._woken)

    def pass_to(self, program: Popen[bytes]) -> None:
        """Whose they are; from now on those of the terminal do not end us either."""
        self._program = program
        self._before |= {number: signal.signal(number, signal.SIG_IGN) for number in OF_THE_GROUP}

    def hear(self) -> bool:
        """Pass on what came; whether to end now (``over``)."""
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self.fd, 4096):
                if number in PASSED_ON:
                    self._pass_on(signal.Signals(number))
        return self.over

    def _pass_on(self, number: signal.Signals) -> None:
        program = self._program
        assert program is not None
        there = program.poll() is None
        if there and (number is not signal.SIGTERM or self._asked is None):
            program.send_signal(number)
        if number is signal.SIGTERM or (number is signal.SIGHUP and not there):
            self._ask(number)  # what SIGHUP means is the program's to say

    def _ask(self, number: signal.Signals) -> None:
        """We are asked to end: now, if not for the first time."""
        now = time.monotonic()
        if self._asked is None:
            log.info("asked to end by %s", number.name)
            self._asked = now
            self._timer = threading.Timer(self._patience, self._time_is_up)
            self._timer.start()
        elif now >= self._asked + self._one_wish and not self.over:
            log.warning("asked to end again: the program has not, it is killed")
            self.over = True

    def _time_is_up(self) -> None:
        """In the timer's thread."""
        log.warning("the program has not ended in %g s: it is killed", self._patience)
        self.over = True
        with contextlib.suppress(BlockingIOError):  # full: it is readable
            os.write(self._woken, b"\0")


def _hold(number: int, frame: object) -> None:
    """The descriptor tells."""
