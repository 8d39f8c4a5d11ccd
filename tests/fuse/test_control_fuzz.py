# SPDX-License-Identifier: GPL-2.0-or-later
"""Anything at all on ``.privfs/control``: one answer a line, no task and no descriptor left."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from mounts import Mounted, Mounter

from privfs import control
from privfs.personality import RESIZABLE
from privfs.service import Service

SETTLE_SECONDS = 20
INFO = control.MountInfo("/nowhere", 1, "direct_io", 0, {})
INO = 7

#: What a random line is unlikely to be.
LINES = [
    b"", b" ", b"\0", b"{}", b"[]", b"null", b"1e999", b"NaN", b"-Infinity", b'"ask"',
    b"[" * 60_000, b'{"ask":' * 9_000, b"9" * 5_000, b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}",
    b"\xed\xa0\x80",
    b'{"ask": ["map"]}', b'{"ask": {"map": 1}}', b'{"ask": null}', b'{"ask": "events "}',
    b'{"ask": "map"}', b'{"ask": "map", "ino": true}', b'{"ask": "map", "ino": [7]}',
    b'{"ask": "map", "ino": 7, "start": -1}', b'{"ask": "map", "ino": 7, "start": 1e400}',
    b'{"ask": "map", "ino": 7, "start": NaN}', b'{"ask": "map", "ino": 7, "start": "0x1"}',
    b'{"ask": "map", "ino": 7, "start": 4294967295}',
    b'{"ask": "map", "ino": 7, "start": 4294967296}',
    b'{"ask": "map", "ino": 7, "start": 18446744073709551616}', b'{"ask": "stat", "ino": 7.0}',
    b'{"ask": "seal", "ino": 7}', b'{"ask": "seal", "ino": 7, "seals": null}',
    b'{"ask": "seal", "ino": 7, "seals": -1}', b'{"ask": "seal", "ino": 7, "seals": 1e300}',
    b'{"ask": "seal", "ino": 7, "seals": 4294967296}', b'{"ask": "status", "ask": "audit"}',
    b'{"ask": "status", "\\ud800": "\\udfff"}', b'{"ask": "audit", "ino": {}}',
]  # fmt: skip


def lines(seed: int, count: int) -> Iterator[bytes]:
    """Yield lines without their newline: noise, JSON of the right shape, and damaged questions."""
    chance = random.Random(seed)
    yield from LINES

    def value(depth: int = 0) -> Any:
        match chance.randrange(8 if depth < 3 else 6):
            case 0:
                return chance.choice([None, True, False, 0.5, 1e308])
            case 1:
                return chance.choice([0, -1, INO, 1 << 32, 1 << 63, -(1 << 64), 1 << 200])
            case 2 | 3:
                return chance.choice([*control.QUESTIONS, "", "\ud800", "x" * 300])
            case 4 | 5:
                return chance.randrange(100)
            case 6:
                return [value(depth + 1) for _ in range(chance.randrange(4))]
            case _:
                return {str(value(3)): value(depth + 1) for _ in range(chance.randrange(4))}

    for _ in range(count):
        question = {"ask": chance.choice([*control.QUESTIONS])}
        question |= {key: value() for key in ("ino", "start", "seals") if chance.randrange(4)}
        text = json.dumps(chance.choice([question, question, question, value()])).encode()
        match chance.randrange(4):
            case 0:
                yield chance.randbytes(chance.randrange(200)).replace(b"\n", b"")
            case 1:
                position = chance.randrange(len(text) + 1)
                yield text[:position] + chance.randbytes(2).replace(b"\n", b"") + text[position:]
            case _:
                yield text


def service() -> Service:
    made = Service(RESIZABLE, 1024)
    made.owner.create(INO)
    return made


@pytest.mark.parametrize("seed", range(4))
def test_every_line_has_an_answer_of_one_line(seed: int) -> None:
    about = service()
    for line in lines(seed, 2000):
        reply = control.answer(about, INFO, line)
        assert reply.endswith(b"\n"), line
        assert reply.count(b"\n") == 1, line
        found = json.loads(reply)
        assert "ok" in found or (found["errno"] and found["error"]), line


def below(task: trio.lowlevel.Task) -> int:
    """Return how many tasks there are below one."""
    children = [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return len(children) + sum(below(child) for child in children)


def test_no_task_outlives_its_asker(tmp_path: Path) -> None:
    place = os.fspath(tmp_path / "control")

    async def abuse(kind: int, about: list[bytes]) -> None:
        stream = await trio.open_unix_socket(place)
        with contextlib.suppress(trio.BrokenResourceError):  # the mount may hang up, too
            async with stream:
                await send(stream, kind, about)

    async def send(stream: trio.SocketStream, kind: int, about: list[bytes]) -> None:
        text = b"\n".join(about) + b"\n"
        match kind % 6:
            case 0:  # asks, and leaves without an answer
                await stream.send_all(text)
            case 1:  # leaves in the middle of a line
                await stream.send_all(text[: len(text) // 2])
            case 2:  # says that it has no more questions, and reads the answers
                await stream.send_all(about[0] + b"\n")
                await stream.send_eof()
                while await stream.receive_some():
                    pass
            case 3:  # a line without an end
                while True:
                    await stream.send_all(b"x" * 10_000)
            case 4:  # hears of events, and leaves
                await stream.send_all(b'{"ask": "events", "faults": [1]}\n' + text)
            case _:  # says nothing
                pass

    async def main() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
            listener.bind(place)
            listener.listen(64)
            about = service()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(control.serve, about, INFO, listener)
                await trio.testing.wait_all_tasks_blocked()
                (server,) = nursery.child_tasks
                before = below(server)
                asked = list(lines(0, 600))
                async with trio.open_nursery() as askers:
                    for kind in range(120):
                        askers.start_soon(abuse, kind, asked[kind * 5 : kind * 5 + 5])
                with trio.fail_after(SETTLE_SECONDS):
                    while below(server) != before:
                        await trio.testing.wait_all_tasks_blocked()
                assert not about.events.wanted
                nursery.cancel_scope.cancel()

    trio.run(main)


def descriptors(mounted: Mounted) -> int:
    return len(os.listdir(f"/proc/{mounted.process.pid}/fd"))


@pytest.mark.fuse
def test_a_mount_lives_on(mount: Mounter) -> None:
    mounted = mount()
    mounted.ask("status")
    before = descriptors(mounted)
    for number, line in enumerate(lines(5, 300)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asker:
            asker.settimeout(SETTLE_SECONDS)
            asker.connect(os.fspath(mounted.path / control.SOCKET))
            asker.sendall(line + b"\n" * (number % 3 > 0))
            if number % 3 == 1:
                with asker.makefile("rb") as stream:
                    assert json.loads(stream.readline()), line
    assert mounted.ask("status")["pid"] == mounted.process.pid
    until = time.monotonic() + SETTLE_SECONDS
    while descriptors(mounted) > before:
        assert time.monotonic() < until, "descriptors are left"
    mounted.audit()
