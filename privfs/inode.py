# SPDX-License-Identifier: GPL-2.0-or-later
"""The values of the tree of names: kinds, inodes, directory entries, and the one error."""

from __future__ import annotations

import errno
import stat
from bisect import bisect_left
from dataclasses import dataclass, field
from enum import Enum

FIRST_COOKIE = 3  # 1 and 2 belong to "." and ".."
_DIRENT_SIZE = 20  # what tmpfs charges a directory for an entry: BOGO_DIRENT_SIZE, mm/shmem.c


class Kind(Enum):
    """What an inode is; the value is its S_IFMT part of st_mode, inode(7)."""

    FILE = stat.S_IFREG
    DIRECTORY = stat.S_IFDIR
    SYMLINK = stat.S_IFLNK
    SOCKET = stat.S_IFSOCK
    FIFO = stat.S_IFIFO


class NamespaceError(Exception):
    """An operation on names was refused; nothing has changed.

    subject is the name (bytes) or the inode number that the refusal is about.
    """

    def __init__(self, code: int, operation: str, subject: bytes | int, reason: str) -> None:
        what = f"inode {subject}" if isinstance(subject, int) else repr(subject)
        super().__init__(f"{operation}: {what}: {errno.errorcode.get(code, code)}: {reason}")
        self.errno = code
        self.operation = operation
        self.subject = subject
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) says of an inode, but for the size and blocks of a file: its memory has those.

    mode holds the permission bits (0o7777) only; st_mode adds the kind. Times in nanoseconds.
    size is the length of a symlink's target, or what tmpfs would call the size of a directory.
    """

    ino: int
    kind: Kind
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int

    @property
    def st_mode(self) -> int:
        """Kind and permission bits together."""
        return self.kind.value | self.mode


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One line of a directory: a scan goes on after it with its cookie."""

    name: bytes
    ino: int
    kind: Kind
    cookie: int


class Names:
    """The names in one directory, each with an inode number and a cookie.

    Cookies ascend in the order of arrival and are never used twice, so a scan that goes on after
    a cookie meets every name that was there all the time exactly once, whatever else comes, goes
    or is renamed meanwhile (readdir(3) promises no less).
    """

    __slots__ = ("_cookies", "_entries", "_next", "_order")

    def __init__(self) -> None:
        self._entries: dict[bytes, int] = {}  # name -> inode number
        self._cookies: dict[bytes, int] = {}
        self._order: list[tuple[int, bytes]] = []  # (cookie, name), ascending
        self._next = FIRST_COOKIE

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: bytes) -> int | None:
        """Return the inode number that *name* stands for, if any."""
        return self._entries.get(name)

    def add(self, name: bytes, ino: int) -> None:
        """Add a name that is not there, at the end of the order."""
        self._entries[name] = ino
        self._cookies[name] = self._next
        self._order.append((self._next, name))
        self._next += 1

    def remove(self, name: bytes) -> None:
        """Take away a name that is there."""
        del self._entries[name]
        entry = (self._cookies.pop(name), name)
        del self._order[bisect_left(self._order, entry)]

    def replace(self, name: bytes, ino: int) -> None:
        """Let a name that is there stand for another inode, in the same place of the order."""
        self._entries[name] = ino

    def rename(self, old: bytes, new: bytes) -> None:
        """Rename an entry within the directory; it keeps its place, so no scan goes on for ever."""
        cookie = self._cookies.pop(old)
        self._order[bisect_left(self._order, (cookie, old))] = (cookie, new)
        self._cookies[new] = cookie
        self._entries[new] = self._entries.pop(old)

    @property
    def last_cookie(self) -> int:
        """The cookie of the newest entry there ever was, or 2."""
        return self._next - 1

    def after(self, cookie: int, count: int) -> list[tuple[int, bytes, int]]:
        """Return up to *count* (cookie, name, ino) behind a cookie, in order."""
        position = bisect_left(self._order, (cookie + 1, b""))
        found = self._order[position : position + count]
        return [(place, name, self._entries[name]) for place, name in found]


@dataclass(slots=True)
class Inode:
    """One inode of the tree, with the two counts that keep it alive when it has no name.

    lookups counts what the kernel knows it by (until FORGET), opens its open handles. A reserved
    inode is the mount's own: ordinary users can read it but neither move nor remove it.
    """

    ino: int
    kind: Kind
    mode: int
    uid: int
    gid: int
    nlink: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    reserved: bool = False
    target: bytes = b""  # symlinks only
    lookups: int = 0
    opens: int = 0

    @property
    def size(self) -> int:
        """As tmpfs has it; 0 for a file, whose size its memory knows."""
        return len(self.target)

    @property
    def is_dead(self) -> bool:
        """Whether nothing can reach it any more."""
        return self.nlink == 0 and self.lookups == 0 and self.opens == 0

    def attributes(self) -> Attributes:
        """Return what stat(2) says of it."""
        return Attributes(
            self.ino,
            self.kind,
            self.mode,
            self.uid,
            self.gid,
            self.nlink,
            self.size,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
        )


@dataclass(slots=True)
class Directory(Inode):
    """An inode that holds names; nlink is 2 and one for each directory in it, 0 once removed."""

    parent: int = 0
    names: Names = field(default_factory=Names)

    @property
    def size(self) -> int:
        """What tmpfs would call its size."""
        return _DIRENT_SIZE * (2 + len(self.names))
