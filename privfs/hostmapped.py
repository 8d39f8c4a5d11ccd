# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that the host may map: guest_memfds made with GUEST_MEMFD_FLAG_MMAP.

A file of a mount refuses mmap(2) by what backs its opens (FOPEN_PASSTHROUGH,
fs/fuse/passthrough.c).  One that may be mapped is backed by a memfd instead: by the one memfd that
holds all its memory if it is *shared* with the host (GUEST_MEMFD_FLAG_INIT_SHARED), or else by an
empty one, where each touch is SIGBUS as in kvm_gmem_fault_user_mapping().  Reads and writes go on
to be refused by the daemon, and everything else, punching above all, comes to it as ever.

What the host touches is allocated by the kernel alone.  Such pages are adopted into the file's
bitmap whenever somebody looks; they can be had without any budget, and MADV_REMOVE gives them
back without telling anybody: the users of the file see the hole as the host does, since all of
them map the same memfd.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

from privfs.backing import Backing
from privfs.backing.shmem import Shmem
from privfs.extents import PAGE_SIZE
from privfs.notifier.owner import Owner
from privfs.personality import Refused

log = logging.getLogger(__name__)


class Passthrough(NamedTuple):
    """What the mount can do (FUSE_DEV_IOC_BACKING_OPEN)."""

    back: Callable[[int], int]  #: memfd → backing id; OSError
    close: Callable[[int], None]
    opens: Callable[[int], int]  #: descriptors of an inode


class HostMapped:
    """The files of a mount that the host may map, with the backing ids of their opens."""

    def __init__(self, owner: Owner, backing: Backing) -> None:
        self._owner = owner
        self._backing = backing
        self._passthrough: Passthrough | None = None
        self._ids: dict[int, int] = {}

    def allow(self, passthrough: Passthrough) -> None:
        """The mount has passthrough."""
        self._passthrough = passthrough

    @property
    def possible(self) -> bool:
        """Whether there can be such files here."""
        personality = self._owner.personality
        shmem = isinstance(self._backing.store, Shmem)
        return self._passthrough is not None and personality.mappable and shmem

    def make(self, ino: int, *, shared: bool) -> None:
        """Let every descriptor of a file from now on be mapped; Refused.

        EOPNOTSUPP: not on this mount; EINVAL: it has no size yet; EBUSY: it is open, or has memory
        or is mapped already.
        """
        what = f"map inode {ino} by the host"
        passthrough = self._passthrough
        if passthrough is None or not self.possible:
            raise Refused(
                errno.EOPNOTSUPP,
                f"{what}: needs -o personality=guest_memfd, backing=shmem and FUSE passthrough "
                "(root, Linux 6.9)",
            )
        if passthrough.opens(ino):
            raise Refused(errno.EBUSY, f"{what}: there are descriptors that cannot be mapped")
        file = self._owner.files[ino]
        file.may_be_mapped()
        try:
            self._ids[ino] = self._back(passthrough, ino, file.size if shared else 0)
        except OSError as error:
            self._backing.destroy(ino)
            raise Refused(error.errno or errno.EIO, f"{what}: {error.strerror}") from error
        file.map_by_host(shared=shared)

    def _back(self, passthrough: Passthrough, ino: int, size: int) -> int:
        if size:
            return passthrough.back(self._backing.create_whole(ino, size // PAGE_SIZE))
        empty = self._backing.store.create("privfs:unreachable", 0)
        try:
            return passthrough.back(empty)
        finally:
            os.close(empty)

    def backing_id(self, ino: int) -> int:
        """What backs the opens of a file; 0: what backs all that cannot be mapped."""
        return self._ids.get(ino, 0)

    def adopt(self, ino: int) -> bool:
        """Account for what the host has touched; whether it can have touched anything."""
        file = self._owner.files.get(ino)
        if file is None or not file.shared:
            return False
        file.adopt(self._backing.resident(ino))
        return True

    def forget(self, ino: int) -> None:
        """A file is gone."""
        backing_id = self._ids.pop(ino, 0)
        if backing_id and self._passthrough is not None:
            self._passthrough.close(backing_id)
