# SPDX-License-Identifier: GPL-2.0-or-later
"""What went wrong on a mount, for who looks later: kills, failed calls, touches of freed memory.

A log may have been thrown away, and events are told to nobody who was not listening.  So the last
of them are kept: when, who, what and why, never a page's content.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any, Final

log = logging.getLogger(__name__)

#: How many are remembered.
KEPT: Final = 64


class Incidents:
    """The last incidents of a mount."""

    def __init__(self) -> None:
        self._last: deque[tuple[float, str]] = deque(maxlen=KEPT)

    def add(self, text: str, level: int = logging.WARNING) -> None:
        """Log one and remember it."""
        self._last.append((time.time(), text))
        log.log(level, "%s", text)

    def view(self) -> list[dict[str, Any]]:
        """Return them, oldest first; ``time`` is in seconds since the epoch."""
        return [{"time": when, "what": text} for when, text in self._last]
