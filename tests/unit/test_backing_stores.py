# SPDX-License-Identifier: GPL-2.0-or-later
"""Stores of memory: which there are, which are refused and why, what each promises."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pyroaring import BitMap

from privfs.backing import Backing, StoreError, choose, default_size
from privfs.backing import hugetlb as hugetlb_module
from privfs.backing import shmem as shmem_module
from privfs.backing.shmem import HUGE_PAGE_SIZE, Shmem
from privfs.budget import Budget
from privfs.extents import PAGE_SIZE
from privfs.memfile import MemFile
from privfs.operation import Done, Fallocate, FaultIn, Perform, Resize
from privfs.personality import PERSONALITIES

MIB = 1 << 20
UNIT = HUGE_PAGE_SIZE // PAGE_SIZE
_MAP_FIXED = 0x10
_MADV_COLLAPSE = 25  # asm-generic/mman-common.h, Linux 6.1


# --- the choice --------------------------------------------------------------------------------


def setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    path = tmp_path / "shmem_enabled"
    path.write_text(text)
    monkeypatch.setattr(shmem_module, "SETTING", path)


@pytest.mark.parametrize("mode", ["never", "advise", "deny"])
@pytest.mark.parametrize("size", [0, PAGE_SIZE, HUGE_PAGE_SIZE])
def test_shmem_comes_in_two_sizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, size: int
) -> None:
    setting(monkeypatch, tmp_path, f"always within_size [{mode}] force")
    assert choose("shmem", size).page_size == (size or PAGE_SIZE)


@pytest.mark.parametrize("mode", ["always", "within_size", "force"])
def test_where_every_page_is_a_huge_one_only_huge_ones_are_handed_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    """Else a file of 4K pages holds up to 512 for each, and honest users look like liars."""
    setting(monkeypatch, tmp_path, f"never [{mode}] deny")
    with pytest.raises(StoreError, match="pagesize=2M") as caught:
        choose("shmem")
    assert caught.value.errno == errno.EOPNOTSUPP
    assert mode in str(caught.value)
    assert choose("shmem", HUGE_PAGE_SIZE).page_size == HUGE_PAGE_SIZE


def test_a_kernel_without_transparent_huge_pages_never_uses_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shmem_module, "SETTING", tmp_path / "missing")
    assert choose().page_size == PAGE_SIZE


@pytest.mark.parametrize(
    ("name", "size", "code", "words"),
    [
        ("shmem", 64 << 10, errno.EINVAL, "pagesize=64K: shmem has pages of 4K"),
        ("secretmem", 4096, errno.EINVAL, "pagesize=4K: secretmem comes in chunks of 2M to 64M"),
        ("secretmem", 128 << 20, errno.EINVAL, "in powers of two"),
        ("disk", 0, errno.EINVAL, "choose shmem or hugetlb or secretmem"),
        ("hugetlb", 1 << 30, errno.EINVAL, "pagesize=1G: memory comes in extents from 64M on"),
        ("hugetlb", 8 << 10, errno.EINVAL, "pagesize=8K: this kernel has huge pages of: "),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(
    name: str, size: int, code: int, words: str
) -> None:
    with pytest.raises(StoreError, match=words) as caught:
        choose(name, size)
    assert caught.value.errno == code


@pytest.fixture
def empty_pool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A kernel's pool of huge pages as sysfs shows it, with none in it."""
    pool = tmp_path / "hugepages-2048kB"
    pool.mkdir()
    for name in ("nr_hugepages", "nr_overcommit_hugepages"):
        (pool / name).write_text("0\n")
    monkeypatch.setattr(hugetlb_module, "POOLS", tmp_path)
    return pool


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
def test_an_empty_pool_is_told_with_the_command_that_fills_it(
    monkeypatch: pytest.MonkeyPatch, empty_pool: Path, code: int
) -> None:
    def refuse(self: object, fd: int, offset: int, length: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(hugetlb_module.Hugetlb, "create", lambda *a: os.open(os.devnull, os.O_RDWR))
    monkeypatch.setattr(hugetlb_module.Hugetlb, "allocate", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(StoreError, match="nr_hugepages") as caught:
        choose("hugetlb")
    assert caught.value.errno == code
    assert os.listdir("/proc/self/fd") == before


def test_the_budget_of_huge_pages_is_their_pool(empty_pool: Path) -> None:
    assert default_size("hugetlb") == 0
    (empty_pool / "nr_hugepages").write_text("3\n")
    (empty_pool / "nr_overcommit_hugepages").write_text("2\n")
    assert default_size("hugetlb") == 5 * HUGE_PAGE_SIZE


# --- threads -----------------------------------------------------------------------------------


def test_what_is_counted_is_not_closed_meanwhile() -> None:
    """A large file is freed in a worker thread while the loop answers ``privfs status``."""
    closed_early: list[bool] = []

    class Slow(Shmem):
        def held(self, fd: int) -> int:
            killer = threading.Thread(target=backing.kill, args=(7, 0))
            killer.start()
            killer.join(0.1)  # it cannot finish before we return
            closed_early.append(not killer.is_alive())
            killers.append(killer)
            return super().held(fd)

    killers: list[threading.Thread] = []
    backing = Backing(store=Slow())
    backing.allocate(7, 0, 3)
    assert backing.blocks(7) == 3 * 8
    for killer in killers:
        killer.join(10)
    assert closed_early == [False]
    assert backing.extents(7) == []


# --- users that want huge pages ----------------------------------------------------------------


def test_the_audit_finds_holes_that_a_user_let_the_kernel_fill() -> None:
    """MADV_COLLAPSE allocates what is missing in a huge page (collapse_file, mm/khugepaged.c)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mmap.argtypes = (*libc.madvise.argtypes, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.mmap.restype = ctypes.c_void_p
    backing = Backing()
    try:
        backing.allocate(7, 0, UNIT)
        backing.punch(7, 10, 20)
        bitmap = BitMap([*range(10), *range(20, UNIT)])
        with mmap.mmap(-1, 2 * HUGE_PAGE_SIZE) as room:
            anchor = ctypes.c_char.from_buffer(room)
            place = -(-ctypes.addressof(anchor) // HUGE_PAGE_SIZE) * HUGE_PAGE_SIZE
            flags = mmap.MAP_SHARED | _MAP_FIXED
            fd = backing.fd(7, 0)
            assert libc.mmap(place, HUGE_PAGE_SIZE, mmap.PROT_WRITE, flags, fd, 0) == place
            for page in (0, UNIT // 2):
                ctypes.memset(place + page * PAGE_SIZE, 1, 1)
            assert backing.audit(7, len(bitmap), bitmap.contains_range) == []
            failed = libc.madvise(place, HUGE_PAGE_SIZE, _MADV_COLLAPSE)
            del anchor
        if failed or backing.blocks(7) * 512 != HUGE_PAGE_SIZE:
            pytest.skip("the kernel collapsed nothing: needs Linux 6.1 and a free huge page")
        names = [f.name for f in backing.audit(7, len(bitmap), bitmap.contains_range)]
        assert names == ["reallocated", "held"]
    finally:
        backing.close()


# --- shmem in pieces of 2 MiB ------------------------------------------------------------------


@pytest.fixture
def backing() -> Iterator[Backing]:
    backing = Backing(store=Shmem(HUGE_PAGE_SIZE))
    yield backing
    backing.close()
    assert backing.statistics().extents == 0


def test_pieces_come_and_go_whole(backing: Backing) -> None:
    backing.allocate(7, UNIT, 3 * UNIT)
    assert backing.blocks(7) * 512 == 2 * HUGE_PAGE_SIZE
    bitmap = BitMap(range(UNIT, 3 * UNIT))
    assert backing.audit(7, len(bitmap), bitmap.contains_range) == []
    backing.punch(7, UNIT, 2 * UNIT)
    bitmap.remove_range(UNIT, 2 * UNIT)
    assert backing.audit(7, len(bitmap), bitmap.contains_range) == []
    with mmap.mmap(backing.fd(7, 0), HUGE_PAGE_SIZE) as memory:
        memory[0] = 1  # nobody allocated the first piece
        names = [f.name for f in backing.audit(7, len(bitmap), bitmap.contains_range)]
    assert names == ["reallocated", "held"]


@pytest.mark.parametrize(("start", "end"), [(1, UNIT), (0, UNIT - 1), (UNIT // 2, UNIT)])
def test_a_part_of_a_piece_is_nothing_to_ask_for(backing: Backing, start: int, end: int) -> None:
    backing.allocate(7, 0, UNIT)
    held = backing.blocks(7)
    with pytest.raises(ValueError, match="2097152 bytes"):
        backing.punch(7, start, end)
    with pytest.raises(ValueError, match="2097152 bytes"):
        backing.allocate(7, start, end)
    assert backing.blocks(7) == held


# --- the rules of a file on large pages --------------------------------------------------------


@pytest.fixture
def file() -> MemFile:
    """A file of four huge pages."""
    personality = replace(PERSONALITIES["resizable"], page_size=HUGE_PAGE_SIZE)
    file = MemFile(personality, Budget(16 * UNIT))
    assert file.submit("size", Resize(4 * HUGE_PAGE_SIZE))[0] == Done("size", 0)
    return file


def steps(file: MemFile, op: str, request: Fallocate | FaultIn | Resize) -> list[tuple[int, int]]:
    """Perform a request; return the ranges of its steps."""
    ranges = []
    effects = file.submit(op, request)
    while isinstance(effects[0], Perform):
        ranges.append((effects[0].start, effects[0].end))
        effects = file.step_done(op)
    assert effects[0] == Done(op, 0)
    return ranges


@pytest.mark.parametrize(
    "request_",
    [
        Resize(3 * MIB),
        Resize(4 * HUGE_PAGE_SIZE + PAGE_SIZE),
        Fallocate(3, PAGE_SIZE, HUGE_PAGE_SIZE),
        Fallocate(3, 0, HUGE_PAGE_SIZE - PAGE_SIZE),
        Fallocate(16, 0, PAGE_SIZE),
        Fallocate(0, 0, 9 * MIB),
    ],
    ids=str,
)
def test_parts_of_huge_pages_are_refused_by_their_size(
    file: MemFile, request_: Fallocate | Resize
) -> None:
    before = file.key()
    (done,) = file.submit("op", request_)
    assert isinstance(done, Done)
    assert (done.errno, "2097152" in done.why) == (errno.EINVAL, True)
    assert file.key() == before


def test_allocation_inside_the_file_rounds_out_to_huge_pages(file: MemFile) -> None:
    assert steps(file, "a", Fallocate(0, 3 * MIB, MIB)) == [(UNIT, 2 * UNIT)]
    assert file.allocated == UNIT
    assert steps(file, "b", Fallocate(1, 3 * MIB, 2 * MIB)) == [(UNIT, 3 * UNIT)]
    assert file.allocated == 2 * UNIT


def test_a_fault_brings_the_huge_page_around_it(file: MemFile) -> None:
    assert steps(file, "fault", FaultIn(2 * UNIT + 5)) == [(2 * UNIT, 3 * UNIT)]
    assert file.window(2 * UNIT + 5, 0, 4 * UNIT) == (2 * UNIT, 3 * UNIT)


def test_a_fault_near_the_end_stays_inside(file: MemFile) -> None:
    assert steps(file, "fault", FaultIn(4 * UNIT - 1)) == [(3 * UNIT, 4 * UNIT)]
    assert steps(file, "shrink", Resize(2 * HUGE_PAGE_SIZE))[0][0] == 2 * UNIT
    assert file.allocated == 0
