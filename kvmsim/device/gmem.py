# SPDX-License-Identifier: GPL-2.0-or-later
"""Private files for KVM_CREATE_GUEST_MEMFD: unlinked files on a privfs mount.

What they can do is what the mount makes of them; under the personality ``guest_memfd`` it is what
virt/kvm/guest_memfd.c does.
"""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Final

_numbers: Final = itertools.count(1)


class GuestMemfds:
    """Makes files on the mount of ``folder``. ``flags``: the GUEST_MEMFD_FLAG_* that it has."""

    flags = 0

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def create(self, size: int) -> int:
        """A descriptor of a new file of ``size`` bytes that has no name; OSError."""
        while True:
            path = self.folder / f"kvm-gmem.{os.getpid()}.{next(_numbers)}"
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                break
            except OSError as error:
                if error.errno != errno.EEXIST:
                    raise
        try:
            os.unlink(path)
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd
