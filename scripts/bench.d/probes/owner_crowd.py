# SPDX-License-Identifier: GPL-2.0-or-later
"""Invalidations by the owner that ships, as many at a time as there are files, without FUSE.

owner_crowd.py SOCKET USERS BUSY N FILE...    wait for so many users of every file; punch one page
of each of the first BUSY files at a time, N in all; print rate and durations as JSON

The private files are stood in for by ordinary ones: their numbers name them, their descriptors are
the capabilities, nothing else of them is used.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from itertools import count

import trio

from privfs.notifier import effects
from privfs.operation import Fallocate, OpId, Resize
from privfs.personality import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, PAGE_SIZE, PERSONALITIES
from privfs.service import Call, Service

_WARM_UP = 50
_PAGES = 4096
_USER_SECONDS = 60
_PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


class Injected(Service):
    """A service that says which files may be punched again."""

    def __init__(self, files: int) -> None:
        super().__init__(PERSONALITIES["resizable"], budget_pages=files * _PAGES)
        self.busy: dict[OpId, int] = {}
        self.ready: list[int] = []
        self.some = trio.Event()

    def _answer(self, op: OpId, answer: effects.Answer) -> None:
        super()._answer(op, answer)
        ino = self.busy.pop(op, None)
        if ino is not None:
            assert answer.errno == 0, answer
            self.ready.append(ino)
            self.some.set()

    def punch(self, ino: int, page: int) -> None:
        """Begin to punch a page."""
        call = self.begin(ino, Fallocate(_PUNCH, page * PAGE_SIZE, PAGE_SIZE))
        self.busy[call.op] = ino
        if call.outcome is not None:
            raise AssertionError(f"a punch that waits for nobody: {call.outcome}")


async def _run(service: Injected, pages: dict[int, Iterator[int]], wanted: int) -> None:
    """Punch ``wanted`` pages, the next one of each file in turn, all files at the same time."""
    left = wanted
    service.ready = list(pages)
    while left or service.busy:
        while service.ready and left:
            ino = service.ready.pop()
            page = next(pages[ino])
            if page and page % _PAGES == 0:
                await _settle(service, ino, Fallocate(0, 0, _PAGES * PAGE_SIZE))
            service.punch(ino, page % _PAGES)
            left -= 1
        service.some = trio.Event()
        if service.busy and (not service.ready or not left):
            await service.some.wait()


async def _settle(service: Service, ino: int, request: Fallocate | Resize) -> Call:
    call = service.begin(ino, request)
    await service.wait(call)
    return call


async def main(path: str, users: int, busy: int, wanted: int, files: list[str]) -> None:
    """Serve the users and measure."""
    service = Injected(busy)
    inos = []
    for file in files:
        status = os.stat(file)
        service.dev = status.st_dev
        inos.append(status.st_ino)
        service.owner.create(status.st_ino)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as listener:
        listener.bind(path)
        listener.listen(1024)
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run, listener)
            print("ready", flush=True)
            with trio.fail_after(_USER_SECONDS):
                while any(len(service.owner.users[ino]) < users for ino in inos):
                    await trio.sleep(0.005)
            for ino in inos[:busy]:
                await _settle(service, ino, Resize(_PAGES * PAGE_SIZE))
                await _settle(service, ino, Fallocate(0, 0, _PAGES * PAGE_SIZE))
            pages: dict[int, Iterator[int]] = {ino: count() for ino in inos[:busy]}
            await _run(service, pages, _WARM_UP)
            service.latencies.recent.clear()
            start = time.perf_counter()
            await _run(service, pages, wanted)
            took = time.perf_counter() - start
            latencies = service.latencies
            found = {
                "per_second": wanted / took,
                "round_trip": {
                    "p50_ns": latencies.percentile(0.5) * 1e9,
                    "p99_ns": latencies.percentile(0.99) * 1e9,
                },
            }
            print(json.dumps(found), flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    _path, *_numbers = sys.argv[1:5]
    _users, _busy, _wanted = map(int, _numbers)
    trio.run(main, _path, _users, _busy, _wanted, sys.argv[5:])
