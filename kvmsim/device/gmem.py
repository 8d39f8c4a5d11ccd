# SPDX-License-Identifier: GPL-2.0-or-later
"""Private files for KVM_CREATE_GUEST_MEMFD: unlinked files on a privfs mount.

What they can do is what the mount makes of them; under the personality ``guest_memfd`` it is what
virt/kvm/guest_memfd.c does.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
from collections.abc import Callable
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar

from kvmsim.ownerview import OwnerView
from kvmsim.uapi import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP
from privfs.notifier.lane import LinkError, NoMountAbove, find_socket

log = logging.getLogger(__name__)

FLAGS: Final = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
_numbers: Final = itertools.count(1)
_T = TypeVar("_T")


class GuestMemfds:
    """Makes files on the mount of ``folder``; no other flags than ``offered`` (GUEST_MEMFD_FLAG_*).

    ``made``: the flags of every file, by (st_dev, st_ino).
    """

    def __init__(self, folder: str | os.PathLike[str], offered: int = FLAGS) -> None:
        self.folder = Path(folder)
        self.made: dict[tuple[int, int], int] = {}
        self._offered = offered

    @property
    def missing(self) -> str:
        """Why there can be no private files, and what to do; empty if the folder is on a mount."""
        try:
            find_socket(self.folder)
        except NoMountAbove:
            return f"{self.folder} lies in no privfs mount; make one with: privfs mount DIR"
        except OSError as error:  # a mount that is dead: it says so when a file is made
            log.info("%s: %s", self.folder, error)
        return ""

    @cached_property
    def flags(self) -> int:
        """What the mount has of the flags offered: all or none. Only where none is missing.

        To be mapped by the host a file needs FUSE passthrough, and us to be the mount's user.
        """
        try:
            with closing(self._owner()) as owner:
                possible = owner.host_mappable()
        except LinkError as error:
            log.info("%s: no files that can be mapped: %s", self.folder, error)
            possible = False
        return self._offered if possible else 0

    @property
    def mapped(self) -> set[tuple[int, int]]:
        """The files that the host may map."""
        return {key for key, flags in self.made.items() if flags & GUEST_MEMFD_FLAG_MMAP}

    def create(self, size: int, flags: int = 0) -> int:
        """A descriptor of a new file of ``size`` bytes that has no name; OSError."""
        fd = self._mappable(size, flags) if flags & GUEST_MEMFD_FLAG_MMAP else self._plain(size)
        status = os.fstat(fd)
        self.made[status.st_dev, status.st_ino] = flags
        return fd

    def _owner(self) -> OwnerView:
        return OwnerView(find_socket(self.folder))

    def _plain(self, size: int) -> int:
        path, fd = self._new(_open_new)
        try:
            os.unlink(path)
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _mappable(self, size: int, flags: int) -> int:
        """A file that is told how it may be mapped before it is opened for the first time."""
        path, _ = self._new(lambda path: os.mknod(path, stat.S_IFREG | 0o600))
        try:
            os.truncate(path, size)
            with closing(self._owner()) as owner:
                owner.map_by_host(path.stat().st_ino, bool(flags & GUEST_MEMFD_FLAG_INIT_SHARED))
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.unlink(path)

    def _new(self, make: Callable[[Path], _T]) -> tuple[Path, _T]:
        while True:
            path = self.folder / f"kvm-gmem.{os.getpid()}.{next(_numbers)}"
            try:
                return path, make(path)
            except OSError as error:
                if error.errno != errno.EEXIST:
                    raise


def _open_new(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
