# SPDX-License-Identifier: GPL-2.0-or-later
"""What nobody does to a guest_memfd, but the kernel would to the memfd behind one that is mapped.

kvm_gmem_mmap() of virt/kvm/guest_memfd.c refuses private mappings; madvise(2) finds nothing to
collapse, since the inode has no large folios (file_thp_enabled(), mm/huge_memory.c).
"""

from __future__ import annotations

import os
from collections.abc import Container
from ctypes import c_int

from kvmsim.exec import maps


def maps_privately(mapped: Container[tuple[int, int]], tid: int, fd: int) -> bool:
    """Whether descriptor ``fd`` of a thread is one of the files ``mapped``."""
    try:
        status = os.stat(f"/proc/{tid}/fd/{c_int(fd).value}")
    except OSError:
        return False  # the kernel says what is wrong with it
    return (status.st_dev, status.st_ino) in mapped


def collapses(mapped: Container[tuple[int, int]], tid: int, start: int, size: int) -> bool:
    """Whether one of the files ``mapped`` lies in bytes [start, start + size) of a thread."""
    try:
        with open(f"/proc/{tid}/maps") as file:
            text = file.read()
    except OSError:
        return False
    found = maps.overlapping(text, start, start + size)
    return any((os.makedev(*one.dev), one.ino) in mapped for _, _, one in found)
