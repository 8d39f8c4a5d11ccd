# SPDX-License-Identifier: GPL-2.0-or-later
"""Nonsense on the socket, wrong descriptors, floods: the session ends, and nobody else cares."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from actors import Actor, Cast, until
from bystander import PAGE, RAM, Bystander, fallocate, private_file
from mounts import Mounted, Mounter

from kvmsim.hostmem import HostMemory

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

LONG, SHORT = "t_ack=300", "t_ack=0.5"
KILLING = r"killing (\S+)\(\d+\): no acknowledgement"
OK, EOF = "sent", "eof|closed"


def raw(actor: Cast, mounted: Mounted) -> Actor:
    made = actor("raw_user", mounted.path / ".privfs/socket")
    made.expect("ready")
    return made


def registered(actor: Cast, mounted: Mounted, path: Path) -> tuple[Actor, int]:
    """A raw user of a file, and the file's inode number."""
    user = raw(actor, mounted)
    user.ask("hello", OK)
    user.ask("read", "got WELCOME 0")
    user.ask(f"register {path}", OK)
    return user, int(user.ask("read", r"got REGISTERED 0 1 \d+").split()[-1])


# --- the socket --------------------------------------------------------------------------------

#: What ends a session: commands of raw_user.py, the last one before the end.
ENDS = {
    "noise of one record": ["noise 40 1"],
    "noise of a hundred records": ["noise 4000 2"],
    "noise after HELLO": ["hello", "noise 40 3"],
    "half a record": ["noise 20 4"],
    "a byte too many": ["noise 41 5"],
    "an empty frame": ["frame"],
    "a frame that is too large": ["large"],
    "a fence that nobody knows": ["record HELLO 0 3 1 0 1"],
    "a userfaultfd that does not come": ["record HELLO 1 2 1 0 1"],
    "a userfaultfd without its flag": ["record HELLO 0 2 1 0 1"],
    "too many descriptors": ["fds 9"],
    "a descriptor that nobody wants": ["fds 1"],
    "GET before HELLO": ["record GET 0 0 1 7 0 1 0"],
    "ACK before HELLO": ["record ACK 0 0 0 0 0 0 1"],
    "BYE before HELLO": ["record BYE"],
    "a second HELLO": ["hello", "record HELLO 0 0 2 0 1"],
    "an old version": ["record HELLO 0 0 1 0 0"],
    "an ACK of nothing": ["hello", "record ACK 0 0 0 0 0 0 1"],
    "REGISTER without a descriptor": ["hello", "record REGISTER 1 0 1"],
    "REGISTER without its flag": ["hello", "record REGISTER 0 0 1"],
    "what only owners say": ["hello", "record INVALIDATE 0 1 0 7 0 1 1"],
    "an unknown flag": ["hello", "record GET 128 0 1 7 0 1 0"],
    "a field that must be 0": ["hello", "record ACK 0 1 0 0 0 0 1"],
    "an empty range": ["hello", "record GET 0 0 1 7 5 5 5"],
    "a negative range": ["hello", "record PUNCH 0 0 1 7 9 5"],
    "a range beyond 16 TiB": ["hello", "record PUNCH 0 0 1 7 0 0x100000001"],
    "a range that wraps": ["hello", "record ALLOCATE 0 0 1 7 0xffffffffffffffff 1"],
    "a page outside its window": ["hello", "record GET 0 0 1 7 0 1 1"],
    "a window that is too large": ["hello", "record GET 0 0 1 7 0 513 1"],
    "the end": ["hello", "record BYE"],
}


def test_nonsense_ends_the_session_and_nothing_else(
    mount: Mounter, actor: Cast, host: HostMemory, image: bytes
) -> None:
    mounted = mount()
    bystander = Bystander(host, image, mounted)
    try:
        for name, commands in ENDS.items():
            user = raw(actor, mounted)
            for command in commands:
                user.ask(command, OK)
            for _ in (*commands, "the end"):
                user.send("read")
            user.expect(EOF)
            user.close()
            users = [session["user"] for session in mounted.ask("status")["sessions"]]
            assert [user.split("(")[0] for user in users] == ["bystander"], name
            bystander.check()
    finally:
        bystander.close()


def test_refusals_leave_the_session_alive(mount: Mounter, actor: Cast) -> None:
    mounted = mount()
    user, ino = registered(actor, mounted, private_file(mounted, "ram"))
    for command, answer in {
        "record GET 0 0 7 99999 0 1 0": f"got PAGE {errno.ENOENT} 7",
        f"record GET 0 0 7 {ino} 4096 4097 4096": f"got PAGE {errno.EFBIG} 7",
        f"record GET 0 0 7 {ino} 0xffffffff 0x100000000 0xffffffff": f"got PAGE {errno.EFBIG} 7",
        "record PUNCH 0 0 7 99999 0 1": f"got REPLY {errno.ENOENT} 7",
        "record ALLOCATE 0 0 7 99999 0 1": f"got REPLY {errno.ENOENT} 7",
        "record UNREGISTER 0 0 7 99999": f"got REPLY {errno.ENOENT} 7",
        f"record ALLOCATE 0 0 7 {ino} 4095 4098": f"got REPLY {errno.EINVAL} 7",
        f"record PUNCH 0 0 7 {ino} 0 0x100000000": "got REPLY 0 7",
        f"register {mounted.path / 'ram'}": f"got REGISTERED {errno.EEXIST} 1",
        f"record GET 2 0 7 {ino} 0 1 0": "got PAGE 0 7",
    }.items():
        user.ask(command, OK)
        user.send("read")
        user.expect(answer)
    assert mounted.stat("ram")["allocated"] == PAGE


# --- descriptors -------------------------------------------------------------------------------


def test_only_an_open_private_file_can_be_registered(
    mount: Mounter, actor: Cast, host: HostMemory, image: bytes, tmp_path: Path
) -> None:
    mounted, other = mount(), mount()
    path = private_file(mounted, "ram")
    (mounted.path / "folder").mkdir()
    os.symlink("ram", mounted.path / "link")
    plain = tmp_path / "plain"
    plain.touch()
    bystander = Bystander(host, image, mounted)
    try:
        user = raw(actor, mounted)
        user.ask("hello", OK)
        user.ask("read", "got WELCOME 0")
        for command, code in {
            f"register {plain}": errno.EXDEV,
            f"register {private_file(other, 'ram')}": errno.EXDEV,
            "register /dev/null": errno.EXDEV,
            f"register {mounted.path / 'folder'} O_RDONLY": errno.EISDIR,
            f"register {mounted.path} O_RDONLY": errno.EISDIR,
            f"register {mounted.path / '.privfs/sessions'} O_RDONLY": errno.ENOENT,
            f"odd socket {path}": errno.EXDEV,
            f"odd pipe {path}": errno.EXDEV,
            f"odd memfd {path}": errno.EXDEV,
            f"odd epoll {path}": errno.EXDEV,
            f"odd self {path}": errno.EXDEV,
            f"odd path {path}": errno.EBADF,
            f"odd symlink {mounted.path / 'link'}": errno.EINVAL,
        }.items():
            user.ask(command, OK)
            answer = user.ask("read", r"got REGISTERED \d+")
            assert answer == f"got REGISTERED {code}", command
        user.ask(f"register {path}", OK)
        user.ask("read", "got REGISTERED 0")
        bystander.check()
    finally:
        bystander.close()


@pytest.mark.parametrize("kind", ["memfd", "socket", "pipe", "epoll", "self", "file", "path"])
def test_a_fence_is_a_userfaultfd(mount: Mounter, actor: Cast, kind: str) -> None:
    """Any other descriptor refuses the session; one of the mount itself is closed aside."""
    mounted = mount()
    path = private_file(mounted, "ram")
    user = raw(actor, mounted)
    user.ask(f"fence {kind} {path}", OK)
    user.ask("read", f"got WELCOME {errno.EINVAL}")
    user.send("read")
    user.expect(EOF)
    assert mounted.ask("status")["sessions"] == []


def test_a_reader_is_granted_no_stores(mount: Mounter, actor: Cast) -> None:
    mounted = mount()
    path = private_file(mounted, "ram")
    user = raw(actor, mounted)
    user.ask("hello", OK)
    user.ask("read", "got WELCOME 0")
    user.ask(f"register {path} O_RDONLY", OK)
    ino, writable = user.ask("read", r"got REGISTERED 0 1 \d+ \d").split()[-2:]
    assert writable == "0"
    for command, answer in {
        f"record GET 2 0 7 {ino} 0 1 0": f"got PAGE {errno.EACCES} 7",
        f"record PUNCH 0 0 7 {ino} 0 1": f"got REPLY {errno.EACCES} 7",
        f"record ALLOCATE 0 0 7 {ino} 0 1": f"got REPLY {errno.EACCES} 7",
        f"record GET 0 0 7 {ino} 0 1 0": "got PAGE 0 7",
    }.items():
        user.ask(command, OK)
        user.send("read")
        user.expect(answer)


# --- floods ------------------------------------------------------------------------------------


def test_a_registered_user_that_talks_nonsense_is_killed_by_the_next_punch(
    mount: Mounter, actor: Cast, host: HostMemory, image: bytes
) -> None:
    mounted = mount(SHORT, expected_log=KILLING)
    path = private_file(mounted, "ram")
    bystander = Bystander(host, image, mounted)
    try:
        for nonsense in ("noise 40 1", "flood 100000 ACK 0 0 0 0 0 0 77", "record BYE"):
            user, ino = registered(actor, mounted, path)
            user.ask(f"record GET 2 0 7 {ino} 0 1 0", OK)
            user.ask("read", "got EXTENT")
            user.expect("got PAGE 0")
            user.ask(nonsense, "sent|closed")
            states = [session["state"] for session in mounted.ask("status")["sessions"]]
            bystander.check()
            assert fallocate(path, 3, 0, PAGE) == 0
            assert user.wait() == -signal.SIGKILL, states
            bystander.check()
    finally:
        bystander.close()


def test_who_reads_nothing_is_cut_off(
    mount: Mounter, actor: Cast, host: HostMemory, image: bytes
) -> None:
    mounted = mount(LONG)
    path = private_file(mounted, "ram")
    bystander = Bystander(host, image, mounted)
    try:
        user, ino = registered(actor, mounted, path)
        user.send(f"flood 400000 GET 2 0 7 {ino} 0 1 0")
        bystander.check()
        user.expect("closed")
        bystander.check()
        user.kill()
        until(lambda: len(mounted.ask("status")["sessions"]) == 1, "end of the session")
        assert fallocate(path, 3, 0, PAGE) == 0
        bystander.check()
    finally:
        bystander.close()


def test_parked_faults_have_a_limit(
    mount: Mounter, actor: Cast, host: HostMemory, image: bytes
) -> None:
    mounted = mount(LONG)
    path = private_file(mounted, "ram")
    bystander = Bystander(host, image, mounted)
    try:
        held = actor("light_user", path, "held")
        held.expect("ready")
        caller = actor("storm", path, "0", "1", "1", "0")
        held.expect("zap 0 1")
        user, ino = registered(actor, mounted, path)
        patient = actor("light_user", path, "ack")
        until(lambda: len(mounted.stat("ram")["users"]) == 3, "registration")
        user.ask(f"flood 5000 GET 2 0 7 {ino} 0 1 0", "sent|closed")
        user.send("read")
        user.expect(EOF)
        bystander.check()
        held.send("ack")
        caller.expect("done 1 0")
        patient.expect("ready")
        bystander.check()
    finally:
        bystander.close()


def test_an_extent_that_died_while_its_descriptor_was_queued(
    mount: Mounter, actor: Cast, host: HostMemory, image: bytes
) -> None:
    """The user leaves the file without having read what it asked for."""
    mounted = mount(LONG)
    path = private_file(mounted, "ram")
    bystander = Bystander(host, image, mounted)
    try:
        for again in (False, True):
            user, ino = registered(actor, mounted, path)
            user.ask(f"flood 5000 GET 6 0 7 {ino} 0 1 0", OK)
            user.ask(f"record UNREGISTER 0 0 8 {ino}", OK)
            until(lambda: len(mounted.ask("status")["sessions"][-1]["files"]) == 0, "its leave")
            os.truncate(path, 0)
            os.truncate(path, RAM)
            if again:
                assert fallocate(path, 1, 0, PAGE) == 0
            for _ in range(1000):
                user.send("read")
            user.expect("got REPLY 0 8")
            bystander.check()
            user.close()
    finally:
        bystander.close()
