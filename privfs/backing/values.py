# SPDX-License-Identifier: GPL-2.0-or-later
"""What the keeper of extents hands out: an extent, a finding, counts, an error.

Units: file pages of 4096 bytes, ranges half-open ``[start, end)``.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass


class BackingError(Exception):
    """Memory could not be had, or an extent that does not exist was named.

    errno is ENOSPC when memory or descriptors ran out, ENOENT for an unknown extent, otherwise
    what the kernel said. Of an allocation [start, end), the pages [start, completed) are
    allocated; nothing beyond them was changed.
    """

    def __init__(
        self, code: int, operation: str, ino: int, pages: tuple[int, int], completed: int, why: str
    ) -> None:
        super().__init__(
            f"{operation}: file {ino}, pages [{pages[0]:#x}, {pages[1]:#x}): "
            f"{errno.errorcode.get(code, code)}: {why}"
        )
        self.errno = code
        self.operation = operation
        self.ino = ino
        self.start, self.end = pages
        self.completed = completed


@dataclass(frozen=True, slots=True)
class Extent:
    """One extent that is alive: file pages [start, end) of a file, in the memfd *fd*.

    The page ``start`` is at offset 0 of the memfd. The generation is never used twice in the life
    of a Backing, so it tells an extent from its successor in the same place.
    """

    ino: int
    index: int
    start: int
    end: int
    fd: int
    generation: int


@dataclass(frozen=True, slots=True)
class Finding:
    """What an audit found: ``reallocated`` or ``held``, and where (file pages)."""

    name: str
    ino: int
    start: int
    end: int
    detail: str


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of a Backing: files and extents alive, all extents ever, limit, bytes held."""

    files: int
    extents: int
    extents_created: int
    extent_limit: int
    bytes_held: int
