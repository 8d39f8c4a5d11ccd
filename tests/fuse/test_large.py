# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of up to 16 TiB, many files, many operations: what they cost, and where they end."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from mounts import Mounted, Mounter

from privfs.cli.show import whole_map
from privfs.machine import Machine

pytestmark = pytest.mark.fuse

PAGE = 4096
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
LARGEST = 16 * TIB
KEEP_SIZE, PUNCH, ZERO_RANGE = 1, 3, 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """Call fallocate(2) and return its errno."""
    return ctypes.get_errno() if _libc.fallocate(fd, mode, offset, length) else 0


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def used(mounted: Mounted) -> int:
    """Return what df shows as used, in bytes."""
    place = os.statvfs(mounted.path)
    return (place.f_blocks - place.f_bfree) * place.f_frsize


def daemon(mounted: Mounted) -> psutil.Process:
    return psutil.Process(mounted.process.pid)


def extents(mounted: Mounted) -> int:
    """Return how many extents are alive; root can see that each is one descriptor."""
    count = int(mounted.ask("status")["extents"])
    if os.geteuid() == 0:  # the daemon is not dumpable: its descriptors are no one else's business
        links = [_link(entry) for entry in Path(f"/proc/{mounted.process.pid}/fd").iterdir()]
        assert sum(link.startswith("/memfd:privfs") for link in links) == count
    return count


def _link(entry: Path) -> str:
    try:
        return os.readlink(entry)
    except FileNotFoundError:
        return ""


def rows(mounted: Mounted, name: str = "f") -> list[tuple[int, int, str]]:
    """Return what ``privfs map`` shows."""
    found = whole_map(str(mounted.path / name))["rows"]
    return [(row["start"], row["end"], row["state"]) for row in found]


def held(mounted: Mounted, name: str = "f") -> int:
    """Return the memory of a file, which all counts agree about."""
    counts = mounted.stat(name)
    assert counts["held"] == counts["allocated"] == os.stat(mounted.path / name).st_blocks * 512
    return int(counts["held"])


# --- large files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [2 * GIB - PAGE, 2 * GIB, 2 * GIB + PAGE, 4 * GIB + PAGE, 8 * TIB, LARGEST - PAGE]
)
@pytest.mark.parametrize("personality", ["resizable", "guest_memfd"])
def test_sizes_past_every_power(mount: Mounter, personality: str, size: int) -> None:
    mounted = mount(f"personality={personality}")
    with opened(mounted.path / "f") as fd:
        os.ftruncate(fd, size)
        assert os.fstat(fd).st_size == os.stat(mounted.path / "f").st_size == size
        assert fallocate(fd, KEEP_SIZE, size - PAGE, PAGE) == 0
        assert fallocate(fd, KEEP_SIZE, size, PAGE) == errno.EINVAL
        assert rows(mounted) == [(0, size - PAGE, "hole"), (size - PAGE, size, "allocated")]
        assert held(mounted) == PAGE
        assert fallocate(fd, PUNCH, 0, size) == 0
        assert held(mounted) == 0
    mounted.audit()


def test_the_largest_file(mount: Mounter) -> None:
    mounted = mount("size=64M")
    with opened(mounted.path / "f") as fd:
        os.ftruncate(fd, LARGEST)
        assert os.fstat(fd).st_size == LARGEST
        assert fallocate(fd, 0, LARGEST - MIB, MIB) == 0
        assert fallocate(fd, KEEP_SIZE, 0, MIB) == 0
        assert os.lseek(fd, MIB, os.SEEK_DATA) == LARGEST - MIB
        assert os.lseek(fd, LARGEST - MIB, os.SEEK_HOLE) == LARGEST
        assert os.lseek(fd, 0, os.SEEK_END) == LARGEST
        assert [row[2] for row in rows(mounted)] == ["allocated", "hole", "allocated"]
        assert mounted.stat("f")["extents"] == 2
        for offset, length in (
            (LARGEST, PAGE),
            (LARGEST - PAGE, 2 * PAGE),
            ((1 << 63) - 2 * PAGE, PAGE),
        ):
            assert fallocate(fd, 0, offset, length) == errno.EFBIG
        for size in (LARGEST + PAGE, 1 << 62, (1 << 63) - PAGE):
            with pytest.raises(OSError) as caught:
                os.ftruncate(fd, size)
            assert caught.value.errno == errno.EFBIG
        assert fallocate(fd, 0, 0, LARGEST) == errno.ENOSPC
        assert fallocate(fd, ZERO_RANGE, 0, LARGEST) == errno.ENOSPC
        assert os.fstat(fd).st_size == LARGEST
        assert held(mounted) == used(mounted) == 2 * MIB
        assert fallocate(fd, PUNCH, 0, LARGEST) == 0
        assert held(mounted) == used(mounted) == 0
        os.ftruncate(fd, 0)
        assert mounted.stat("f")["extents"] == 0
    mounted.audit()


def test_each_extent_of_the_largest_file_is_one_descriptor(mount: Mounter) -> None:
    mounted = mount("size=64M")
    with opened(mounted.path / "f") as fd:
        os.ftruncate(fd, LARGEST)
        starts = [index * 64 * MIB for index in range(64)] + [4 * GIB << k for k in range(12)]
        for start, end in zip(starts, [*starts[1:], LARGEST], strict=True):
            assert fallocate(fd, KEEP_SIZE, start, PAGE) == 0
            assert fallocate(fd, KEEP_SIZE, end - PAGE, PAGE) == 0
        assert mounted.stat("f")["extents"] == extents(mounted) == 76
        assert held(mounted) == 2 * 76 * PAGE
        mounted.audit()
        os.ftruncate(fd, 4 * GIB)
        assert extents(mounted) == 64
        assert held(mounted) == 2 * 64 * PAGE
        os.ftruncate(fd, 0)
        assert extents(mounted) == 0
    mounted.audit()


def test_memory_past_two_gibibytes_comes_and_goes(mount: Mounter) -> None:
    length = 2 * GIB + 64 * MIB
    if Machine().room(0) * PAGE < length + 256 * MIB:
        pytest.skip(f"needs {(length >> 20) + 256} MiB of memory")
    mounted = mount("size=2560M")
    process = daemon(mounted)
    with opened(mounted.path / "f") as fd:
        assert fallocate(fd, 0, 0, PAGE) == 0
        before = process.memory_info().rss
        assert fallocate(fd, 0, 0, length) == 0
        assert held(mounted) == used(mounted) == length
        assert rows(mounted) == [(0, length, "allocated")]
        assert fallocate(fd, PUNCH, 64 * MIB, length - 128 * MIB) == 0
        assert held(mounted) == used(mounted) == 128 * MIB
        mounted.audit()
        # The daemon keeps books; the memory itself is nobody's.
        assert process.memory_info().rss - before < 16 * MIB


def test_books_grow_with_what_is_held_and_not_with_sizes(mount: Mounter) -> None:
    """Half a gibibyte in single pages is the worst that a bitmap meets: 8 KiB for each 65536."""
    mounted = mount("size=64M")
    process = daemon(mounted)
    for index in range(64):
        with opened(mounted.path / f"warm{index}"):
            os.truncate(mounted.path / f"warm{index}", LARGEST)
    before = process.memory_info().rss
    with opened(mounted.path / "f") as fd:
        os.ftruncate(fd, LARGEST)
        for page in range(0, 16384, 2):
            assert fallocate(fd, KEEP_SIZE, page * PAGE, PAGE) == 0
        assert held(mounted) == 8192 * PAGE
        assert len(rows(mounted)) == 16384
        assert process.memory_info().rss - before < 24 * MIB
        mounted.audit()


# --- many files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count", [10_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_many_files(mount: Mounter, count: int) -> None:
    mounted = mount()
    process = daemon(mounted)
    with opened(mounted.path / "first"):
        before = process.memory_info().rss
    place = os.open(mounted.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for index in range(count):
            os.close(os.open(f"f{index}", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=place))
        assert len(os.listdir(place)) == count + 2
        assert mounted.ask("status")["files"] == count + 1
        assert (process.memory_info().rss - before) / count < 8 * KIB
        free = os.statvfs(mounted.path).f_ffree
        for index in range(0, count, 2):
            os.unlink(f"f{index}", dir_fd=place)
        assert os.statvfs(mounted.path).f_ffree == free + count // 2
        for index in range(1, count, 2):
            os.unlink(f"f{index}", dir_fd=place)
    finally:
        os.close(place)
    assert mounted.ask("status")["files"] == 1
    assert os.listdir(mounted.path) != []
    mounted.audit()


@pytest.fixture
def few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let mounts have 320 descriptors; return how many of them extents get."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nulimit -n 320\nexec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return 320 // 2


def test_files_hold_memory_as_far_as_descriptors_reach(
    mount: Mounter, few_descriptors: int
) -> None:
    mounted = mount("size=1G", expected_log="descriptors wanted, .* delete or truncate files, or")
    for index in range(few_descriptors + 10):
        with opened(mounted.path / f"f{index}") as fd:
            os.ftruncate(fd, PAGE)
            wanted = 0 if index < few_descriptors else errno.ENOSPC
            assert fallocate(fd, KEEP_SIZE, 0, PAGE) == wanted
    assert extents(mounted) == few_descriptors
    assert used(mounted) == few_descriptors * PAGE
    assert "descriptors wanted" in mounted.log()
    with opened(mounted.path / "f0") as fd, opened(mounted.path / "new") as new:
        assert fallocate(fd, 0, 0, 2 * PAGE) == 0  # in the extent that it has
        assert fallocate(new, 0, 0, PAGE) == errno.ENOSPC
        assert (os.fstat(new).st_size, os.fstat(new).st_blocks) == (0, 0)
        for index in range(1, 9):
            os.unlink(mounted.path / f"f{index}")
        _settled(mounted, (few_descriptors - 8 + 1) * PAGE)
        # Eight descriptors are free: nine extents are refused as a whole, eight fit.
        assert fallocate(new, 0, 0, 8 * 64 * MIB + PAGE) == errno.ENOSPC
        assert (os.fstat(new).st_size, os.fstat(new).st_blocks) == (0, 0)
        assert extents(mounted) == few_descriptors - 8
        os.ftruncate(new, TIB)
        for index in range(8):
            assert fallocate(new, KEEP_SIZE, index * 64 * MIB, PAGE) == 0
        assert fallocate(new, KEEP_SIZE, 8 * 64 * MIB - PAGE, 2 * PAGE) == errno.ENOSPC
        assert fallocate(new, KEEP_SIZE, 8 * 64 * MIB - PAGE, PAGE) == 0
        os.ftruncate(new, 0)
        assert fallocate(new, 0, 0, PAGE) == 0
    mounted.audit()
    assert mounted.ask("status")["files"] == few_descriptors + 10 - 8 + 1


def _settled(mounted: Mounted, expected: int) -> None:
    """Wait for FORGETs and RELEASEs: the kernel sends them when it likes."""
    for _ in range(1000):
        if used(mounted) == expected:
            return
        mounted.ask("status")
    assert used(mounted) == expected


# --- many operations -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_ten_thousand_operations_on_random_ranges(mount: Mounter, seed: int) -> None:
    """Half of them allocate, half give back; bitmap and memory agree after each hundred."""
    file_pages, budget = 128 * MIB // PAGE, 64 * MIB // PAGE
    mounted = mount(f"size={budget * PAGE}")
    dice = random.Random(seed)
    model = np.zeros(file_pages, dtype=bool)
    refusals = 0
    with opened(mounted.path / "f") as fd:
        os.ftruncate(fd, file_pages * PAGE)
        for number in range(10_000):
            start = dice.randrange(file_pages)
            pages = min(1 + int(dice.paretovariate(0.6)), file_pages - start, 4096)
            mode = dice.choice((0, KEEP_SIZE, PUNCH, PUNCH, ZERO_RANGE))
            there = model[start : start + pages]
            answer = fallocate(fd, mode, start * PAGE, pages * PAGE)
            if mode == PUNCH:
                there[:] = False
                assert answer == 0
            elif int(model.sum()) + pages - int(there.sum()) > budget:
                assert answer == errno.ENOSPC
                refusals += 1
            else:
                there[:] = True
                assert answer == 0
            if number % 100 == 99:
                mounted.audit()
                assert held(mounted) == used(mounted) == int(model.sum()) * PAGE
        shown = np.zeros(file_pages, dtype=bool)
        for low, high, state in rows(mounted):
            shown[low // PAGE : high // PAGE] = state == "allocated"
        assert (shown == model).all()
    print(f"{refusals} allocations did not fit")
