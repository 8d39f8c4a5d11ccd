# SPDX-License-Identifier: GPL-2.0-or-later
"""Several mounts, VMs and users at once: each gets its own zaps, and everybody those it shares."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torture
from actors import Cast, until
from mounts import Mounted, Mounter

from kvmsim.hostmem import HostMemory

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

PAGE = 4096
LOW = 2 << 20
RAM = 16 << 20
FREE = LOW + (8 << 20)  # gpa behind the guest kernel
SECOND = LOW + RAM  # gpa of a second file

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def private_file(mounted: Mounted, name: str, size: int = RAM) -> Path:
    path = mounted.path / name
    path.touch()
    os.truncate(path, size)
    return path


@contextmanager
def booted(
    host: HostMemory, image: bytes, *paths: Path, label: str = "vm0"
) -> Iterator[torture.Guest]:
    guest = torture.boot(host, image, *paths, label=label)
    try:
        yield guest
    finally:
        guest.close()


def punch(path: Path, offset: int, length: int = PAGE) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        assert _libc.fallocate(fd, 3, offset, length) == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(fd)


def poke(guest: torture.Guest, gpa: int, value: int) -> None:
    guest.console.command(f"poke {gpa:#x} {value:#x}")


def peek(guest: torture.Guest, gpa: int) -> int:
    return int(guest.console.command(f"peek {gpa:#x}").rpartition("value=")[2], 0)


def test_three_vms_on_two_mounts(mount: Mounter, host: HostMemory, image: bytes) -> None:
    """All stamp, all are punched at the same time, each from a thread of its own."""
    mounts = [mount(), mount()]
    paths = [private_file(mounts[i % 2], f"ram{i}") for i in range(3)]
    with ExitStack() as stack:
        guests = [
            stack.enter_context(booted(host, image, path, label=f"vm{i}"))
            for i, path in enumerate(paths)
        ]
        runs = [
            torture.Torture(guest, path, seed)
            for seed, (guest, path) in enumerate(zip(guests, paths, strict=True))
        ]
        for one in runs:
            one.start()
        threads = [threading.Thread(target=one.punch, args=[100]) for one in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        results = [one.stop() for one in runs]
    print(*results, sep="\n")
    for result in results:
        assert (result.punches, result.bad) == (100, 0)
        assert result.hot > 0
        assert result.decisive > 0
    for mounted in mounts:
        mounted.audit()
        assert mounted.ask("status")["kills"] == 0


def test_one_file_in_two_vms(mount: Mounter, host: HostMemory, image: bytes) -> None:
    mounted = mount()
    common = private_file(mounted, "common", 1 << 20)
    with (
        booted(host, image, private_file(mounted, "a"), common, label="a") as a,
        booted(host, image, private_file(mounted, "b"), common, label="b") as b,
    ):
        for page in (0, 7, 255):
            gpa = SECOND + page * PAGE
            poke(a, gpa, 0x1111 + page)
            assert peek(b, gpa) == 0x1111 + page, "the same private bytes"
            poke(b, gpa, 0x2222 + page)
            assert peek(a, gpa) == 0x2222 + page
            row = mounted.ask("map", ino=common.stat().st_ino, start=page)["rows"][0]
            assert {user.split("(")[0] for user in row["users"]} == {"a", "b"}
            punch(common, page * PAGE)
            assert mounted.stat("common")["mapped"] == 0
            assert (peek(a, gpa), peek(b, gpa)) == (0, 0)
            punch(common, page * PAGE)
        before = [one.emulator.running.statistics.shootdowns for one in (a, b)]
        poke(a, SECOND, 1)
        punch(common, 0)
        after = [one.emulator.running.statistics.shootdowns for one in (a, b)]
        assert [y - x for x, y in zip(before, after, strict=True)] == [1, 1]
        assert mounted.stat("common")["allocated"] == 0
        mounted.audit()


def test_punches_of_one_vm_leave_the_other_its_own(
    mount: Mounter, host: HostMemory, image: bytes
) -> None:
    mounted = mount()
    common = private_file(mounted, "common", 1 << 20)
    own = private_file(mounted, "a")
    with (
        booted(host, image, own, common, label="a") as a,
        booted(host, image, private_file(mounted, "b"), common, label="b") as b,
    ):
        poke(a, FREE, 5)
        poke(b, FREE, 6)
        poke(b, SECOND, 7)
        punch(own, FREE - LOW)
        assert (peek(a, FREE), peek(b, FREE), peek(a, SECOND)) == (0, 6, 7)
        assert b.emulator.running.statistics.shootdowns == 0


def test_the_death_of_one_user_leaves_the_file_to_the_other(
    mount: Mounter, host: HostMemory, image: bytes
) -> None:
    mounted = mount()
    common = private_file(mounted, "common", 1 << 20)
    with booted(host, image, private_file(mounted, "a"), common, label="a") as a:
        with booted(host, image, private_file(mounted, "b"), common, label="b") as b:
            poke(b, SECOND, 9)
        assert peek(a, SECOND) == 9
        punch(common, 0)
        assert peek(a, SECOND) == 0
        mounted.audit()


def test_a_vm_with_files_of_two_mounts(mount: Mounter, host: HostMemory, image: bytes) -> None:
    """Both files have the same inode number."""
    mounts = [mount(), mount()]
    paths = [private_file(mounted, "ram") for mounted in mounts]
    assert paths[0].stat().st_ino == paths[1].stat().st_ino
    with booted(host, image, *paths) as guest:
        for path, gpa in zip(paths, (FREE, SECOND), strict=True):
            poke(guest, FREE, 0x51)
            poke(guest, SECOND, 0x52)
            punch(path, gpa - LOW if gpa == FREE else 0)
            assert peek(guest, gpa) == 0
            other = SECOND if gpa == FREE else FREE
            assert peek(guest, other) in (0x51, 0x52)
        for mounted in mounts:
            assert [s["user"].split("(")[0] for s in mounted.ask("status")["sessions"]] == ["vm0"]
            mounted.audit()
    until(lambda: all(mounted.ask("status")["sessions"] == [] for mounted in mounts), "goodbye")


def test_a_vm_ends_when_one_of_its_two_mounts_is_killed(
    mount: Mounter, host: HostMemory, image: bytes
) -> None:
    first, second = mount(), mount()
    paths = [private_file(mounted, "ram") for mounted in (first, second)]
    with (
        booted(host, image, *paths) as guest,
        booted(host, image, private_file(first, "other"), label="other") as other,
    ):
        second.kill()
        outcome = guest.emulator.wait(60)
        assert outcome is not None
        assert "machine check: the owner of private memory is gone" in outcome.message
        punch(paths[0], 0, RAM)
        poke(other, FREE, 3)
        assert peek(other, FREE) == 3
    first.audit()


def test_sixteen_users_of_one_file(mount: Mounter, actor: Cast) -> None:
    mounted = mount("t_ack=300")
    path = private_file(mounted, "ram", 64 * PAGE)
    users = [actor("light_user", path, "ack", f"user{i}") for i in range(16)]
    for user in users:
        user.expect("ready")
    assert len(mounted.stat("ram")["users"]) == 16
    for first in (0, 0, 0):
        punch(path, first, 2 * PAGE)
        for user in users:
            user.expect("zap 0 2 PUNCH")
        assert mounted.stat("ram")["allocated"] == 0
        for user in users:
            user.send("get 0")
        for user in users:
            user.expect("granted 0 1")
        assert mounted.stat("ram")["allocated"] == PAGE, "one page for all"
    for user in users[:8]:
        user.send("leave")
    for user in users[:8]:
        user.expect("left")
        assert user.wait() == 0
    for user in users[8:12]:
        user.kill()
    until(lambda: len(mounted.ask("status")["sessions"]) == 4, "the deaths")
    punch(path, 0, 2 * PAGE)
    for user in users[12:]:
        user.expect("zap 0 2 PUNCH")
    mounted.audit()


def test_all_users_punch_at_once(mount: Mounter, actor: Cast) -> None:
    mounted = mount("t_ack=300")
    path = private_file(mounted, "ram", 64 * PAGE)
    users = [actor("light_user", path, "ack", f"user{i}") for i in range(6)]
    for user in users:
        user.expect("ready")
    for _ in range(20):
        for user in users:
            user.send("get 0")
            user.send("punch 0 2")
        for user in users:
            user.expect("punched 0")
    for user in users:
        user.send("leave")
    for user in users:
        user.expect("left")
    until(lambda: mounted.ask("status")["sessions"] == [], "goodbye")
    mounted.audit()
