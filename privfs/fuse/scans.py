# SPDX-License-Identifier: GPL-2.0-or-later
"""Open directories: a scan ends, however fast names arrive while it reads."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import count

from privfs.inode import DirectoryEntry, NamespaceError
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
        last = self._names.last_cookie(ino)  # refuses what is no directory
        self._names.open(ino)
        handle = next(self._handles)
        self._open[handle] = (ino, last)
        return handle

    def read(self, handle: int, offset: int) -> Iterator[DirectoryEntry]:
        """Yield the entries behind a cookie. Errors: EBADF."""
        ino, last = self._scan("readdir", handle)
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
        """Close a handle; return the inodes that are dead now. Errors: EBADF."""
        ino, _ = self._scan("releasedir", handle)
        del self._open[handle]
        return self._names.release(ino)

    def _scan(self, operation: str, handle: int) -> tuple[int, int]:
        try:
            return self._open[handle]
        except KeyError:
            why = "no such handle of a directory is open"
            raise NamespaceError(errno.EBADF, operation, handle, why) from None
