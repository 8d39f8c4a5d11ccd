# SPDX-License-Identifier: GPL-2.0-or-later
"""What a descriptor stands for, without asking the mount that it lies on: statx(2).

fstat(2) of a file on a FUSE mount is a request to its server, about 100 µs. Whose file it is
never changes, and its size changes only by system calls, which the kernel sees.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final, NamedTuple

_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_TYPE_MODE_INO_SIZE: Final = 0x1 | 0x2 | 0x100 | 0x200
_SIZE: Final = 256
_STATX: Final = struct.Struct("<28xH2xQQ88xII")  # include/uapi/linux/stat.h, as far as it is used

_libc = ctypes.CDLL(None, use_errno=True)
_libc.statx.argtypes = (
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p,
)  # fmt: skip


class WhichFile(NamedTuple):
    """Fields of struct stat under their names; ``st_size`` in bytes."""

    st_mode: int
    st_ino: int
    st_size: int
    st_dev: int


def which_file(fd: int) -> WhichFile:
    """What the kernel knows of an open descriptor; OSError (EBADF)."""
    space = ctypes.create_string_buffer(_SIZE)
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    if _libc.statx(fd, b"", flags, _STATX_TYPE_MODE_INO_SIZE, space):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    mode, inode, size, major, minor = _STATX.unpack_from(space)
    return WhichFile(mode, inode, size, os.makedev(major, minor))
