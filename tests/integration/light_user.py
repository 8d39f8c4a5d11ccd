# SPDX-License-Identifier: GPL-2.0-or-later
"""A user of private files without a VM, as its own process: ``light_user.py PATH MODE``.

It registers the file, asks for its first pages, prints ``ready`` and then, told by MODE,
acknowledges (``ack``), never does (``hang``), closes its socket but lives on (``close``), or sends
nonsense (``garbage``).  It prints one line for every invalidation.  ``PATH`` may name a socket's
file more than once for more files.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from privfs.notifier.lane import Lane, find_socket
from privfs.notifier.user import ExtentArrived, Granted, Zap


class Mmu:
    """Maps nothing, so that every acknowledgement is true."""

    def __init__(self, mode: str) -> None:
        self.lock = threading.Lock()
        self.mode = mode
        self.answered = threading.Event()
        self.ended = threading.Event()

    def extent_arrived(self, extent: ExtentArrived, fd: int) -> None:
        os.close(fd)

    def zap(self, zap: Zap) -> object:
        print(f"zap {zap.start} {zap.end} {zap.reason.name}", flush=True)
        return zap.seq

    def drain(self, tickets: list[object]) -> None:
        if self.mode == "hang":
            threading.Event().wait()
        if self.mode == "slow":
            time.sleep(0.3)

    def granted(self, granted: Granted) -> None:
        print(f"granted {granted.start} {granted.end}", flush=True)
        self.answered.set()

    def denied(self, req: int, status: int) -> None:
        print(f"denied {status}", flush=True)
        self.answered.set()

    def lost(self, why: str) -> None:
        print(f"lost {why}", flush=True)
        self.ended.set()


def main() -> int:
    path, mode = sys.argv[1:3]
    mmu = Mmu(mode)
    lane = Lane(mmu)
    lane.start(find_socket(path), f"light-{mode}")
    fd = os.open(path, os.O_RDWR)
    registered = lane.register(fd)
    os.close(fd)
    with mmu.lock:
        record = lane.get(registered.ino, 0, 0, min(16, registered.pages), write=True)
    lane.send(record)
    mmu.answered.wait(10)
    if mode == "close":
        lane._sock.close()
    if mode == "garbage":
        lane._sock.send(os.urandom(80))
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "leave":
            lane.unregister(registered.ino)
            lane.close()
            return 0
    if mode in ("hang", "close", "garbage"):
        threading.Event().wait()
    return 3 if mmu.ended.is_set() else 0


if __name__ == "__main__":
    sys.exit(main())
