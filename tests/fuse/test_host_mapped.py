# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that the host may map (GUEST_MEMFD_FLAG_MMAP), with and without their pages."""

from __future__ import annotations

import errno
import json
import mmap
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_mapping import SIGBUS, fallocate, touch
from mounts import Mounted, Mounter

from privfs import control
from privfs.notifier.lane import connect
from privfs.personality import PAGE_SIZE as PAGE

pytestmark = pytest.mark.fuse

PAGES = 4
KEEP, PUNCH = 1, 3


@pytest.fixture
def mounted(mount: Mounter) -> Iterator[Mounted]:
    made = mount("personality=guest_memfd")
    if made.facts["mode"] != "passthrough":
        pytest.skip("no FUSE passthrough: needs root and Linux 6.9")
    yield made
    made.audit()


def make(mounted: Mounted, *, shared: bool, pages: int = PAGES) -> int:
    path = mounted.path / "file"
    os.mknod(path, stat.S_IFREG | 0o600)
    os.truncate(path, pages * PAGE)
    control.ask_file(path, "map_by_host", shared=shared)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    os.unlink(path)
    return fd


@pytest.fixture
def shared(mounted: Mounted) -> Iterator[int]:
    fd = make(mounted, shared=True)
    yield fd
    os.close(fd)


def compact(mounted: Mounted, fd: int) -> int:
    """Move a file that has no name any more; return the bytes that were moved."""
    ask = {"ask": "compact", "ino": os.fstat(fd).st_ino}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        connect(sock, str(mounted.path / control.SOCKET))
        sock.sendall(json.dumps(ask).encode() + b"\n")
        with sock.makefile("rb") as stream:
            reply = [json.loads(line) for line in stream][-1]
    if "ok" not in reply:
        raise control.ControlError(reply["errno"], reply["error"])
    return int(reply["ok"]["bytes"])


def touch_of(path: Path) -> int:
    fd = os.open(path, os.O_RDWR)
    try:
        return touch(fd, 0)
    finally:
        os.close(fd)


def refused(error: int, call: object, *arguments: object) -> None:
    assert callable(call)
    with pytest.raises(OSError) as raised:
        call(*arguments)
    assert raised.value.errno == error


def test_host_sees_what_it_stored_until_it_is_punched(shared: int) -> None:
    with mmap.mmap(shared, PAGES * PAGE) as memory:
        memory[:] = b"a" * len(memory)
        fallocate(shared, PUNCH, 1, 2)
        assert memory[PAGE : 2 * PAGE] == bytes(PAGE)
        assert memory[:PAGE] == b"a" * PAGE
        assert memory[2 * PAGE :] == b"a" * (PAGES - 2) * PAGE
        memory[PAGE] = 7
        fallocate(shared, KEEP, 0, PAGES)
        assert memory[PAGE] == 7, "what is allocated keeps its contents"
    assert touch(shared, 0, store=True) == 0
    with mmap.mmap(shared, PAGE) as memory:
        assert memory[0] == ord("x"), "another process maps the same pages"


def test_what_the_host_touches_is_counted(mounted: Mounted, shared: int) -> None:
    assert mounted.ask("status")["memory"]["private"] == 0
    with mmap.mmap(shared, PAGES * PAGE) as memory:
        memory[2 * PAGE] = 1
        assert os.fstat(shared).st_blocks == PAGE // 512
        fallocate(shared, PUNCH, 0, PAGES)
        assert os.fstat(shared).st_blocks == 0
        assert mounted.ask("status")["memory"]["used"] == 0


def test_madv_remove_is_a_punch(shared: int) -> None:
    with mmap.mmap(shared, PAGES * PAGE) as memory:
        memory[:] = b"b" * len(memory)
        memory.madvise(mmap.MADV_REMOVE, PAGE, PAGE)
        assert memory[PAGE : 2 * PAGE] == bytes(PAGE)
        assert memory[0] == ord("b")


def test_beyond_the_end_is_sigbus(shared: int) -> None:
    assert touch(shared, PAGES * PAGE, length=2 * PAGES * PAGE) == SIGBUS


def test_without_pages_every_touch_is_sigbus(mounted: Mounted) -> None:
    fd = make(mounted, shared=False)
    try:
        assert touch(fd, 0) == touch(fd, 3 * PAGE, store=True) == SIGBUS
        fallocate(fd, KEEP, 0, PAGES)
        assert touch(fd, 0) == SIGBUS, "allocated or not"
        assert os.fstat(fd).st_blocks == PAGES * PAGE // 512
    finally:
        os.close(fd)


@pytest.mark.parametrize("shared_pages", [False, True])
def test_everything_but_mmap_is_refused_as_ever(mounted: Mounted, shared_pages: bool) -> None:
    fd = make(mounted, shared=shared_pages)
    try:
        refused(errno.EINVAL, os.read, fd, 1)
        refused(errno.EINVAL, os.write, fd, b"x")
        refused(errno.EINVAL, os.ftruncate, fd, PAGE)
        refused(errno.EOPNOTSUPP, fallocate, fd, PUNCH | 4, 0, 1)
        rwx = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        refused(errno.EPERM, lambda: mmap.mmap(fd, PAGE, prot=rwx))
    finally:
        os.close(fd)


def test_a_file_is_asked_for_in_order(mounted: Mounted) -> None:
    path = mounted.path / "file"
    path.touch()
    refused(errno.EINVAL, lambda: control.ask_file(path, "map_by_host", shared=True))
    os.truncate(path, PAGE)
    with path.open("rb"):
        refused(errno.EBUSY, lambda: control.ask_file(path, "map_by_host", shared=True))
    control.ask_file(path, "map_by_host", shared=True)
    refused(errno.EBUSY, lambda: control.ask_file(path, "map_by_host", shared=True))
    assert mounted.ask("status")["host_mappable"] is True
    path.unlink()


def test_what_the_host_may_have_mapped_stays_where_it_is(mounted: Mounted, shared: int) -> None:
    """A mapping of the host's goes to the memfd itself: nothing could take it away."""
    with mmap.mmap(shared, PAGES * PAGE) as memory:
        memory[:] = b"d" * len(memory)
        with pytest.raises(control.ControlError, match="the host may have mapped") as caught:
            compact(mounted, shared)
        assert caught.value.errno == errno.EOPNOTSUPP
        memory[0] = ord("e")
        assert touch(shared, 0) == 0
        with mmap.mmap(shared, PAGE) as again:
            assert again[:2] == b"ed", "both see the same page"
    assert mounted.ask("status")["moves"] == 0
    assert os.fstat(shared).st_blocks == PAGES * PAGE // 512


def test_what_the_host_maps_without_pages_moves(mounted: Mounted) -> None:
    fd = make(mounted, shared=False)
    try:
        fallocate(fd, KEEP, 0, PAGES)
        with mmap.mmap(fd, PAGES * PAGE):
            assert compact(mounted, fd) == PAGES * PAGE
            assert touch(fd, 0) == SIGBUS
        assert os.fstat(fd).st_blocks == PAGES * PAGE // 512
    finally:
        os.close(fd)


def test_an_end_takes_the_pages_back(mounted: Mounted) -> None:
    fd = make(mounted, shared=True)
    with mmap.mmap(fd, PAGES * PAGE) as memory:
        memory[0] = 1
    os.close(fd)
    again = make(mounted, shared=True)
    with mmap.mmap(again, PAGE) as memory:
        assert memory[0] == 0
    os.close(again)


@pytest.mark.parametrize("options", [("personality=resizable",), ("personality=guest_memfd",)])
def test_mounts_that_cannot_say_so(mount: Mounter, options: tuple[str, ...]) -> None:
    extra = ("direct_io",) if "guest_memfd" in options[0] else ()
    made = mount(*options, *extra)
    path = made.path / "file"
    path.touch()
    os.truncate(path, PAGE)
    refused(errno.EOPNOTSUPP, lambda: control.ask_file(path, "map_by_host", shared=True))
    assert made.ask("status")["host_mappable"] is False
    assert touch_of(path) == errno.ENODEV
