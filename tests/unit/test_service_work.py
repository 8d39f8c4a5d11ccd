# SPDX-License-Identifier: GPL-2.0-or-later
"""Long work of the memory side: signals between chunks, what fails half-way, what is set aside."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from privfs.backing import Backing
from privfs.backing.shmem import Shmem
from privfs.extents import SMALL_EXTENT_PAGES
from privfs.machine import Machine
from privfs.operation import Fallocate, FaultIn, Resize
from privfs.personality import PAGE_SIZE, PERSONALITIES, Refused
from privfs.service import Call, Service

KEEP_SIZE, ZERO_RANGE = 1, 16
CHUNK = SMALL_EXTENT_PAGES * PAGE_SIZE
INO, OTHER = 7, 8
PATIENCE = 20.0


class Gate(Shmem):
    """shmem that stops before each allocation until it is let through, or told to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.permits = threading.Semaphore(0)
        self.closed = False
        self.waiting = 0
        self.asked: list[int] = []  #: bytes of each allocation
        self.fails: dict[int, int] = {}  #: number of the allocation → errno
        self._lock = threading.Lock()

    def allocate(self, fd: int, offset: int, length: int) -> None:
        with self._lock:
            number = len(self.asked)
            self.asked.append(length)
            self.waiting += 1
        if self.closed:
            assert self.permits.acquire(timeout=PATIENCE)
        with self._lock:
            self.waiting -= 1
        code = self.fails.get(number, 0)
        if code:
            raise OSError(code, os.strerror(code))
        super().allocate(fd, offset, length)


class Bench:
    """A service with two empty files on a gate."""

    def __init__(
        self, limit: int = 100, budget: int = 1 << 20, quota: int = 0, who: str = "resizable"
    ) -> None:
        self.gate = Gate()
        self.service = Service(
            PERSONALITIES[who], budget, quota_pages=quota,
            backing=Backing(limit, self.gate),
        )  # fmt: skip
        for ino in (INO, OTHER):
            self.service.owner.create(ino)

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(PATIENCE):
            while not condition():
                await trio.lowlevel.checkpoint()

    async def call(self, request: Fallocate | Resize, ino: int = INO) -> int:
        return await self.end(self.service.begin(ino, request))

    async def end(self, call: Call) -> int:
        """Wait for the end of a call; its errno."""
        with trio.fail_after(PATIENCE):
            try:
                await self.service.wait(call)
            except Refused as refused:
                return refused.errno
        return 0

    def begin(self, request: Fallocate | FaultIn, ino: int = INO) -> Call:
        return self.service.begin(ino, request)

    def state(self, ino: int = INO) -> tuple[int, int, int]:
        """Return size, pages and extents of a file whose books and memory agree."""
        file = self.service.owner.files[ino]
        assert file.idle
        found = self.service.backing.audit(
            ino, file.allocated,
            lambda start, end: file.pages.range_cardinality(start, end) == end - start,
        )  # fmt: skip
        assert found == []
        return file.size, file.allocated, len(self.service.backing.extents(ino))

    @property
    def used(self) -> int:
        return self.service.owner.budget.used


@asynccontextmanager
async def served(bench: Bench) -> AsyncIterator[None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as listener:
        listener.bind("")
        listener.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(bench.service.run, listener)
            try:
                yield
            finally:
                bench.gate.closed = False
                bench.gate.permits.release(1000)
                nursery.cancel_scope.cancel()


def run(bench: Bench, scenario: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with served(bench):
            await scenario(bench)

    trio.run(main)


# --- signals -------------------------------------------------------------------------------------


def test_a_signal_is_seen_between_two_chunks_and_a_retry_makes_the_rest() -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.call(Resize(4 * CHUNK)) == 0
        bench.gate.closed = True
        call = bench.begin(Fallocate(KEEP_SIZE, 0, 4 * CHUNK))
        bench.gate.permits.release()
        await bench.until(lambda: len(bench.gate.asked) == 2 and bench.gate.waiting == 1)
        bench.service.interrupt(call)
        bench.gate.permits.release(1)
        assert await bench.end(call) == errno.EINTR
        assert bench.state() == (4 * CHUNK, 2 * SMALL_EXTENT_PAGES, 2)
        assert bench.used == 2 * SMALL_EXTENT_PAGES
        bench.gate.closed = False
        assert await bench.call(Fallocate(KEEP_SIZE, 0, 4 * CHUNK)) == 0
        assert bench.gate.asked == [CHUNK] * 4  # nothing is made twice
        assert bench.state() == (4 * CHUNK, 4 * SMALL_EXTENT_PAGES, 4)

    run(Bench(), scenario)


def test_a_signal_before_the_first_chunk_leaves_room_for_progress() -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.call(Resize(3 * CHUNK)) == 0
        tries = 0
        answer = errno.EINTR
        while answer == errno.EINTR:
            call = bench.begin(Fallocate(0, 0, 3 * CHUNK))
            bench.service.interrupt(call)
            answer = await bench.end(call)
            tries += 1
        assert (answer, tries) == (0, 3)

    run(Bench(), scenario)


def test_a_growth_that_is_interrupted_leaves_nothing() -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.call(Fallocate(0, 0, 8 * PAGE_SIZE)) == 0
        before = bench.state()
        call = bench.begin(Fallocate(0, 0, 2 * CHUNK))
        bench.service.interrupt(call)
        assert await bench.end(call) == errno.EINTR
        size, pages, _ = bench.state()
        assert size == before[0]
        # What lies inside the file was there before; past its end nothing stays.
        assert pages == before[1] == bench.used

    run(Bench(), scenario)


def test_a_signal_does_not_end_the_last_chunk() -> None:
    async def scenario(bench: Bench) -> None:
        bench.gate.closed = True
        call = bench.begin(Fallocate(0, 0, 8192 * PAGE_SIZE))
        await bench.until(lambda: bench.gate.waiting == 1)
        bench.service.interrupt(call)
        bench.gate.permits.release()
        assert await bench.end(call) == 0
        bench.service.interrupt(call)  # too late: nothing happens
        assert bench.state() == (8192 * PAGE_SIZE, 8192, 1)

    run(Bench(), scenario)


def test_zeroing_is_not_left_half_way_but_for_a_dying_caller() -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.call(Fallocate(0, 0, 2 * CHUNK)) == 0
        call = bench.begin(Fallocate(ZERO_RANGE, 0, 2 * CHUNK))
        bench.service.interrupt(call)
        assert await bench.end(call) == errno.EINTR
        _, pages, _ = bench.state()
        assert pages == SMALL_EXTENT_PAGES == bench.used

    run(Bench(), scenario)


# --- running out ---------------------------------------------------------------------------------

RAN_OUT = pytest.mark.logs("allocate: file")


@RAN_OUT
@pytest.mark.parametrize("code", [errno.EINTR, errno.ENOSPC])
@pytest.mark.parametrize("who", ["v7", "shim"])
def test_a_growth_that_fails_leaves_what_lay_past_the_end(who: str, code: int) -> None:
    """KEEP_SIZE on an empty file: those pages were there before the growth."""

    async def scenario(bench: Bench) -> None:
        for start in (2, CHUNK // PAGE_SIZE - 2):
            assert await bench.call(Fallocate(KEEP_SIZE, start * PAGE_SIZE, 4 * PAGE_SIZE)) == 0
        bench.gate.fails = {len(bench.gate.asked) + 1: code} if code != errno.EINTR else {}
        call = bench.begin(Fallocate(0, 0, 3 * CHUNK))
        if code == errno.EINTR:
            bench.service.interrupt(call)
        assert await bench.end(call) == code
        size, pages, _ = bench.state()
        assert (size, pages, bench.used) == (0, 8, 8)
        assert await bench.call(Fallocate(0, 0, 3 * CHUNK)) == 0
        assert bench.state()[:2] == (3 * CHUNK, 3 * CHUNK // PAGE_SIZE)

    run(Bench(who=who), scenario)


@RAN_OUT
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM, errno.EMFILE])
@pytest.mark.parametrize("size", [0, 4 * CHUNK])
def test_an_allocation_that_runs_out_changes_nothing(code: int, size: int) -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.call(Resize(size)) == 0
        if size:
            assert await bench.call(Fallocate(0, CHUNK + PAGE_SIZE, PAGE_SIZE)) == 0
        before = bench.state()
        bench.gate.fails[len(bench.gate.asked) + 2] = code
        assert await bench.call(Fallocate(0, 0, 4 * CHUNK)) == errno.ENOSPC
        assert bench.state() == before
        assert bench.used == before[1]
        assert await bench.call(Fallocate(0, 0, 4 * CHUNK)) == 0
        assert bench.state() == (4 * CHUNK, 4 * SMALL_EXTENT_PAGES, 4)

    run(Bench(), scenario)


@RAN_OUT
def test_what_a_fault_got_meanwhile_stays() -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.call(Resize(4 * CHUNK)) == 0
        bench.gate.closed = True
        bench.gate.fails[1] = errno.ENOSPC
        call = bench.begin(Fallocate(0, 0, 4 * CHUNK))
        bench.gate.permits.release()
        await bench.until(lambda: len(bench.gate.asked) == 2 and bench.gate.waiting == 1)
        bench.gate.permits.release(2)  # the fault asks for memory too, here on the loop
        assert await bench.end(bench.begin(FaultIn(5))) == 0
        assert await bench.end(call) == errno.ENOSPC
        assert bench.state() == (4 * CHUNK, 1, 1)
        assert 5 in bench.service.owner.files[INO].pages
        assert bench.used == 1

    run(Bench(), scenario)


@RAN_OUT
def test_what_another_allocation_may_have_got_stays() -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.call(Resize(4 * CHUNK)) == 0
        bench.gate.closed = True
        bench.gate.fails[2] = errno.ENOSPC
        first = bench.begin(Fallocate(0, 0, 4 * CHUNK))
        await bench.until(lambda: bench.gate.waiting == 1)
        second = bench.begin(Fallocate(KEEP_SIZE, 0, CHUNK))  # shares the first chunk
        await bench.until(lambda: bench.gate.waiting == 2)
        bench.gate.permits.release()
        await bench.until(lambda: len(bench.gate.asked) == 3 or first.outcome is not None
                          or second.outcome is not None)  # fmt: skip
        bench.gate.closed = False
        bench.gate.permits.release(10)
        answers = (await bench.end(first), await bench.end(second))
        assert answers == (errno.ENOSPC, 0)
        size, pages, _ = bench.state()
        assert size == 4 * CHUNK
        assert pages >= SMALL_EXTENT_PAGES
        assert pages == bench.used

    run(Bench(), scenario)


@RAN_OUT
def test_descriptors_are_set_aside_before_anything_is_made() -> None:
    async def scenario(bench: Bench) -> None:
        bench.gate.closed = True
        first = bench.begin(Fallocate(0, 0, 3 * CHUNK))
        await bench.until(lambda: bench.gate.waiting == 1)
        asked = len(bench.gate.asked)
        assert await bench.call(Fallocate(0, 0, 2 * CHUNK), OTHER) == errno.ENOSPC
        assert len(bench.gate.asked) == asked  # refused before it began
        assert bench.state(OTHER) == (0, 0, 0)
        bench.gate.closed = False
        bench.gate.permits.release(10)
        assert await bench.call(Fallocate(0, 0, CHUNK), OTHER) == 0
        assert await bench.end(first) == 0
        assert await bench.call(Fallocate(0, 3 * CHUNK, PAGE_SIZE)) == errno.ENOSPC
        assert await bench.call(Resize(2 * CHUNK)) == 0
        assert await bench.call(Fallocate(0, 3 * CHUNK, PAGE_SIZE)) == 0
        assert bench.state() == (3 * CHUNK + PAGE_SIZE, 2 * SMALL_EXTENT_PAGES + 1, 3)

    run(Bench(limit=4), scenario)


def test_what_runs_out_again_and_again_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(bench: Bench) -> None:
        for _ in range(20):
            assert await bench.call(Fallocate(0, 0, PAGE_SIZE)) == errno.ENOSPC

    run(Bench(limit=0), scenario)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "1 descriptors wanted, 0 of 0 are in use" in warnings[0].getMessage()
    caplog.clear()


# --- promises ------------------------------------------------------------------------------------


def test_what_is_under_way_is_promised(tmp_path: Path) -> None:
    """The machine has room for three chunks; its readings do not show what is being allocated."""

    async def scenario(bench: Bench) -> None:
        (tmp_path / "proc").mkdir()
        available = (3 * CHUNK + (128 << 20)) // 1024
        (tmp_path / "proc/meminfo").write_text(
            f"MemTotal: 4194304 kB\nMemAvailable: {available} kB\n"
        )
        coming = bench.service._coming
        now = iter(range(1000))  # each reading is a fresh one
        machine = Machine(
            lambda: sum(coming.values()), root=tmp_path, clock=lambda: float(next(now))
        )
        bench.service.owner.budget.room = machine.room
        bench.gate.closed = True
        first = bench.begin(Fallocate(0, 0, 2 * CHUNK))
        await bench.until(lambda: bench.gate.waiting == 1)
        assert bench.service.owner.budget.available == SMALL_EXTENT_PAGES
        assert await bench.call(Fallocate(0, 0, CHUNK + PAGE_SIZE), OTHER) == errno.ENOSPC
        bench.gate.permits.release()
        await bench.until(lambda: len(bench.gate.asked) == 2 and bench.gate.waiting == 1)
        assert bench.service.owner.budget.available == 2 * SMALL_EXTENT_PAGES
        bench.gate.permits.release()
        assert await bench.end(first) == 0
        assert coming == {}
        assert bench.service.owner.budget.available == 3 * SMALL_EXTENT_PAGES

    run(Bench(), scenario)


def test_a_quota_counts_what_is_under_way() -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.call(Resize(4 * CHUNK)) == 0
        bench.gate.closed = True
        first = bench.begin(Fallocate(0, 0, 8192 * PAGE_SIZE))
        await bench.until(lambda: bench.gate.waiting == 1)
        beyond = Fallocate(0, CHUNK, 2 * PAGE_SIZE)
        assert await bench.call(beyond) == errno.ENOSPC
        bench.gate.permits.release(1)
        assert await bench.end(first) == 0
        assert bench.state() == (4 * CHUNK, 8192, 1)

    run(Bench(quota=8193), scenario)
