# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs compact``: what a person sees of memory that moves, on real mounts."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mounts import Mounted, Mounter

from privfs import control
from privfs.notifier.lane import connect
from privfs.personality import PERSONALITIES

pytestmark = pytest.mark.fuse

MIB = 1 << 20
EXTENT = 64 * MIB
KEEP_SIZE, PUNCH = 1, 3
USER = Path(__file__).parents[1] / "integration" / "light_user.py"
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def private_file(mounted: Mounted, size: int, *held: tuple[int, int]) -> Path:
    """Make a file with memory at (offset, length)."""
    path = mounted.path / "ram"
    path.touch()
    os.truncate(path, size)
    for offset, length in held:
        fallocate(path, KEEP_SIZE, offset, length)
    return path


def punch(path: Path, offset: int, length: int) -> None:
    fallocate(path, PUNCH, offset, length)


def fallocate(path: Path, mode: int, offset: int, length: int) -> None:
    """As fallocate(1), which also calls fsync(2) and takes EINVAL from it for its own."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        failed = _libc.fallocate(fd, mode, offset, length)
        assert not failed, os.strerror(ctypes.get_errno())
    finally:
        os.close(fd)


def compacted(mounted: Mounted, path: Path, *options: str) -> dict[str, Any]:
    done = mounted.privfs("compact", "--json", *options, path)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("personality", PERSONALITIES)
def test_files_without_users_move(mount: Mounter, personality: str) -> None:
    mounted = mount(f"personality={personality}")
    path = private_file(mounted, 2 * EXTENT, (0, 3 * MIB), (EXTENT, MIB))
    found = compacted(mounted, path)
    assert (found["moved"], found["extents"], found["bytes"]) == (2, 2, 4 * MIB)
    assert found["total"] == found["bytes"]
    stat = mounted.stat("ram")
    assert (stat["allocated"], stat["held"], stat["operations"]) == (4 * MIB, 4 * MIB, [])
    status = mounted.ask("status")
    assert (status["moves"], status["extents"], status["memory"]["used"]) == (2, 2, 4 * MIB)
    mounted.audit()


def test_a_range_means_the_extents_that_it_reaches_into(mount: Mounter) -> None:
    mounted = mount()
    path = private_file(mounted, 3 * EXTENT, *((i * EXTENT, MIB) for i in range(3)))
    assert compacted(mounted, path, "--range", "64M:4K")["moved"] == 1
    assert compacted(mounted, path, "--range", "60M:8M")["moved"] == 2
    assert compacted(mounted, path, "--range", "128M:")["moved"] == 1
    for wrong in ("64M", "4K:0", "x:1M", "1M:16T", ":-1"):
        done = mounted.privfs("compact", "--range", wrong, path)
        assert done.returncode == 2, wrong
        assert "write OFFSET:LENGTH" in done.stderr


def test_empty_extents_end_and_give_their_descriptor_back(mount: Mounter) -> None:
    mounted = mount()
    path = private_file(mounted, 2 * EXTENT, (0, MIB), (EXTENT, MIB))
    punch(path, EXTENT, MIB)
    assert mounted.ask("status")["extents"] == 2
    said = mounted.privfs("compact", path).stdout
    assert f"{path}: 1M in 1 extents moved, 1 empty ones ended, in " in said
    assert mounted.ask("status")["extents"] == 1
    assert compacted(mounted, path)["extents"] == 1


def test_without_room_for_a_second_copy_nothing_moves(mount: Mounter) -> None:
    mounted = mount("size=10M")
    path = private_file(mounted, EXTENT, (0, 6 * MIB))
    done = mounted.privfs("compact", path)
    assert done.returncode == 1
    assert "1536 pages wanted, 1024 of 2560 left: punch holes" in done.stderr
    assert "the mount holds it twice" in done.stderr
    assert "(moved before: 0 of 1 extents)" in done.stderr
    assert mounted.ask("status")["moves"] == 0
    punch(path, 5 * MIB, MIB)
    assert compacted(mounted, path)["bytes"] == 5 * MIB


def test_users_get_the_new_extents_and_unmovable_ones_are_named(mount: Mounter) -> None:
    mounted = mount()
    path = private_file(mounted, EXTENT, (0, MIB))
    with subprocess.Popen(
        [sys.executable, USER, path, "ack"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()},
    ) as user:  # fmt: skip
        assert user.stdout is not None
        try:
            assert "ready\n" in iter(user.stdout.readline, "")
            done = mounted.privfs("compact", path)
            assert done.returncode == 1
            assert "MEMFILE_F_UNMOVABLE" in done.stderr
            assert f"({user.pid}) asked" in done.stderr
        finally:
            user.kill()


def test_events_tell_of_moves(mount: Mounter) -> None:
    mounted = mount()
    path = private_file(mounted, EXTENT, (0, MIB))
    with listening(mounted) as events:
        compacted(mounted, path)
        told = {}
        for line in events.stdout or ():
            event = json.loads(line)
            told[event["event"]] = event
            if event["event"] == "free":
                break
    assert list(told)[-3:] == ["copy", "move", "free"]
    move = told["move"]
    assert (move["extent"], move["pages"], move["start"], move["end"]) == (0, 256, 0, EXTENT)
    assert move["to"] != move["from"]


@contextmanager
def listening(mounted: Mounted) -> Any:
    """Listen to a mount; a first event has been told."""
    command = [sys.executable, "-u", "-m", "privfs", "events", "--json", str(mounted.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            knock = mounted.path / "knock"
            knock.touch()
            os.set_blocking(process.stdout.fileno(), False)
            while not process.stdout.readline():
                os.truncate(knock, 4096)
            os.set_blocking(process.stdout.fileno(), True)
            yield process
        finally:
            process.kill()


def test_who_leaves_the_question_leaves_the_extent_where_it_is(mount: Mounter) -> None:
    """As Ctrl-C does; what was moved before stays moved."""
    mounted = mount()
    path = private_file(mounted, 8 * EXTENT, *((i * EXTENT, EXTENT) for i in range(8)))
    ask = {"ask": "compact", "ino": path.stat().st_ino}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        connect(sock, str(mounted.path / control.SOCKET))
        sock.sendall(json.dumps(ask).encode() + b"\n")
        assert b"progress" in sock.recv(65536)
    compacted(mounted, path, "--range", "448M:64M")  # queues behind what is under way
    assert mounted.stat("ram")["operations"] == []
    status = mounted.ask("status")
    assert status["moves"] < 9
    assert (status["extents"], status["memory"]["used"]) == (8, 8 * EXTENT)
    mounted.audit()


@pytest.mark.parametrize(
    ("question", "why"),
    [
        ({"ino": 99999}, "no private file"),
        ({"ino": "x"}, "must be a number"),
        ({"start": 5, "end": 5}, "no pages"),
        ({"start": None}, "must be a number"),
        ({}, "must be a number|no private file"),
    ],
)
def test_questions_that_make_no_sense(mount: Mounter, question: dict[str, Any], why: str) -> None:
    mounted = mount()
    path = private_file(mounted, EXTENT, (0, MIB))
    ask = {"ask": "compact", **({"ino": path.stat().st_ino} if question else {}), **question}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        connect(sock, str(mounted.path / control.SOCKET))
        sock.sendall(json.dumps(ask).encode() + b"\n")
        reply = json.loads(sock.makefile("rb").readline())
    assert any(part in reply["error"] for part in why.split("|")), reply
    assert mounted.ask("status")["moves"] == 0


def test_secret_memory_stays_where_it_is(mount: Mounter) -> None:
    mounted = mount("backing=secretmem") if _secretmem() else pytest.skip("no memfd_secret here")
    path = private_file(mounted, 4 * MIB, (0, 2 * MIB))
    done = mounted.privfs("compact", path)
    assert done.returncode == 1
    assert "the kernel never moves secret memory" in done.stderr
    mounted.audit()


def _secretmem() -> bool:
    from privfs.backing import StoreError, choose

    try:
        choose("secretmem")
    except StoreError:
        return False
    return True
