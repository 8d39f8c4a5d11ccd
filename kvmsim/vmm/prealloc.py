# SPDX-License-Identifier: GPL-2.0-or-later
"""``prealloc=on``: the private side of guest RAM is allocated before the guest runs.

QEMU's memory-backend-memfd-private of 2022 called fallocate(2) on all of its file; so does this,
through the owner, holes only.  A signal ends a fallocate with EINTR and leaves what it made:
asking again goes on from there.  Memory that runs out gives back what was filled.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

CHUNK_PAGES: Final = 16384
"""64 MiB: what one request asks for, so that progress can be shown and a person can end it."""

EINTR_REPEATS: Final = 1000
"""A chunk that is interrupted this often in a row makes no progress."""


class PrivateSide(Protocol):
    """The part of a private file that backs RAM. Pages of the file, half-open.

    Every method may raise OSError; nothing of a request that failed is left, but after EINTR.
    """

    def holes(self) -> Sequence[tuple[int, int]]:
        """The runs without memory now, in order."""
        ...

    def allocate(self, start: int, end: int) -> None:
        """Allocate what lacks (ALLOCATE; fallocate(2) with KEEP_SIZE)."""
        ...

    def punch(self, start: int, end: int) -> None:
        """Give pages back."""
        ...

    def alone(self) -> bool:
        """Whether nobody else uses the file."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Pages allocated so far, of those that lacked."""

    done: int
    total: int


class PreallocError(OSError):
    """Not all could be allocated. ``done`` of ``total`` pages were; ``left``: they still are."""

    def __init__(self, number: int, reason: str, done: int, total: int, left: bool) -> None:
        super().__init__(number, reason)
        self.done = done
        self.total = total
        self.left = left


def preallocate(
    side: PrivateSide, told: Callable[[Progress], None], *, chunk: int = CHUNK_PAGES
) -> Progress:
    """Allocate every hole, ``chunk`` pages a request; ``told`` hears of each.

    PreallocError otherwise, and what was allocated is given back: unless the file has other users,
    who may have begun to use it.  The same if a person ends it (KeyboardInterrupt, SystemExit).
    """
    filled: list[tuple[int, int]] = []
    done = total = 0
    try:
        holes = side.holes()
        total = sum(end - start for start, end in holes)
        told(Progress(done, total))
        for start, end in holes:
            for first in range(start, end, chunk):
                last = min(first + chunk, end)
                filled.append((first, last))  # also if it fails: EINTR may have left a part
                _allocate(side, first, last)
                done += last - first
                told(Progress(done, total))
    except OSError as error:
        number = error.errno or errno.EIO
        left = not _give_back(side, filled)
        raise PreallocError(number, error.strerror or str(error), done, total, left) from error
    except BaseException:
        _give_back(side, filled)
        raise
    return Progress(done, total)


def _allocate(side: PrivateSide, start: int, end: int) -> None:
    for _ in range(EINTR_REPEATS):
        try:
            side.allocate(start, end)
        except OSError as error:
            if error.errno != errno.EINTR:
                raise
        else:
            return
    raise OSError(errno.EINTR, f"interrupted {EINTR_REPEATS} times in a row")


def _give_back(side: PrivateSide, filled: Sequence[tuple[int, int]]) -> bool:
    """Punch what was filled; whether nothing of it is left."""
    if not filled:
        return True
    try:
        if not side.alone():
            return False
        for start, end in filled:
            side.punch(start, end)
    except OSError:  # no owner any more, or one that does not answer: nothing to be done
        return False
    return True
