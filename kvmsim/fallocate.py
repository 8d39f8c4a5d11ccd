# SPDX-License-Identifier: GPL-2.0-or-later
"""fallocate(2) with its modes, which Python's os does not have."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

FALLOC_FL_KEEP_SIZE: Final = 0x01  # include/uapi/linux/falloc.h
FALLOC_FL_PUNCH_HOLE: Final = 0x02

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2), offsets in bytes; OSError.

    A signal interrupts an allocation, and a retry goes on with it.
    """
    while _libc.fallocate(fd, mode, offset, size) != 0:
        if (code := ctypes.get_errno()) != errno.EINTR:
            raise OSError(code, os.strerror(code))


def punch(fd: int, offset: int, size: int) -> None:
    """Free the pages of a range: it reads as zeros in every mapping; OSError."""
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)
