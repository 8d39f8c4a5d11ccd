# SPDX-License-Identifier: GPL-2.0-or-later
"""What a hub hears before its tasks get their turn."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import trio

from privfs.notifier.fds import Peer
from privfs.notifier.link import Hub
from privfs.notifier.wire import VERSION, Op, Record, pack


class Sink:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.sids: list[int] = []
        self.seqs: list[int] = []
        self.ends: list[str] = []

    def connected(self, sid: int, peer: Peer) -> None:
        self.sids.append(sid)

    def received(self, sid: int, record: Record, fd: int | None) -> None:
        self.seqs.append(record.seq)

    def broken(self, sid: int, why: str) -> None:
        self.ends.append(why)

    def exited(self, sid: int) -> None:
        raise AssertionError("nobody dies here")


def ack(seq: int) -> bytes:
    return pack([Record(Op.ACK, seq=seq)])


def test_what_was_said_is_heard_at_once_in_order(tmp_path: Path) -> None:
    sink = Sink()
    hub = Hub(sink, lambda *_: None)

    async def main() -> None:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as listener,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as user,
        ):
            listener.bind(os.fspath(tmp_path / "socket"))
            listener.listen()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hub.serve, listener)
                user.connect(os.fspath(tmp_path / "socket"))
                user.send(pack([Record(Op.HELLO, req=1, start=VERSION, seq=7)]))
                with trio.fail_after(20):
                    while not sink.seqs:
                        await trio.lowlevel.checkpoint()
                for seq in range(1, 100):
                    user.send(ack(seq))
                hub.hear(frozenset(sink.sids))  # no checkpoint: the reader has had no turn
                assert sink.seqs == [7, *range(1, 100)]
                hub.hear(frozenset({*sink.sids, 99}))
                user.close()
                hub.hear(frozenset(sink.sids))
                assert sink.ends == ["the socket was closed without BYE"]
                nursery.cancel_scope.cancel()

    trio.run(main)
