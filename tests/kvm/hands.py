# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host does to guest memory with its own hands: mmap, madvise, fallocate."""

from __future__ import annotations

import ctypes

from kvm.world import answer, name_of

from kvmsim.api import GuestMemfd, IoctlError, Memory
from kvmsim.uapi import PAGE_SIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def mapping(file: GuestMemfd) -> tuple[Memory | None, str]:
    """A mapping of a file if it can have one, and "0" or the errno's name."""
    try:
        return file.map(), "0"
    except IoctlError as error:
        return None, name_of(error)


def advise(memory: Memory, advice: int, page: int) -> None:
    """madvise(2) on one page."""
    if _libc.madvise(memory.address + page * PAGE_SIZE, PAGE_SIZE, advice):
        raise OSError(ctypes.get_errno(), "madvise")


def raw_fallocate(file: GuestMemfd, mode: int) -> str:
    """fallocate(2) of a whole file, once: "0" or the errno's name."""

    def call() -> None:
        if _libc.fallocate(file.fileno(), mode, 0, file.size):
            raise OSError(ctypes.get_errno(), "fallocate")

    return answer(call)
