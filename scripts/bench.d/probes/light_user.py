# SPDX-License-Identifier: GPL-2.0-or-later
"""The lightest user of private memory: maps nothing, acknowledges every invalidation at once.

light_user.py SOCKET FILE    register FILE, print "ready", leave at the end of stdin
"""

from __future__ import annotations

import os
import sys
import threading

from privfs.notifier.lane import Lane
from privfs.notifier.user import ExtentArrived, Granted, Zap


class Nothing:
    """An Mmu without a page."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def extent_arrived(self, extent: ExtentArrived, fd: int) -> None:
        os.close(fd)

    def zap(self, zap: Zap) -> object:
        return None

    def drain(self, tickets: list[object]) -> None:
        return

    def granted(self, granted: Granted) -> None:
        raise AssertionError("a light user asks for no page")

    def denied(self, req: int, status: int) -> None:
        raise AssertionError("a light user asks for no page")

    def lost(self, why: str) -> None:
        return


def main(socket: str, path: str) -> None:
    """Register, wait, leave."""
    lane = Lane(Nothing())
    lane.start(socket, "bench")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    registered = lane.register(fd)
    os.close(fd)
    print("ready", flush=True)
    sys.stdin.read()
    if lane.alive:
        lane.unregister(registered.ino)
    lane.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
