# SPDX-License-Identifier: GPL-2.0-or-later
"""Text files in ``.privfs/`` whose contents are made when they are opened, as in /proc."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from privfs.fuse.lowlevel import pyfuse3
from privfs.namespace import Namespace


class LiveFiles:
    """The live files of a mount; their handles lie above all inode numbers."""

    _FIRST_HANDLE = 1 << 48

    def __init__(self) -> None:
        self._makers: dict[int, Callable[[], str]] = {}
        self._open: dict[int, tuple[int, bytes]] = {}
        self._handles = count(self._FIRST_HANDLE)

    def add(self, names: Namespace, name: bytes, maker: Callable[[], str], now_ns: int) -> None:
        """Make a live file in ``.privfs``; ``maker`` returns its text at each open."""
        root = names.attributes(names.reserved_ino)
        made = names.create(
            names.reserved_ino, name, 0o444, root.uid, root.gid, now_ns, trusted=True
        )
        names.forget(made.ino, 1)
        self._makers[made.ino] = maker

    def holds(self, ino: int) -> bool:
        """Whether an inode is a live file."""
        return ino in self._makers

    def open(self, ino: int) -> pyfuse3.FileInfo:
        """Make the text and return what answers OPEN."""
        handle = next(self._handles)
        self._open[handle] = (ino, self._makers[ino]().encode())
        return pyfuse3.FileInfo(fh=handle, direct_io=True, keep_cache=False)

    def read(self, handle: int, offset: int, size: int) -> bytes | None:
        """Return part of a live file, None for a handle that is no live file's."""
        opened = self._open.get(handle)
        return opened[1][offset : offset + size] if opened else None

    def release(self, handle: int) -> int:
        """Close a handle, live or not, and return its inode number."""
        opened = self._open.pop(handle, None)
        return opened[0] if opened else handle
