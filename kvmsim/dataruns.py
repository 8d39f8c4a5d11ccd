# SPDX-License-Identifier: GPL-2.0-or-later
"""What of a file is backed by memory: lseek(2) with SEEK_DATA and SEEK_HOLE."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator


def data_runs(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts [first, last) of bytes [start, end) that hold something, in order; OSError.

    A page that was allocated and never touched counts as a hole.
    """
    at = start
    while at < end:
        try:
            first = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here on
                return
            raise
        if first >= end:
            return
        at = min(os.lseek(fd, first, os.SEEK_HOLE), end)
        yield first, at
