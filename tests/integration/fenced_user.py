# SPDX-License-Identifier: GPL-2.0-or-later
"""A user that maps what it is granted, behind a fence: ``fenced_user.py PATH FENCE MODE``.

FENCE is as ``kvmsim boot --fence`` takes it.  It registers the file and prints ``ready``.  MODE
``hang`` never acknowledges, ``ack`` does, ``liar`` does so without unmapping.  Commands:

``get START END`` (prints ``granted START END`` for the page START), ``touch PAGE`` (a store,
``touched``), ``load PAGE`` (``loaded BYTE``), ``getxattr PATH PAGE`` (of ``user.slow``: a system
call that stores to the page, in a thread: ``got RESULT ERRNO``).
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading

from kvmsim.hostmem import HostMemory
from privfs.notifier.lane import Lane, find_socket
from privfs.notifier.user import ExtentArrived, Granted, Zap

PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)
_libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_libc.getxattr.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def say(text: str) -> None:
    print(text, flush=True)


class Mmu:
    """Pages of the first extents, each mapped as a whole."""

    def __init__(self, host: HostMemory, mode: str) -> None:
        self.lock = threading.Lock()
        self.host = host
        self.mode = mode
        self.places: list[tuple[int, int, int]] = []  #: first page, end, hpa

    def hpa(self, page: int) -> int:
        return next(
            hpa + (page - start) * PAGE for start, end, hpa in self.places if start <= page < end
        )

    def address(self, page: int) -> int:
        return self.host.arena.address + self.hpa(page) - self.host.arena.hpa_base

    def extent_arrived(self, extent: ExtentArrived, fd: int) -> None:
        length = (extent.end - extent.start) * PAGE
        hpa = self.host.place_private(fd, 0, length, self.trespassed, writable=True)
        self.places.append((extent.start, extent.end, hpa))
        os.close(fd)

    def zap(self, zap: Zap) -> object:
        say(f"zap {zap.start} {zap.end} {zap.reason.name}")
        return zap

    def drain(self, tickets: list[object]) -> None:
        if self.mode == "hang":
            threading.Event().wait()
        for zap in tickets:
            assert isinstance(zap, Zap)
            if self.mode == "ack":
                self.host.shut(self.hpa(zap.start), (zap.end - zap.start) * PAGE)

    def granted(self, granted: Granted) -> None:
        self.host.admit(self.hpa(granted.start), (granted.end - granted.start) * PAGE)
        say(f"granted {granted.start} {granted.end}")

    def denied(self, req: int, status: int) -> None:
        say(f"denied {status}")

    def trespassed(self, why: str) -> None:
        say(f"trespassed {why}")

    def lost(self, why: str) -> None:
        say(f"lost {why}")


def getxattr(path: str, address: int) -> None:
    """Have the kernel store to an address."""
    result = _libc.getxattr(path.encode(), b"user.slow", address, PAGE)
    say(f"got {result} {ctypes.get_errno() if result < 0 else 0}")


def main() -> int:
    path, fence, mode = sys.argv[1:]
    host = HostMemory(fence)
    mmu = Mmu(host, mode)
    lane = Lane(mmu)
    lane.start(find_socket(path), mode, fence=host.fence.kind, userfault=host.fence.fd)
    fd = os.open(path, os.O_RDWR)
    ino = lane.register(fd).ino
    os.close(fd)
    say("ready")
    for line in sys.stdin:
        match line.split():
            case ["get", start, end]:
                with mmu.lock:
                    record = lane.get(ino, int(start), int(start), int(end), write=True)
                lane.send(record)
            case ["touch", page]:
                _libc.memset(mmu.address(int(page)), 0x55, 8)
                say("touched")
            case ["load", page]:
                byte = ctypes.create_string_buffer(1)
                _libc.memcpy(byte, mmu.address(int(page)), 1)
                say(f"loaded {byte.raw[0]:#x}")
            case ["getxattr", where, page]:
                arguments = where, mmu.address(int(page))
                threading.Thread(target=getxattr, args=arguments, daemon=True).start()
    return 0


if __name__ == "__main__":
    sys.exit(main())
