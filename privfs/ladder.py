# SPDX-License-Identifier: GPL-2.0-or-later
"""How long users may take to give memory up, and how long they took."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from privfs.notifier.effects import Rung


@dataclass(frozen=True, slots=True)
class Ladder:
    """Seconds until a user that does not acknowledge is logged, killed, given up.

    ``ack`` 0 means never: callers wait for ever, as they do in the kernel.
    """

    log: float = 0.1
    ack: float = 2.0
    kill: float = 2.0

    def delay(self, rung: Rung) -> float:
        """Return the seconds from the rung before (or from the beginning) to ``rung``."""
        if rung is Rung.GIVE_UP:
            return self.kill
        log = min(self.log, self.ack / 2) if self.ack else self.log
        if rung is Rung.LOG:
            return log
        return max(self.ack - log, 0.0)  # never 0: it is the patience with SIGSTOP too


@dataclass(slots=True)
class Latencies:
    """Durations of the last invalidations, in seconds."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    total: int = 0

    def add(self, seconds: float) -> None:
        """Record one."""
        self.recent.append(seconds)
        self.total += 1

    def percentile(self, share: float) -> float:
        """Return the duration that ``share`` (0–1) of the recent ones did not exceed."""
        ordered = sorted(self.recent)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
