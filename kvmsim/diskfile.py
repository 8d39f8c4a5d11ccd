# SPDX-License-Identifier: GPL-2.0-or-later
"""A file of the host as the disk of a guest (:class:`kvmsim.vmm.bounce.Disk`)."""

from __future__ import annotations

import errno
import os
import stat
from types import TracebackType
from typing import Self

from kvmsim.vmm.bounce import SECTOR


class FileDisk:
    """The whole sectors of a regular file or block device. Use as a context manager.

    OSError if it cannot be opened for reading and writing, or is neither.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            mode = os.fstat(self._fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise OSError(errno.EINVAL, "not a regular file or block device", os.fspath(path))
            self.sectors = os.lseek(self._fd, 0, os.SEEK_END) // SECTOR
        except OSError:
            os.close(self._fd)
            raise

    def read(self, sector: int, count: int) -> bytes:
        """``count`` sectors from ``sector`` on; OSError if the file has become shorter."""
        wanted = count * SECTOR
        data = b""
        while len(data) < wanted:
            part = os.pread(self._fd, wanted - len(data), sector * SECTOR + len(data))
            if not part:
                raise OSError(errno.EIO, f"the file ends inside sectors {sector}+{count}")
            data += part
        return data

    def write(self, sector: int, data: bytes) -> None:
        """Store whole sectors from ``sector`` on."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], sector * SECTOR + done)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
