# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers that come at once are taken at once; whoever lets the owner wait in vain loses that."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator

import pytest
import trio

from privfs.notifier.fds import Peer, send_frame
from privfs.notifier.link import Hub
from privfs.notifier.wire import Op, Record, pack


class Listener:
    """A Sink that writes down what it is told."""

    def __init__(self) -> None:
        self.records: list[tuple[int, int]] = []
        self.ended: list[tuple[int, str]] = []

    def connected(self, sid: int, peer: Peer) -> None: ...

    def received(self, sid: int, record: Record, fd: int | None) -> None:
        self.records.append((sid, record.seq))

    def broken(self, sid: int, why: str) -> None:
        self.ended.append((sid, why))

    def exited(self, sid: int) -> None: ...


class Glance:
    """Stands in for the wait: looks at the sockets, counts, and may be disturbed."""

    def __init__(self) -> None:
        self.looks = 0
        self.disturbed = False
        self.before: Callable[[], None] = lambda: None

    def __call__(self, fds: tuple[int, ...], microseconds: int) -> int:
        self.looks += 1
        self.before()
        if self.disturbed:
            return -1
        return len(select.select(fds, [], [], 0)[0])


class Bench:
    """A hub with users whose ends of the sockets the test holds; nothing but hurry() reads."""

    def __init__(self, users: int) -> None:
        self.sink = Listener()
        self.hub = Hub(self.sink, lambda *a: None)
        self.glance = self.hub.glance = Glance()
        self.theirs: list[socket.socket] = []

    async def fill(self, users: int, path: str) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(path)
        listener.listen()
        for _ in range(users):
            theirs = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            theirs.connect(path)
            ours, _ = listener.accept()
            async with trio.open_nursery() as nursery:
                self.hub._begin(nursery, ours)
                nursery.cancel_scope.cancel()  # before its reader has looked
            self.theirs.append(theirs)
        listener.close()

    def ack(self, user: int, seq: int) -> None:
        send_frame(self.theirs[user], pack([Record(Op.ACK, seq=seq)]), [])

    def hurry(self, sids: set[int], until: int) -> None:
        self.hub.hurry(frozenset(sids), lambda: len(self.sink.records) >= until)

    def close(self) -> None:
        for line in self.hub._lines.values():
            assert line.sock is not None
            line.sock.close()
            os.close(line.peer.pidfd)
        for sock in self.theirs:
            sock.close()


@pytest.fixture
def bench(tmp_path: os.PathLike[str]) -> Iterator[Bench]:
    bench = Bench(2)
    trio.run(bench.fill, 2, os.fspath(tmp_path) + "/s")
    yield bench
    bench.close()


def test_answers_of_all_are_taken(bench: Bench) -> None:
    bench.ack(0, 7)
    bench.glance.before = lambda: bench.ack(1, 8) if bench.glance.looks == 2 else None
    bench.hurry({1, 2}, until=2)
    assert bench.sink.records == [(1, 7), (2, 8)]
    assert bench.glance.looks == 2


def test_one_that_does_not_answer_is_not_waited_for_again(bench: Bench) -> None:
    bench.hurry({1}, until=1)
    assert bench.glance.looks == 1
    bench.ack(0, 7)
    bench.hurry({1}, until=1)
    assert bench.glance.looks == 1, "a slow user was waited for twice in a row"
    assert bench.sink.records == []  # its reader takes it, as for everybody
    bench.ack(1, 8)
    bench.hurry({2}, until=1)
    assert bench.sink.records == [(2, 8)], "the other user pays for the slow one"


def test_a_system_call_ends_it_and_blames_nobody(bench: Bench) -> None:
    bench.glance.disturbed = True
    bench.hurry({1}, until=1)
    assert bench.glance.looks == 1
    bench.glance.disturbed = False
    bench.ack(0, 7)
    bench.hurry({1}, until=1)
    assert bench.sink.records == [(1, 7)]


def test_an_end_and_garbage_are_reported_once(bench: Bench) -> None:
    bench.theirs[0].close()
    bench.glance.before = lambda: None
    bench.hub.hurry(frozenset({1}), lambda: bool(bench.sink.ended))
    send_frame(bench.theirs[1], b"rubbish", [])
    bench.hub.hurry(frozenset({2}), lambda: len(bench.sink.ended) > 1)
    assert [sid for sid, _ in bench.sink.ended] == [1, 2]


def test_unknown_and_too_many_are_left_to_their_readers(bench: Bench) -> None:
    bench.hurry({1, 99}, until=1)
    bench.hurry(set(range(1, 40)), until=1)
    bench.hurry(set(), until=0)
    assert bench.glance.looks == 0


def test_without_a_mount_nothing_waits(bench: Bench) -> None:
    bench.hub.glance = None
    bench.ack(0, 7)
    bench.hurry({1}, until=1)
    assert bench.sink.records == []
