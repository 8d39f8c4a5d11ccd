# SPDX-License-Identifier: GPL-2.0-or-later
"""A user of a private file without a VM, as its own process: ``light_user.py PATH MODE [NAME]``.

It registers the file, asks for its first pages and prints ``ready``.  It prints one line for every
invalidation and then, told by MODE, acknowledges (``ack``), waits for the command ``ack`` each
time (``held``), or never does (``hang``).  Commands, one a line:

``get PAGE``, ``punch START END`` (through the owner), ``fallocate PATH START END`` (punch through
the mount) and ``fsync PATH``, each in a thread of its own, ``drop`` (end the socket and live on),
``ack``, ``leave``.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading

from privfs.notifier.lane import Lane, LinkError, find_socket
from privfs.notifier.user import ExtentArrived, Granted, Registered, Zap

PAGE = 4096
_PUNCH = 0x03
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def say(text: str) -> None:
    print(text, flush=True)


class Mmu:
    """Maps nothing, so that every acknowledgement is true."""

    def __init__(self, mode: str) -> None:
        self.lock = threading.Lock()
        self.mode = mode
        self.permits = threading.Semaphore(0)
        self.answered = threading.Event()
        self.ended = threading.Event()

    def extent_arrived(self, extent: ExtentArrived, fd: int) -> None:
        os.close(fd)

    def zap(self, zap: Zap) -> object:
        say(f"zap {zap.start} {zap.end} {zap.reason.name}")
        return zap.seq

    def drain(self, tickets: list[object]) -> None:
        if self.mode == "hang":
            threading.Event().wait()
        if self.mode == "held":
            for _ in tickets:
                self.permits.acquire()

    def granted(self, granted: Granted) -> None:
        say(f"granted {granted.start} {granted.end}")
        self.answered.set()

    def denied(self, req: int, status: int) -> None:
        say(f"denied {status}")
        self.answered.set()

    def lost(self, why: str) -> None:
        say(f"lost {why}")
        self.ended.set()


def punch(path: str, start: int, end: int) -> int:
    """Punch pages of a file through its mount; the errno."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        failed = _libc.fallocate(fd, _PUNCH, start * PAGE, (end - start) * PAGE)
        return ctypes.get_errno() if failed else 0
    finally:
        os.close(fd)


class LightUser:
    """One session with one file."""

    def __init__(self, path: str, mode: str, name: str) -> None:
        self.mmu = Mmu(mode)
        self.lane = Lane(self.mmu)
        self.lane.start(find_socket(path), name)
        fd = os.open(path, os.O_RDWR)
        self.file: Registered = self.lane.register(fd)
        os.close(fd)

    def get(self, page: int, pages: int = 1) -> None:
        last = min(page + pages, self.file.pages)
        with self.mmu.lock:
            record = self.lane.get(self.file.ino, page, page, last, write=True)
        self.lane.send(record)

    def obey(self, words: list[str]) -> bool:
        """Do a command; False ends the process."""
        match words:
            case ["ack"]:
                self.mmu.permits.release()
            case ["get", page]:
                self.get(int(page))
            case ["punch", start, end]:
                try:
                    self.lane.punch(self.file.ino, int(start), int(end))
                    say("punched 0")
                except LinkError as error:
                    say(f"punched {error.errno}")
            case ["fallocate", path, start, end]:
                threading.Thread(
                    target=lambda: say(f"fallocated {punch(path, int(start), int(end))}"),
                    daemon=True,
                ).start()
            case ["fsync", path]:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                threading.Thread(target=os.fsync, args=(fd,), daemon=True).start()
            case ["drop"]:
                self.lane._sock.shutdown(socket.SHUT_RDWR)
            case ["leave"]:
                self.lane.unregister(self.file.ino)
                self.lane.close()
                say("left")
                return False
        return True


def main() -> int:
    path, mode = sys.argv[1:3]
    user = LightUser(path, mode, sys.argv[3] if len(sys.argv) > 3 else mode)
    user.get(0, 16)
    if not user.mmu.answered.wait(60):
        say("no grant")
        return 1
    say("ready")
    for line in sys.stdin:
        if not user.obey(line.split()):
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
