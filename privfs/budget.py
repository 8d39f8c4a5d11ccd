# SPDX-License-Identifier: GPL-2.0-or-later
"""How many pages a mount may hold."""

from __future__ import annotations

import errno
from collections.abc import Callable

from privfs.personality import Refused


class Budget:
    """Pages that a mount may hold: ``used`` counts allocated pages and reservations.

    ``room``, if given, is asked how many pages the machine can spare before that many are
    reserved; where it names fewer they are refused.
    """

    __slots__ = ("room", "total", "used")

    def __init__(self, total: int, used: int = 0, room: Callable[[int], int] | None = None) -> None:
        self.total = total
        self.used = used
        self.room = room

    @property
    def available(self) -> int:
        """Pages that could be reserved now."""
        left = max(self.total - self.used, 0)
        return left if self.room is None else min(left, self.room(0))

    def reserve(self, pages: int) -> None:
        """Reserve or raise ``ENOSPC`` and change nothing."""
        if self.used + pages > self.total:
            raise Refused(
                errno.ENOSPC,
                f"{pages} pages wanted, {self.total - self.used} of {self.total} left: "
                "punch holes, or mount with a larger -o size=",
            )
        if pages and self.room is not None and (room := self.room(pages)) < pages:
            raise Refused(
                errno.ENOSPC,
                f"{pages} pages wanted, the machine can spare {room} of the "
                f"{self.total - self.used} that are left: end other programs, or punch holes",
            )
        self.used += pages

    def copy(self) -> Budget:
        """Return an independent copy."""
        return Budget(self.total, self.used, self.room)
