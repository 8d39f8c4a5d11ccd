# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals that ask us to end are heard between two calls, never in the middle of one.

Their handler raises (:mod:`privfs.leaving`). In a call that had just set a vCPU going, nobody
would know of it, and so nobody could stop it. Nor does a handler run while the main thread waits,
if the signal came as it was about to: so they wake it by a descriptor.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Final, Self

HELD: Final = (signal.SIGTERM, signal.SIGHUP)


class Requests:
    """Holds the signals back while its context lasts; then they come. For the main thread.

    ``fd`` is readable when there may be something to :meth:`hear`.
    """

    def __enter__(self) -> Self:
        self.fd, self._woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._held: set[int] = set()
        self._before = {number: signal.signal(number, _hold) for number in HELD}
        self._before_fd = signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before_fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.hear()
        os.close(self.fd)
        os.close(self._woken)
        for held in self._held:
            signal.raise_signal(held)

    def hear(self) -> bool:
        """Whether we are asked to end."""
        with contextlib.suppress(BlockingIOError):
            self._held.update(number for number in os.read(self.fd, 4096) if number in HELD)
        return bool(self._held)


def _hold(number: int, frame: object) -> None:
    """The descriptor tells."""
