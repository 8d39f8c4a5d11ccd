# SPDX-License-Identifier: GPL-2.0-or-later
"""What a fence costs an emulator: a page granted and touched, a page zapped and punched.

fence.py FENCE N    do each N times with the fence of that name; print JSON

The pages are allocated by whoever punches, as an owner does, outside of what is timed.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import sys
import time

from kvmsim.hostmem import HostMemory

_PAGE = 4096
_WINDOW = 512  # pages that one grant may name
_PUNCH = 0x03

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


def latency(times: array.array[int]) -> dict[str, float]:
    """Median and 99th percentile of durations in ns."""
    ordered = sorted(times)
    return {"p50_ns": ordered[len(ordered) // 2], "p99_ns": ordered[len(ordered) * 99 // 100]}


def trespassed(why: str) -> None:
    """Say what would spoil the measurement."""
    print(why, file=sys.stderr)


def main(fence: str, count: int) -> None:
    """Map one extent; go through it page by page, as a guest does at its first touches."""
    host = HostMemory(fence)
    memfd = os.memfd_create("extent", os.MFD_CLOEXEC)
    length = count * _PAGE
    os.ftruncate(memfd, length)
    os.posix_fallocate(memfd, 0, length)
    hpa = host.place_private(memfd, 0, length, trespassed, writable=True)
    base = host.arena.address + hpa - host.arena.hpa_base
    grants, punches = array.array("q"), array.array("q")
    clock = time.perf_counter_ns
    for page in range(count):
        window = page & -_WINDOW  # a grant names what was granted before as well
        began = clock()
        host.admit(hpa + window * _PAGE, (page + 1 - window) * _PAGE)
        _libc.memset(base + page * _PAGE, 1, 1)
        grants.append(clock() - began)
    for page in range(count):
        began = clock()
        host.shut(hpa + page * _PAGE, _PAGE)
        _libc.fallocate(memfd, _PUNCH, page * _PAGE, _PAGE)
        punches.append(clock() - began)
    print(json.dumps({"grant": latency(grants), "punch": latency(punches)}))
    host.close()
    os.close(memfd)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
