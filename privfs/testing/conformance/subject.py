# SPDX-License-Identifier: GPL-2.0-or-later
"""The file under test, as a probe meets it in its own process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from privfs.testing.conformance.row import SIZE


@dataclass(frozen=True, slots=True)
class Subject:
    """A fresh file: open read-write as ``fd``; ``path`` if it has a name.

    ``note`` tells a part of the outcome at once, for probes that a signal may end.
    """

    fd: int
    path: str | None = None
    note: Callable[[str], None] = lambda text: None

    @property
    def proc(self) -> str:
        """A path that leads to the open file itself."""
        return f"/proc/self/fd/{self.fd}"


def other_file() -> int:
    """Return an ordinary memfd of SIZE bytes: the other end of copies."""
    fd = os.memfd_create("conformance")
    os.write(fd, b"x" * SIZE)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def disk_directory() -> int:
    """Return a descriptor of a directory for files of another file system."""
    return os.open(tempfile.gettempdir(), os.O_RDONLY | os.O_DIRECTORY)
