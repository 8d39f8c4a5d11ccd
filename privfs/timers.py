# SPDX-License-Identifier: GPL-2.0-or-later
"""When the rungs of the ladder are due (trio).

What counts is the time in which this process ran.  While it was stopped, frozen or starved it could
not hear its users, and what stopped it may have stopped them too; so such time is nobody's.  The
clock is CLOCK_MONOTONIC, which no setting of the time of day moves and which stands still in
suspend (clock_gettime(2)).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from itertools import count
from typing import Final

import trio

from privfs.notifier.effects import Rung
from privfs.operation import OpId

#: Seconds between two looks at the clock, while anything is awaited; and how late one may be.
BEAT: Final = 0.25
SLACK: Final = 0.1


class RunningTime:
    """Seconds in which this process ran; right from one :meth:`read` to the next within BEAT."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._lost = 0.0

    def read(self) -> float:
        """Return the time; what passed beyond BEAT and SLACK since the last look is left out."""
        now = self._clock()
        self._lost += max(now - self._last - BEAT - SLACK, 0.0)
        self._last = now
        return now - self._lost


class Timers:
    """Rungs that are due some time.

    ``delay`` gives the seconds until a rung, ``waits`` tells whether an operation still waits for
    anybody: what waits for nobody is forgotten early.
    """

    def __init__(
        self,
        delay: Callable[[Rung], float],
        waits: Callable[[int, OpId], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._delay = delay
        self._waits = waits
        self._time = RunningTime(clock)
        self._heap: list[tuple[float, int, int, OpId, Rung]] = []
        self._count = count()
        self._wake = trio.Event()

    def arm(self, ino: int, op: OpId, rung: Rung) -> None:
        """Let ``rung`` be due in its time."""
        due = self._time.read() + self._delay(rung)
        number = next(self._count)
        heapq.heappush(self._heap, (due, number, ino, op, rung))
        if self._heap[0][1] == number:
            self._wake.set()

    async def next(self) -> tuple[int, OpId, Rung]:
        """Wait for the next rung that is due, or whose operation waits for nobody any more."""
        while True:
            now = self._time.read()
            if self._heap:
                due, _, ino, op, rung = self._heap[0]
                if due <= now or not self._waits(ino, op):
                    heapq.heappop(self._heap)
                    return ino, op, rung
            self._wake = trio.Event()
            pause = min(self._heap[0][0] - now, BEAT) if self._heap else float("inf")
            with trio.move_on_after(pause):
                await self._wake.wait()
