# SPDX-License-Identifier: GPL-2.0-or-later
"""Open directories: a scan ends, however fast names arrive while it reads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from privfs.inode import DirectoryEntry
from privfs.namespace import Namespace

_BATCH = 64


class Scans:
    """Handles of open directories.  A rewind to offset 0 sees what has come since."""

    def __init__(self, names: Namespace) -> None:
        self._names = names
        self._handles = count(1)
        self._open: dict[int, tuple[int, int]] = {}

    def open(self, ino: int) -> int:
        """Open a directory; return its handle."""
        self._names.open(ino)
        handle = next(self._handles)
        self._open[handle] = (ino, self._names.last_cookie(ino))
        return handle

    def read(self, handle: int, offset: int) -> Iterator[DirectoryEntry]:
        """Yield the entries behind a cookie."""
        ino, last = self._open[handle]
        if offset == 0:
            last = self._names.last_cookie(ino)
            self._open[handle] = (ino, last)
        while batch := self._names.readdir(ino, offset, _BATCH):
            for entry in batch:
                if entry.cookie > last:
                    return
                yield entry
            offset = batch[-1].cookie

    def close(self, handle: int) -> tuple[int, ...]:
        """Close a handle; return the inodes that are dead now."""
        ino, _ = self._open.pop(handle)
        return self._names.release(ino)
