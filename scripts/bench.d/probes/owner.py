# SPDX-License-Identifier: GPL-2.0-or-later
"""Rounds of invalidation by the owner that ships, without FUSE: INVALIDATE out, ACK in.

owner.py SOCKET FILE N    take one user of FILE at SOCKET; punch a page N times, allocating it in
between; print the durations of the invalidations (from the decision to the last proof) as JSON.

The private file is stood in for by an ordinary one: its number names it, its descriptor is the
capability, nothing else of it is used.
"""

from __future__ import annotations

import json
import os
import socket
import sys

import trio

from privfs.operation import Fallocate, Resize
from privfs.personality import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, PAGE_SIZE, PERSONALITIES
from privfs.service import Service

_WARM_UP = 50
_USER_SECONDS = 20


async def main(path: str, file: str, count: int) -> None:
    """Serve one user and measure."""
    status = os.stat(file)
    service = Service(PERSONALITIES["resizable"], budget_pages=1024)
    service.dev = status.st_dev
    ino = status.st_ino
    service.owner.create(ino)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as listener:
        listener.bind(path)
        listener.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run, listener)
            print("ready", flush=True)
            with trio.fail_after(_USER_SECONDS):
                while not service.owner.users[ino]:
                    await trio.sleep(0.005)
            await service.wait(service.begin(ino, Resize(16 * PAGE_SIZE)))
            for index in range(_WARM_UP + count):
                if index == _WARM_UP:
                    service.latencies.recent.clear()
                page = 5 * PAGE_SIZE, PAGE_SIZE
                await service.wait(service.begin(ino, Fallocate(FALLOC_FL_KEEP_SIZE, *page)))
                punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
                await service.wait(service.begin(ino, Fallocate(punch, *page)))
            latencies = service.latencies
            found = {
                "p50_ns": latencies.percentile(0.5) * 1e9,
                "p99_ns": latencies.percentile(0.99) * 1e9,
            }
            print(json.dumps({"calls": count, "round_trip": found}), flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], int(sys.argv[3]))
