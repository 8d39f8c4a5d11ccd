# SPDX-License-Identifier: GPL-2.0-or-later
"""Chunks of memfd_secret(2): what they do, and what they are known not to do."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from pyroaring import BitMap

from privfs import probes
from privfs.backing import Backing, BackingError, StoreError, choose, default_size
from privfs.backing import secretmem as secretmem_module
from privfs.backing.secretmem import SMALLEST, WINDOW, Secretmem
from privfs.backing.store import Promise, _call_fallocate
from privfs.extents import PAGE_SIZE

UNIT = SMALLEST // PAGE_SIZE
INO = 7
ROOT = Path(__file__).parents[2]


@pytest.fixture
def store() -> Secretmem:
    try:
        choose("secretmem")
    except StoreError as error:
        pytest.skip(str(error.strerror))
    return Secretmem()


@pytest.fixture
def backing(store: Secretmem) -> Iterator[Backing]:
    before = set(os.listdir("/proc/self/fd"))
    backing = Backing(store=store)
    yield backing
    backing.close()
    assert backing.statistics().extents == 0
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def fd(store: Secretmem) -> Iterator[int]:
    fd = store.create("test", SMALLEST)
    yield fd
    os.close(fd)


def refuse(code: int) -> object:
    def refused(*arguments: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return refused


def secret_bytes() -> int:
    """Return the memory of the machine that cannot be reclaimed: all secret pages are in there."""
    found = re.search(r"Unevictable: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) << 10


# --- what the kernel gives ---------------------------------------------------------------------


def test_the_kernel_keeps_to_what_is_written_about_it(store: Secretmem, fd: int) -> None:
    """Should one of these begin to work, the store can promise more than it does."""
    store.allocate(fd, 0, SMALLEST)
    assert os.fstat(fd).st_blocks == 0  # although it holds all of its pages
    for size in (0, PAGE_SIZE, SMALLEST):  # secretmem_setattr
        with pytest.raises(OSError, match="Invalid argument"):
            os.ftruncate(fd, size)
    with pytest.raises(OSError, match="Invalid argument"):  # memfd_file_seals_ptr
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    for mode in (0, 3):
        with pytest.raises(OSError, match="not supported"):
            _call_fallocate(fd, mode, 0, PAGE_SIZE)
    with pytest.raises(OSError, match="No such device or address"):
        os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    with pytest.raises(OSError, match="Illegal seek"):
        os.lseek(fd, 0, os.SEEK_DATA)
    with pytest.raises(OSError, match="not supported"):
        store.punch(fd, 0, SMALLEST)


def test_the_promises_are_none() -> None:
    assert Secretmem.promises == frozenset()
    assert Promise.RECLAIM in choose("shmem", 2 << 20).promises


# --- coming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["this", "before 6.5"])
def test_an_allocation_has_all_of_its_pages(
    store: Secretmem, fd: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel != "this":
        monkeypatch.setattr(secretmem_module, "_cached_pages", lambda fd: None)
    assert (store.held(fd), [*store.touched(fd)]) == (0, [])
    with mmap.mmap(fd, PAGE_SIZE, offset=3 * PAGE_SIZE) as memory:
        memory[0] = 1
    assert [*store.touched(fd)] == [(3 * PAGE_SIZE, 4 * PAGE_SIZE)]
    store.allocate(fd, 0, SMALLEST)
    assert (store.held(fd), [*store.touched(fd)]) == (SMALLEST, [(0, SMALLEST)])


def test_what_is_there_keeps_its_contents(store: Secretmem, fd: int) -> None:
    with mmap.mmap(fd, SMALLEST) as memory:
        memory[:] = bytes(range(256)) * (SMALLEST // 256)
        store.allocate(fd, 0, SMALLEST)
        assert memory[:] == bytes(range(256)) * (SMALLEST // 256)


def test_a_large_chunk_is_touched_to_its_end(store: Secretmem) -> None:
    large = Secretmem(8 << 20)
    assert (large.layout.pages, large.undoes) == (2048, 8 << 20)
    fd = large.create("test", 8 << 20)
    try:
        large.allocate(fd, 0, 8 << 20)
        assert large.held(fd) == 8 << 20
    finally:
        os.close(fd)


def test_memory_that_runs_out_is_an_error(
    store: Secretmem, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's answers to a copy from pages that cannot be had: nothing, or less than all."""
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "pwritev", refuse(errno.EFAULT))
    with pytest.raises(OSError, match="Cannot allocate") as caught:
        store.allocate(fd, 0, SMALLEST)
    assert caught.value.errno == errno.ENOMEM
    monkeypatch.setattr(os, "pwritev", lambda *arguments: 3)
    with pytest.raises(OSError, match="Cannot allocate"):
        store.allocate(fd, 0, SMALLEST)
    assert set(os.listdir("/proc/self/fd")) == before


def test_an_allocation_that_runs_out_keeps_whole_chunks(
    backing: Backing, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Secretmem.allocate

    def third_fails(self: Secretmem, fd: int, offset: int, length: int) -> None:
        if backing.alive == 3:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        real(self, fd, offset, length)

    monkeypatch.setattr(Secretmem, "allocate", third_fails)
    with pytest.raises(BackingError, match="memory limit") as caught:
        backing.allocate(INO, 0, 5 * UNIT)
    assert (caught.value.errno, caught.value.completed) == (errno.ENOSPC, 2 * UNIT)
    assert backing.blocks(INO) * 512 == 2 * SMALLEST
    backing.punch(INO, 0, 5 * UNIT)
    assert backing.alive == 0


# --- going -------------------------------------------------------------------------------------


def test_chunks_come_and_go_whole(backing: Backing) -> None:
    backing.allocate(INO, UNIT, 4 * UNIT)
    bitmap = BitMap(range(UNIT, 4 * UNIT))
    assert [extent.index for extent in backing.extents(INO)] == [1, 2, 3]
    assert backing.audit(INO, len(bitmap), bitmap.contains_range) == []
    old = backing.extent(INO, 2).generation
    backing.punch(INO, 2 * UNIT, 3 * UNIT)
    bitmap.remove_range(2 * UNIT, 3 * UNIT)
    assert [extent.index for extent in backing.extents(INO)] == [1, 3]
    assert backing.audit(INO, len(bitmap), bitmap.contains_range) == []
    backing.allocate(INO, 2 * UNIT, 3 * UNIT)
    assert backing.extent(INO, 2).generation > old
    with pytest.raises(ValueError, match="2097152 bytes"):
        backing.punch(INO, UNIT, UNIT + 1)
    names = [f.name for f in backing.audit(INO, len(bitmap), bitmap.contains_range)]
    assert names == ["reallocated", "held"]  # of what lives, all is known


def test_who_keeps_a_chunk_keeps_that_and_sees_nothing_else(backing: Backing) -> None:
    """The one thing that cannot be had of it, and why it is no hole in the file."""
    backing.allocate(INO, 0, UNIT)
    kept = os.dup(backing.fd(INO, 0))
    try:
        with mmap.mmap(kept, SMALLEST) as theirs:
            theirs[:5] = b"first"
            backing.punch(INO, 0, UNIT)
            assert backing.blocks(INO) == 0
            assert backing.store.held(kept) == SMALLEST  # not reclaimed, and not in any count
            backing.allocate(INO, 0, UNIT)
            with mmap.mmap(backing.fd(INO, 0), SMALLEST) as ours:
                assert ours[:5] == bytes(5)
                ours[:5] = b"other"
                assert theirs[:5] == b"first"
            with pytest.raises(OSError, match="Invalid argument"):
                os.ftruncate(kept, 2 * SMALLEST)
    finally:
        os.close(kept)


def test_memory_goes_back_with_the_last_descriptor(backing: Backing) -> None:
    size = 32 * SMALLEST
    before = secret_bytes()
    backing.allocate(INO, 0, 32 * UNIT)
    assert secret_bytes() > before + size * 3 // 4
    kept = [os.dup(extent.fd) for extent in backing.extents(INO)]
    backing.destroy(INO)
    assert secret_bytes() > before + size * 3 // 4
    for fd in kept:
        os.close(fd)
    deadline = time.monotonic() + 20
    while secret_bytes() > before + size // 4:  # others use the machine as well
        assert time.monotonic() < deadline


# --- limits ------------------------------------------------------------------------------------


def limited(locked: int, code: str) -> str:
    """Run a script that may lock ``locked`` bytes; return what it printed."""
    setpriv, prlimit = shutil.which("setpriv"), shutil.which("prlimit")
    if setpriv is None or prlimit is None:
        pytest.skip("no setpriv or prlimit: apt install util-linux")
    drop = ["--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [setpriv, *drop, prlimit, f"--memlock={locked}", sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    return done.stdout


def test_the_owner_locks_no_more_than_a_window(store: Secretmem) -> None:
    code = (
        "import os, threading\n"
        "from privfs.backing import Backing, choose\n"
        "backing = Backing(store=choose('secretmem', 8 << 20))\n"
        "fill = backing.allocate\n"
        "threads = [threading.Thread(target=fill, args=(i, 0, 4096)) for i in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(backing.statistics().bytes_held >> 20)\n"
    )
    assert limited(WINDOW, code) == "64\n"


def test_a_limit_that_is_too_low_is_told_with_the_command_that_raises_it(store: Secretmem) -> None:
    code = (
        "from privfs.backing import StoreError, choose\n"
        "try: choose('secretmem')\n"
        "except StoreError as error: print(error.errno, error.strerror)\n"
    )
    said = limited(WINDOW // 2, code)
    assert said.startswith(f"{errno.EAGAIN} no secret memory can be had (Resource temporarily")
    assert f"ulimit -l {WINDOW >> 10}" in said
    code = (
        "from privfs import probes\n"
        "found = probes.secret_pages()\n"
        "print(found.result.value, found.text, found.remedy, sep='; ')\n"
    )
    assert re.match(r"SKIP; no secret memory .*; ulimit -l 1024", limited(WINDOW // 2, code))
    assert re.match(
        r"SKIP; works; a user may map at most 8192K .*; as root: ulimit -l unlimited",
        limited(8 << 20, code),
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSYS, "secretmem.enable=1"),
        (errno.EPERM, "seccomp"),
        (errno.ENOMEM, "memory limit"),
        (errno.ENFILE, "Too many open files in system"),
    ],
)
def test_where_there_is_none_the_mount_says_what_mends_it(
    monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    monkeypatch.setattr(Secretmem, "create", refuse(code))
    with pytest.raises(StoreError, match=words) as caught:
        choose("secretmem")
    assert caught.value.errno == code
    found = probes.secret_pages()
    assert found.result is probes.Result.SKIP
    assert words in found.text + found.remedy
    assert found.remedy


def test_the_budget_is_that_of_ordinary_memory() -> None:
    assert default_size("secretmem") == default_size("shmem")
