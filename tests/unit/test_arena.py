# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwemu import arena as arena_module
from hwemu import usercopy
from hwemu.arena import (
    Arena,
    ArenaError,
    ArenaFault,
    ArenaFullError,
    ArenaRangeError,
    new_table_pool,
)

PAGE = 4096
MIB = 1 << 20
_SYS_MEMFD_SECRET = 447  # asm/unistd_64.h


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("extent")
    os.ftruncate(fd, MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena()
    yield arena
    arena.close()


def flags_at(address: int) -> set[str]:
    """VmFlags of the mapping that holds ``address`` (proc_pid_smaps(5))."""
    inside = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            word = line.split()[0]
            if "-" in word and ":" not in word:
                low, high = (int(part, 16) for part in word.split("-"))
                inside = low <= address < high
            elif inside and line.startswith("VmFlags:"):
                return set(line.split()[1:])
    raise AssertionError(f"no mapping at {address:#x}")


def test_reservation_is_wide_and_costs_nothing(arena: Arena) -> None:
    assert arena.size == 512 << 30
    assert arena.hpa_base == 1 << 39
    assert flags_at(arena.address) >= {"nr", "dc", "dd", "rd", "wr"}


def test_placed_pages_are_the_files_pages(arena: Arena, memfd: int) -> None:
    hpa = arena.place(memfd, 4 * PAGE, 8 * PAGE)
    arena.write(hpa + 5, b"guest")
    assert os.pread(memfd, 5, 4 * PAGE + 5) == b"guest"
    os.pwrite(memfd, b"other", 11 * PAGE)
    assert arena.read(hpa + 7 * PAGE, 5) == b"other"
    assert flags_at(arena.address + hpa - arena.hpa_base) >= {"dc", "dd", "sh"}


@pytest.mark.parametrize("offset", [0, PAGE, 5 * MIB, (2 << 20) - PAGE])
def test_a_placement_lies_behind_2_mib_as_its_offset_does(arena: Arena, offset: int) -> None:
    fd = os.memfd_create("extent")
    os.ftruncate(fd, 16 * MIB)
    first = arena.place(fd, 0, PAGE)  # too short for a large leaf: anywhere
    hpa = arena.place(fd, offset, 4 * MIB)
    assert (hpa - offset) % (2 * MIB) == 0
    assert hpa > first
    assert (arena.address + hpa - arena.hpa_base - offset) % (2 * MIB) == 0
    after = arena.place(fd, 0, PAGE)
    assert after == hpa + 4 * MIB, "what alignment skips is used later, not now"
    os.close(fd)


def test_a_vacated_range_is_fresh_zeros_and_nobody_elses(arena: Arena, memfd: int) -> None:
    hpa = arena.place(memfd, 0, 2 * PAGE)
    arena.write(hpa, b"guest")
    arena.vacate(hpa, 2 * PAGE)
    assert arena.read(hpa, 5) == bytes(5)
    arena.write(hpa, b"other")
    assert os.pread(memfd, 5, 0) == b"guest"
    assert arena.statistics().placed_bytes == 2 * PAGE
    with pytest.raises(ArenaRangeError, match="vacate"):
        arena.vacate(hpa, 3 * PAGE)
    arena.retire(hpa, 2 * PAGE)
    assert arena.statistics().placed_bytes == 0


def test_what_is_covered_is_used_again_before_the_rest() -> None:
    arena = Arena(8 * PAGE)
    arena.covered = 4 * PAGE
    fd = os.memfd_create("extent")
    os.ftruncate(fd, PAGE)
    for _ in range(3):  # next-fit, but not past it
        first = arena.place(fd, 0, PAGE)
        second = arena.place(fd, 0, PAGE)
        assert max(first, second) < arena.hpa_base + 4 * PAGE
        for hpa in (first, second):
            arena.retire(hpa, PAGE)
    placed = {arena.place(fd, 0, PAGE) for _ in range(8)}
    assert len(placed) == 8
    with pytest.raises(ArenaFullError):
        arena.place(fd, 0, PAGE)
    arena.close()
    os.close(fd)


def test_what_alignment_skipped_is_not_lost() -> None:
    arena = Arena(8 * MIB)
    fd = os.memfd_create("extent")
    os.ftruncate(fd, 8 * MIB)
    arena.place(fd, 0, PAGE)
    arena.place(fd, 0, 2 * MIB)
    arena.place(fd, 0, 4 * MIB)
    with pytest.raises(ArenaFullError):
        arena.place(fd, 0, 2 * MIB)
    arena.place(fd, 0, MIB)
    arena.place(fd, MIB, MIB - PAGE)
    assert arena.statistics().placed_bytes == 8 * MIB
    arena.close()
    os.close(fd)


def test_retired_pages_are_fresh_zeros_and_the_file_keeps_its_own(arena: Arena, memfd: int) -> None:
    hpa = arena.place(memfd, 0, 4 * PAGE)
    arena.write(hpa, b"secret")
    view = arena.words()
    arena.retire(hpa, 4 * PAGE)
    at = (hpa - arena.hpa_base) // 8
    assert view[at] == 0
    view[at] = 0x1234  # a stale store of an engine reaches nobody
    assert os.pread(memfd, 6, 0) == b"secret"
    os.ftruncate(memfd, 0)  # and a dead file is no SIGBUS
    assert view[at] == 0x1234
    view.release()


def test_part_of_a_placement_can_be_retired(arena: Arena, memfd: int) -> None:
    hpa = arena.place(memfd, 0, 4 * PAGE)
    arena.retire(hpa + PAGE, PAGE)
    arena.write(hpa, b"a")
    arena.write(hpa + 2 * PAGE, b"b")
    with pytest.raises(ArenaFault, match="not inside one placed range"):
        arena.read(hpa + PAGE, 1)
    statistics = arena.statistics()
    assert (statistics.placed_bytes, statistics.placements) == (3 * PAGE, 2)
    arena.retire(hpa, PAGE)
    arena.retire(hpa + 2 * PAGE, 2 * PAGE)
    assert arena.statistics().placed_bytes == 0


def test_device_access_past_the_end_of_a_file_is_an_error_and_no_signal(
    arena: Arena, memfd: int
) -> None:
    hpa = arena.place(memfd, 0, 4 * PAGE)
    os.ftruncate(memfd, PAGE)
    assert arena.read(hpa, PAGE) == bytes(PAGE)
    for call in (lambda: arena.read(hpa + PAGE - 4, 8), lambda: arena.write(hpa + PAGE, b"x")):
        with pytest.raises(ArenaFault, match=f"{hpa + PAGE - 4:#x}|{hpa + PAGE:#x}") as caught:
            call()
        assert caught.value.length in (8, 1)


def test_device_access_outside_placements_is_refused(arena: Arena, memfd: int) -> None:
    hpa = arena.place(memfd, 0, 4 * PAGE)
    for bad, length in ((hpa - 1, 2), (hpa + 4 * PAGE - 1, 2), (0, 1), (1 << 41, 1)):
        with pytest.raises(ArenaFault, match="not inside one placed range"):
            arena.read(bad, length)
    assert arena.read(hpa, 0) == b""


def test_read_only_placement_refuses_device_writes(arena: Arena, memfd: int) -> None:
    hpa = arena.place(memfd, 0, PAGE, writable=False)
    os.pwrite(memfd, b"rom", 0)
    assert arena.read(hpa, 3) == b"rom"
    with pytest.raises(ArenaFault, match="could be reached"):
        arena.write(hpa, b"x")


@pytest.mark.parametrize(
    ("offset", "length"), [(1, PAGE), (0, 100), (0, 0), (-PAGE, PAGE), (0, -PAGE)]
)
def test_misaligned_places_are_named(arena: Arena, memfd: int, offset: int, length: int) -> None:
    with pytest.raises(ArenaRangeError, match="multiples of 4096"):
        arena.place(memfd, offset, length)
    assert arena.statistics().placements == 0


def test_a_failed_place_leaves_the_reservation_whole(arena: Arena) -> None:
    with pytest.raises(ArenaError, match="Bad file descriptor"):
        arena.place(987654, 0, PAGE)
    assert flags_at(arena.address) >= {"nr", "dc", "dd"}
    assert arena.statistics().placed_bytes == 0


def test_retire_of_what_is_not_placed_is_refused(arena: Arena, memfd: int) -> None:
    hpa = arena.place(memfd, 0, 2 * PAGE)
    for bad, length in ((hpa + 2 * PAGE, PAGE), (hpa, 3 * PAGE), (hpa, 0), (hpa + 1, PAGE)):
        with pytest.raises(ArenaRangeError, match="inside one placed range"):
            arena.retire(bad, length)
    assert arena.statistics().retires == 0


def test_full_arena_says_so_and_recovers(memfd: int) -> None:
    arena = Arena(size=4 * PAGE, hpa_base=1 << 30)
    try:
        first = arena.place(memfd, 0, 2 * PAGE)
        arena.place(memfd, 0, 2 * PAGE)
        with pytest.raises(ArenaFullError, match="retire ranges first"):
            arena.place(memfd, 0, PAGE)
        arena.retire(first, 2 * PAGE)
        assert arena.place(memfd, 0, 2 * PAGE) == first
    finally:
        arena.close()


def test_addresses_are_not_used_again_at_once(arena: Arena, memfd: int) -> None:
    first = arena.place(memfd, 0, PAGE)
    arena.retire(first, PAGE)
    assert arena.place(memfd, 0, PAGE) != first


def test_bad_shapes_and_closed_arenas(memfd: int) -> None:
    for size, base in ((PAGE + 1, 0), (0, 0), (PAGE, 1), (1 << 40, 1 << 39)):
        with pytest.raises(ArenaRangeError, match="arena"):
            Arena(size=size, hpa_base=base)
    arena = Arena(size=MIB, hpa_base=1 << 30)
    arena.close()
    arena.close()
    with pytest.raises(ArenaError, match="closed"):
        arena.place(memfd, 0, PAGE)


def test_table_pool_is_aligned_and_private() -> None:
    with new_table_pool(MIB) as pool:
        assert len(pool) == MIB
        pool[:4] = b"data"
    with pytest.raises(ArenaRangeError, match="whole"):
        new_table_pool(100)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6), st.integers(0, 9)), max_size=40))
def test_placements_never_overlap_and_space_returns(steps: list[tuple[bool, int, int]]) -> None:
    fd = os.memfd_create("extent")
    os.ftruncate(fd, 8 * PAGE)
    arena = Arena(size=32 * PAGE, hpa_base=1 << 30)
    try:
        live: list[tuple[int, int]] = []
        for place, pages, pick in steps:
            if place:
                try:
                    hpa = arena.place(fd, 0, pages * PAGE)
                except ArenaFullError:
                    continue
                assert all(hpa + pages * PAGE <= low or hpa >= high for low, high in live)
                live.append((hpa, hpa + pages * PAGE))
            elif live:
                low, high = live.pop(pick % len(live))
                arena.retire(low, high - low)
            placed = arena.statistics().placed_bytes
            assert placed == sum(high - low for low, high in live)
        for low, high in live:
            arena.retire(low, high - low)
        os.ftruncate(fd, 32 * PAGE)
        assert arena.place(fd, 0, 32 * PAGE) == 1 << 30, "all stretches joined again"
    finally:
        arena.close()
        os.close(fd)


# --- memory that cannot be pinned ---------------------------------------------------------------


@pytest.fixture
def secret() -> Iterator[int]:
    """A memfd_secret of 1 MiB."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYS_MEMFD_SECRET, os.O_CLOEXEC)
    if fd < 0:
        pytest.skip(f"memfd_secret(2): {os.strerror(ctypes.get_errno())}")
    os.ftruncate(fd, MIB)
    yield fd
    os.close(fd)


def test_devices_reach_memory_that_the_kernel_must_not_pin(arena: Arena, secret: int) -> None:
    hpa = arena.place(secret, 0, MIB)
    data = bytes(range(256)) * 700  # some chunks, the last one short
    arena.write(hpa + 3 * PAGE - 5, data)
    assert arena.read(hpa + 3 * PAGE - 5, len(data)) == data
    with mmap.mmap(secret, MIB) as memory:
        assert memory[3 * PAGE - 5 :][: len(data)] == data
    arena.retire(hpa, MIB)
    with pytest.raises(ArenaFault, match="not inside one placed range"):
        arena.read(hpa, 1)


def test_a_read_only_placement_of_it_refuses_device_writes(arena: Arena, secret: int) -> None:
    hpa = arena.place(secret, 0, MIB, writable=False)
    with pytest.raises(ArenaFault, match="only 0 bytes"):
        arena.write(hpa, b"x")
    assert arena.read(hpa, 4) == bytes(4)


def test_a_copy_ends_where_memory_does() -> None:
    with mmap.mmap(-1, 3 * PAGE) as pages:
        anchor = ctypes.c_char.from_buffer(pages)
        base = ctypes.addressof(anchor)
        pages[: 2 * PAGE] = b"a" * PAGE + b"b" * PAGE
        libc = ctypes.CDLL(None)
        assert libc.mprotect(ctypes.c_void_p(base + PAGE), PAGE, mmap.PROT_READ) == 0
        target = ctypes.create_string_buffer(2 * PAGE)
        before = os.listdir("/proc/self/fd")
        assert usercopy.copy(ctypes.addressof(target), base, 2 * PAGE) == 2 * PAGE
        assert target.raw == pages[: 2 * PAGE]
        assert usercopy.copy(base + PAGE, ctypes.addressof(target), 8) == 0
        assert libc.mprotect(ctypes.c_void_p(base + PAGE), PAGE, 0) == 0
        assert usercopy.copy(ctypes.addressof(target), base, 2 * PAGE) in range(PAGE + 1)
        assert usercopy.copy(ctypes.addressof(target), base + PAGE, 8) == 0
        assert os.listdir("/proc/self/fd") == before
        assert libc.mprotect(ctypes.c_void_p(base + PAGE), PAGE, 3) == 0
        del anchor


def test_locked_memory_that_runs_out_is_told(
    arena: Arena, memfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mmap(2) answers EAGAIN for nothing else."""
    real = arena_module._libc.mmap

    def refuse(address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
        if fd < 0:
            return int(real(address, length, prot, flags, fd, offset))
        ctypes.set_errno(errno.EAGAIN)
        assert arena_module._MAP_FAILED is not None
        return arena_module._MAP_FAILED

    monkeypatch.setattr(arena_module._libc, "mmap", refuse)
    with pytest.raises(ArenaError, match=r"ulimit -l"):
        arena.place(memfd, 0, PAGE)
