# SPDX-License-Identifier: GPL-2.0-or-later
"""The inodes of a mount: their attributes, and the counts that decide how long they live.

An inode lives as long as it has a name, is known to the kernel (its lookup count, which FORGET
takes away) or is open. Whatever can end its life returns the inode numbers that are dead now, so
that their memory can be destroyed. Inode numbers are never used twice.
"""

from __future__ import annotations

import errno

from privfs.inode import Attributes, Directory, Inode, NamespaceError

MAX_INODES = 1 << 20
MODE_BITS = 0o7777


class Inodes:
    """A counted table of inodes; more than *limit* alive at a time is ENOSPC."""

    def __init__(self, limit: int = MAX_INODES) -> None:
        self._limit = limit
        self._last_ino = 0
        self._inodes: dict[int, Inode] = {}

    @property
    def inode_count(self) -> int:
        """How many inodes are alive."""
        return len(self._inodes)

    @property
    def inode_limit(self) -> int:
        """How many inodes may be alive."""
        return self._limit

    # ---- attributes

    def attributes(self, ino: int) -> Attributes:
        """Return what stat(2) says. Errors: ESTALE for an inode that is not alive."""
        return self._inode("getattr", ino).attributes()

    def is_reserved(self, ino: int) -> bool:
        """Whether an inode belongs to the mount itself. Errors: ESTALE."""
        return self._inode("getattr", ino).reserved

    def setattr(
        self,
        ino: int,
        now_ns: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
    ) -> Attributes:
        """Change what is given, and ctime with it. The kernel has checked that the caller may."""
        inode = self._inode("setattr", ino)
        if mode is not None:
            inode.mode = mode & MODE_BITS
        if uid is not None:
            inode.uid = uid
        if gid is not None:
            inode.gid = gid
        if atime_ns is not None:
            inode.atime_ns = atime_ns
        if mtime_ns is not None:
            inode.mtime_ns = mtime_ns
        inode.ctime_ns = now_ns
        return inode.attributes()

    def modified(self, ino: int, now_ns: int) -> Attributes:
        """Note that a file's size or contents have changed: mtime and ctime."""
        return self.setattr(ino, now_ns, mtime_ns=now_ns)

    # ---- counts

    def remember(self, ino: int) -> Attributes:
        """Count one lookup of an entry that readdir answered with (READDIRPLUS)."""
        return self._known(self._inode("readdir", ino))

    def forget(self, ino: int, count: int) -> tuple[int, ...]:
        """Take *count* lookups away; return who is dead now. Errors: EINVAL if there are fewer."""
        inode = self._inode("forget", ino)
        if not 0 <= count <= inode.lookups:
            why = f"{count} lookups to forget, {inode.lookups} are counted"
            raise NamespaceError(errno.EINVAL, "forget", ino, why)
        inode.lookups -= count
        return self._bury(inode)

    def open(self, ino: int) -> Attributes:
        """Count one open handle."""
        inode = self._inode("open", ino)
        inode.opens += 1
        return inode.attributes()

    def release(self, ino: int) -> tuple[int, ...]:
        """Take one open handle away; return who is dead now. Errors: EBADF if none is open."""
        inode = self._inode("release", ino)
        if inode.opens == 0:
            raise NamespaceError(errno.EBADF, "release", ino, "it is not open")
        inode.opens -= 1
        return self._bury(inode)

    def open_count(self, ino: int) -> int:
        """Return how many handles are open."""
        return self._inode("getattr", ino).opens

    # ---- the table

    def _inode(self, operation: str, ino: int) -> Inode:
        """Return an inode that is alive. Errors: ESTALE."""
        inode = self._inodes.get(ino)
        if inode is None:
            raise NamespaceError(errno.ESTALE, operation, ino, "no such inode is alive")
        return inode

    def _directory(self, operation: str, ino: int) -> Directory:
        """Return a directory that is alive. Errors: ESTALE, ENOTDIR."""
        inode = self._inode(operation, ino)
        if not isinstance(inode, Directory):
            raise NamespaceError(errno.ENOTDIR, operation, ino, "it is no directory")
        return inode

    def _next_ino(self, operation: str, name: bytes) -> int:
        """Return a number for a new inode. Errors: ENOSPC at the limit."""
        if len(self._inodes) >= self._limit:
            why = f"all {self._limit} inodes are in use; remove files"
            raise NamespaceError(errno.ENOSPC, operation, name, why)
        return self._last_ino + 1

    def _add(self, inode: Inode) -> None:
        """Take a new inode into the table."""
        self._inodes[inode.ino] = inode
        self._last_ino = inode.ino

    def _known(self, inode: Inode) -> Attributes:
        """Count one lookup: the kernel is about to learn of this inode."""
        inode.lookups += 1
        return inode.attributes()

    def _bury(self, inode: Inode) -> tuple[int, ...]:
        """Drop an inode that nothing can reach; return its number if so."""
        if not inode.is_dead:
            return ()
        del self._inodes[inode.ino]
        return (inode.ino,)
