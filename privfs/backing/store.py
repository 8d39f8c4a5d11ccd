# SPDX-License-Identifier: GPL-2.0-or-later
"""What a store of memory must be able to do, whatever kind of pages it hands out.

A store makes the memfds of extents and performs on one of them what the extents' keeper asks for;
it remembers nothing about them.  Every store can count to the page what a living memfd holds, and
hands no memory to another owner through a memfd that somebody may have kept.  What becomes of
memory that was given up differs: :class:`Promise` says it, and where a promise is not made the
mount says so wherever it shows figures, instead of showing some that nobody can know.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from privfs.extents import GROWING, Layout

_FALLOC_FL_KEEP_SIZE: Final = 1  # linux/falloc.h
_FALLOC_FL_PUNCH_HOLE: Final = 2
_MFD_NOEXEC_SEAL: Final = 8  # linux/memfd.h, Linux 6.3; vm.memfd_noexec=2 refuses one without it
_SEALS: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_BLOCK: Final = 512  # the unit of st_blocks, stat(2)

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int


class Promise(enum.Enum):
    """What a store may promise of memory that was given up; the value says what is so without."""

    RECLAIM = "memory that was given up is free when the last user has let go of it, not before"
    AUDIT = "memory that was given up cannot be audited: nobody sees who still holds some"


class Store(Protocol):
    """One kind of memory.  All offsets and lengths are bytes, multiples of ``page_size``."""

    name: str  #: as ``-o backing=`` writes it
    page_size: int  #: bytes that come and go together
    layout: Layout  #: where extents lie; ``whole`` where a memfd cannot be punched
    promises: frozenset[Promise]
    read_only: bool  #: whether a descriptor can be given out that does not allow stores
    pooled: bool  #: whether the memory was set aside, so that the machine needs not be asked
    prompt: int  #: bytes that take no more than about 1 ms to come or go
    undoes: int  #: bytes: an allocation that fails within such a piece leaves nothing of it
    fixed: str  #: why what a memfd holds cannot be moved into another, empty if it can
    locates: bool  #: whether :meth:`touched` knows; where not, an audit can only count
    advice: Mapping[int, str]  #: errno of an allocation that ran out → what to do

    def create(self, name: str, size: int) -> int:
        """Return a new memfd of ``size`` bytes, all holes, that nobody can grow.  OSError."""

    def allocate(self, fd: int, offset: int, length: int) -> None:
        """Give a range memory; what has some keeps its contents.  OSError."""

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Give the memory of a range back; every mapping loses it.  OSError.

        Never asked for where extents go whole.
        """

    def copy(self, source: int, target: int, offset: int, length: int) -> None:
        """Copy a range that both memfds have memory for; nobody else has ``target`` yet.  OSError.

        Where users have spoiled ``source`` it must fail, or copy what there is: it never maps it.
        Never asked for where memory is ``fixed``.
        """

    def end(self, fd: int) -> None:
        """Give all memory back, for good, at the latest with our close of ``fd``.  OSError.

        Without :attr:`Promise.RECLAIM`: with the last close or unmap of all who have it.
        """

    def held(self, fd: int) -> int:
        """Return the bytes of memory that the memfd holds."""

    def touched(self, fd: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges that users have touched, ascending; nothing unless ``locates``."""


class MemfdStore:
    """What all memfds have in common: seals, fallocate(2), the count of their blocks."""

    layout: Layout = GROWING
    promises: frozenset[Promise] = frozenset(Promise)
    read_only: bool = True
    pooled: bool = False
    prompt: int = 4 << 20
    fixed: str = ""
    _flags = 0

    def create(self, name: str, size: int) -> int:
        """Return a new memfd of ``size`` bytes, all holes, that nobody can grow.  OSError."""
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | self._flags
        try:
            fd = os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd = os.memfd_create(name, flags)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def allocate(self, fd: int, offset: int, length: int) -> None:
        """Give a range memory; what has some keeps its contents.  OSError."""
        _call_fallocate(fd, 0, offset, length)

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Give the memory of a range back; every mapping loses it.  OSError."""
        _call_fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)

    def copy(self, source: int, target: int, offset: int, length: int) -> None:
        """Copy a range; what it holds never enters our own memory.  OSError."""
        os.lseek(target, offset, os.SEEK_SET)
        end = offset + length
        while offset < end:
            copied = os.sendfile(target, source, offset, end - offset)
            if not copied:
                raise OSError(errno.EIO, "a user has cut the extent short")
            offset += copied

    def end(self, fd: int) -> None:
        """Give all memory back, for good.  OSError."""
        os.ftruncate(fd, 0)

    def held(self, fd: int) -> int:
        """Return the bytes of memory that the memfd holds."""
        return os.fstat(fd).st_blocks * _BLOCK


def _call_fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2), again after EINTR; raise OSError.  os.fallocate does not exist."""
    while _fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


class StoreError(OSError):
    """A store that this machine cannot offer; ``str()`` says what to do."""


def text(size: int) -> str:
    """Write a page size as ``pagesize=`` reads it."""
    for unit, shift in (("G", 30), ("M", 20)):
        if size >= 1 << shift:
            return f"{size >> shift}{unit}"
    return f"{size >> 10}K"
