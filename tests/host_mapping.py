# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that maps a file: touches in a process of their own, since some of them are SIGBUS."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from typing import Final

PAGE: Final = 4096
SIGBUS: Final = -signal.SIGBUS
_TOUCH: Final = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
                      ctypes.c_long)
fd, length, at, store = map(int, sys.argv[1:])
place = libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
if place == ctypes.c_void_p(-1).value:
    sys.exit(ctypes.get_errno())
byte = ctypes.c_char.from_address(place + at)
if store:
    byte.value = b"x"
byte.value
"""


def touch(fd: int, at: int, *, store: bool = False, length: int = 0) -> int:
    """Map ``length`` bytes of a file, by default all, and load or store the byte ``at``.

    Return 0, the errno of mmap(2), or minus the signal.
    """
    arguments = (fd, length or os.fstat(fd).st_size, at, int(store))
    return subprocess.run(
        [sys.executable, "-c", _TOUCH, *map(str, arguments)], pass_fds=[fd], timeout=60, check=False
    ).returncode


def fallocate(fd: int, mode: int, start: int, end: int) -> None:
    """fallocate(2) on pages [start, end); OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    if libc.fallocate(fd, mode, start * PAGE, (end - start) * PAGE):
        raise OSError(ctypes.get_errno(), f"fallocate {mode} [{start:#x}, {end:#x})")
