# SPDX-License-Identifier: GPL-2.0-or-later
"""How many pages a mount may hold."""

from __future__ import annotations

import errno

from privfs.personality import Refused


class Budget:
    """Pages that a mount may hold: ``used`` counts allocated pages and reservations."""

    __slots__ = ("total", "used")

    def __init__(self, total: int, used: int = 0) -> None:
        self.total = total
        self.used = used

    def reserve(self, pages: int) -> None:
        """Reserve or raise ``ENOSPC`` and change nothing."""
        if self.used + pages > self.total:
            raise Refused(
                errno.ENOSPC,
                f"{pages} pages wanted, {self.total - self.used} of {self.total} left: "
                "punch holes, or mount with a larger -o size=",
            )
        self.used += pages

    def copy(self) -> Budget:
        """Return an independent copy."""
        return Budget(self.total, self.used)
