# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
from collections.abc import Iterator

import pytest
from pyroaring import BitMap

from privfs.backing import Backing, BackingError
from privfs.extents import DOUBLING_START, MAX_PAGES, PAGE_SIZE, SMALL_EXTENT_PAGES

INO = 7
F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h


@pytest.fixture
def backing() -> Iterator[Backing]:
    backing = Backing()
    yield backing
    backing.close()
    assert backing.statistics().extents == 0


def touch(backing: Backing, page: int, value: bytes = b"x") -> None:
    """Write one byte through a mapping, as a user of the memory does."""
    extent = next(e for e in backing.extents(INO) if e.start <= page < e.end)
    offset = (page - extent.start) * PAGE_SIZE
    with mmap.mmap(extent.fd, PAGE_SIZE, offset=offset) as memory:
        memory[0:1] = value


def look(backing: Backing, page: int) -> bytes:
    extent = next(e for e in backing.extents(INO) if e.start <= page < e.end)
    return os.pread(extent.fd, 1, (page - extent.start) * PAGE_SIZE)


def test_allocation_holds_memory_and_creates_only_what_it_needs(backing: Backing) -> None:
    backing.allocate(INO, 3, 5)
    assert [e.index for e in backing.extents(INO)] == [0]
    assert backing.blocks(INO) == 2 * 8
    backing.allocate(INO, 2, 6)
    assert backing.blocks(INO) == 4 * 8


def test_allocation_keeps_contents(backing: Backing) -> None:
    backing.allocate(INO, 3, 4)
    touch(backing, 3, b"k")
    backing.allocate(INO, 0, 8)
    assert look(backing, 3) == b"k"
    assert look(backing, 4) == b"\0"


def test_allocation_crosses_extents_and_reaches_the_end(backing: Backing) -> None:
    backing.allocate(INO, SMALL_EXTENT_PAGES - 1, SMALL_EXTENT_PAGES + 2)
    backing.allocate(INO, DOUBLING_START - 1, DOUBLING_START + 1)
    backing.allocate(INO, MAX_PAGES - 1, MAX_PAGES)
    assert backing.blocks(INO) == 6 * 8
    assert [e.index for e in backing.extents(INO)] == [0, 1, 63, 64, 75]
    touch(backing, MAX_PAGES - 1)
    assert list(backing.resident(INO)) == [(MAX_PAGES - 1, MAX_PAGES)]


def test_files_do_not_share_memory(backing: Backing) -> None:
    backing.allocate(INO, 0, 1)
    backing.allocate(INO + 1, 0, 1)
    touch(backing, 0)
    assert os.pread(backing.fd(INO + 1, 0), 1, 0) == b"\0"
    backing.destroy(INO)
    assert backing.blocks(INO + 1) == 8


def test_punch_gives_memory_back_and_reads_zero_again(backing: Backing) -> None:
    backing.allocate(INO, 0, 8)
    touch(backing, 3, b"s")
    backing.punch(INO, 2, 5)
    assert backing.blocks(INO) == 5 * 8
    assert look(backing, 3) == b"\0"
    backing.punch(INO, 2, 5)
    backing.punch(INO + 1, 0, 100)
    assert backing.blocks(INO) == 5 * 8
    assert backing.extents(INO + 1) == []


def test_extents_are_sealed_for_ever(backing: Backing) -> None:
    backing.allocate(INO, 0, 1)
    fd = backing.fd(INO, 0)
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    assert seals & (fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL) == (
        fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    )
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    for seal in (fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_WRITE, F_SEAL_FUTURE_WRITE):
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, SMALL_EXTENT_PAGES * PAGE_SIZE + PAGE_SIZE)


def test_a_killed_extent_can_never_hold_memory_again(backing: Backing) -> None:
    backing.allocate(INO, 0, 2)
    user_fd = os.dup(backing.fd(INO, 0))
    try:
        backing.kill(INO, 0)
        assert os.fstat(user_fd).st_blocks == 0
        with pytest.raises(PermissionError):
            os.ftruncate(user_fd, PAGE_SIZE)
        with pytest.raises(PermissionError):
            os.posix_fallocate(user_fd, 0, PAGE_SIZE)
        with pytest.raises(PermissionError):
            os.pwrite(user_fd, b"x", 0)
    finally:
        os.close(user_fd)


def test_an_old_mapping_of_a_killed_extent_answers_sigbus(backing: Backing) -> None:
    """The kernel reads the mapping here: EFAULT where a touch of our own would be SIGBUS."""
    backing.allocate(INO, 0, 1)
    with mmap.mmap(backing.fd(INO, 0), PAGE_SIZE) as memory:
        memory[0:1] = b"x"
        backing.kill(INO, 0)
        read_end, write_end = os.pipe()
        try:
            with pytest.raises(OSError) as caught:
                os.write(write_end, memory)
            assert caught.value.errno == errno.EFAULT
        finally:
            os.close(read_end)
            os.close(write_end)


def test_a_new_extent_in_the_same_place_is_another_instance(backing: Backing) -> None:
    backing.allocate(INO, 0, 1)
    touch(backing, 0, b"o")
    old = backing.extent(INO, 0)
    backing.kill(INO, 0)
    backing.kill(INO, 0)
    with pytest.raises(BackingError) as caught:
        backing.fd(INO, 0)
    assert caught.value.errno == errno.ENOENT
    backing.allocate(INO, 0, 1)
    assert backing.extent(INO, 0).generation > old.generation
    assert look(backing, 0) == b"\0"


def test_destroy_and_close_leave_no_descriptor(backing: Backing) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for ino in range(3):
        backing.allocate(ino, SMALL_EXTENT_PAGES - 1, SMALL_EXTENT_PAGES + 1)
    statistics = backing.statistics()
    assert (statistics.files, statistics.extents) == (3, 6)
    assert statistics.bytes_held == 6 * PAGE_SIZE
    backing.destroy(1)
    assert backing.extents(1) == []
    assert backing.statistics().extents == 4
    backing.close()
    assert len(os.listdir("/proc/self/fd")) == before
    statistics = backing.statistics()
    assert (statistics.files, statistics.extents, statistics.extents_created) == (0, 0, 6)
    assert statistics.bytes_held == 0


def test_resident_shows_touched_pages_only_and_joins_extents(backing: Backing) -> None:
    backing.allocate(INO, 0, 10)
    assert list(backing.resident(INO)) == []
    backing.allocate(INO, SMALL_EXTENT_PAGES - 2, SMALL_EXTENT_PAGES + 2)
    for page in (1, 2, 5, SMALL_EXTENT_PAGES - 1, SMALL_EXTENT_PAGES):
        touch(backing, page)
    assert list(backing.resident(INO)) == [
        (1, 3),
        (5, 6),
        (SMALL_EXTENT_PAGES - 1, SMALL_EXTENT_PAGES + 1),
    ]


def test_a_page_allocated_twice_counts_as_touched(backing: Backing) -> None:
    backing.allocate(INO, 0, 4)
    backing.allocate(INO, 2, 6)
    assert list(backing.resident(INO)) == [(2, 4)]
    assert backing.blocks(INO) == 6 * 8


def bitmap_of(*ranges: tuple[int, int]) -> BitMap:
    bitmap = BitMap()
    for start, end in ranges:
        bitmap.add_range(start, end)
    return bitmap


def test_audit_is_content_with_honest_users(backing: Backing) -> None:
    backing.allocate(INO, 0, 10)
    touch(backing, 4)
    bitmap = bitmap_of((0, 10))
    assert backing.audit(INO, len(bitmap), bitmap.contains_range) == []
    backing.punch(INO, 3, 6)
    bitmap.remove_range(3, 6)
    assert backing.audit(INO, len(bitmap), bitmap.contains_range) == []
    assert backing.audit(INO + 1, 0, BitMap().contains_range) == []


def test_audit_finds_a_page_touched_after_its_punch(backing: Backing) -> None:
    backing.allocate(INO, 0, 10)
    for page in range(10):
        touch(backing, page)
    backing.punch(INO, 3, 6)
    bitmap = bitmap_of((0, 3), (6, 10))
    touch(backing, 4)
    touch(backing, 5)
    findings = backing.audit(INO, len(bitmap), bitmap.contains_range)
    assert [(f.name, f.ino) for f in findings] == [("reallocated", INO), ("held", INO)]
    assert (findings[0].start, findings[0].end) == (4, 10)


def test_audit_finds_memory_that_is_held_but_was_never_touched(backing: Backing) -> None:
    backing.allocate(INO, 0, 4)
    bitmap = bitmap_of((0, 3))
    assert [f.name for f in backing.audit(INO, 3, bitmap.contains_range)] == ["held"]


def test_audit_finds_memory_that_is_missing(backing: Backing) -> None:
    bitmap = bitmap_of((0, 3))
    assert [f.name for f in backing.audit(INO, 3, bitmap.contains_range)] == ["held"]


def test_the_extent_limit_is_a_clear_enospc_and_says_how_far_it_came() -> None:
    backing = Backing(extent_limit=1)
    try:
        with pytest.raises(BackingError, match="raise the limit on open files") as caught:
            backing.allocate(INO, SMALL_EXTENT_PAGES - 2, SMALL_EXTENT_PAGES + 2)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.completed == SMALL_EXTENT_PAGES
        assert backing.blocks(INO) == 2 * 8
        backing.kill(INO, 0)
        backing.allocate(INO, SMALL_EXTENT_PAGES, SMALL_EXTENT_PAGES + 1)
        assert backing.blocks(INO) == 8
    finally:
        backing.close()


def test_descriptors_that_run_out_in_the_kernel_are_the_same_error() -> None:
    backing = Backing(extent_limit=1 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(BackingError, match="raise the limit on open files") as caught:
            backing.allocate(INO, 0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.completed == 0
    assert backing.statistics().extents == 0


def test_the_default_limit_leaves_headroom() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert Backing().statistics().extent_limit < soft
