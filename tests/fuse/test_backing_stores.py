# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounts on every kind of memory: the same contract, whatever a page is."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mounts import Mounted, Mounter, privfs
from pyroaring import BitMap

from privfs.backing import Backing, BackingError, choose
from privfs.backing.hugetlb import Hugetlb
from privfs.backing.moving import copy_extent
from privfs.backing.secretmem import Secretmem
from privfs.backing.store import _call_fallocate

pytest_plugins = ["guest_fixtures"]
pytestmark = pytest.mark.fuse

KIB, MIB = 1 << 10, 1 << 20
HUGE = 2 * MIB
UNIT = HUGE // 4096
KEEP_SIZE, PUNCH, ZERO_RANGE = 1, 3, 16
POOL = 40
_SYS_PIDFD_GETFD = 438  # asm/unistd_64.h
SYSCTL = Path("/proc/sys/vm/nr_hugepages")
USER = Path(__file__).parents[1] / "integration" / "light_user.py"


def huge_pages(what: str = "Free") -> int:
    found = re.search(rf"HugePages_{what}: +(\d+)", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1])


@pytest.fixture(scope="module")
def pool() -> Iterator[int]:
    """A pool with POOL huge pages more than before, which is given back."""
    if "Hugepagesize:       2048 kB" not in Path("/proc/meminfo").read_text():
        pytest.skip("the huge pages of vm.nr_hugepages are not of 2 MiB")
    if os.geteuid() != 0:
        pytest.skip("root: needs uid 0 to reserve huge pages")
    before = int(SYSCTL.read_text())
    try:
        SYSCTL.write_text(str(before + POOL))
    except OSError as error:
        pytest.skip(f"{SYSCTL}: {error.strerror}")
    try:
        if huge_pages() < POOL:
            pytest.skip(f"the kernel gave {huge_pages()} of {POOL} huge pages")
        yield POOL
    finally:
        SYSCTL.write_text(str(before))


@dataclass(frozen=True, slots=True)
class Kind:
    options: tuple[str, ...]
    page: int


@pytest.fixture(params=["shmem", "shmem-2M", "hugetlb", "secretmem"])
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param == "hugetlb":
        request.getfixturevalue("pool")
        return Kind(("backing=hugetlb",), HUGE)
    if request.param == "shmem-2M":
        return Kind(("pagesize=2M",), HUGE)
    try:
        page = choose(request.param).page_size
    except OSError as error:
        pytest.skip(str(error.strerror))
    return Kind((f"backing={request.param}",), page)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def refused(code: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


@contextlib.contextmanager
def using(path: Path, mode: str) -> Iterator[subprocess.Popen[str]]:
    """A user of a private file in a process of its own that was granted its first pages."""
    with subprocess.Popen(
        [sys.executable, USER, path, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": os.getcwd()},
    ) as user:  # fmt: skip
        try:
            assert expect(user, "ready")
            yield user
        finally:
            user.kill()


def expect(user: subprocess.Popen[str], word: str) -> list[str]:
    """Read what a user says up to a line that begins with ``word``; return that line's words."""
    assert user.stdout is not None
    for line in user.stdout:
        if line.split()[0] == word:
            return line.split()
    pytest.fail(f"the user ended without {word!r}")


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Ask until it holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline


def tell(user: subprocess.Popen[str], command: str) -> None:
    assert user.stdin is not None
    user.stdin.write(f"{command}\n")
    user.stdin.flush()


# --- without any ---------------------------------------------------------------------------------


def test_an_empty_pool_is_said_at_the_mount() -> None:
    """First in this file: what follows fills the pool."""
    if huge_pages():
        pytest.skip("this machine has huge pages")
    done = privfs("run", "-o", "backing=hugetlb", "--", "true")
    assert done.returncode == 125
    assert done.stderr.startswith("privfs: no huge page of 2M can be had")
    assert "vm.nr_hugepages=N" in done.stderr


# --- every kind --------------------------------------------------------------------------------


def test_sizes_and_ranges_are_multiples_of_the_page(mount: Mounter, kind: Kind) -> None:
    mounted = mount(*kind.options)
    page = kind.page
    with opened(mounted.path / "f") as fd:
        for size in (page - 1, page // 2, 3 * page + 512):
            refused(errno.EINVAL, lambda size=size: os.ftruncate(fd, size))
        os.ftruncate(fd, 8 * page)
        assert os.stat(fd).st_blksize == page
        for mode in (PUNCH, ZERO_RANGE):
            for offset, length in ((page // 2, page), (0, page // 2)):
                refused(
                    errno.EINVAL,
                    lambda m=mode, o=offset, n=length: _call_fallocate(fd, m, o, n),
                )
        refused(errno.EINVAL, lambda: _call_fallocate(fd, 0, 8 * page, page // 2))
        assert os.stat(fd).st_blocks == 0
        _call_fallocate(fd, 0, page + page // 4, page // 4)  # rounds out to what holds it
        assert os.stat(fd).st_blocks * 512 == page
        _call_fallocate(fd, ZERO_RANGE, page, 2 * page)
        assert os.stat(fd).st_blocks * 512 == 2 * page
        mounted.audit()
        _call_fallocate(fd, PUNCH, 0, 2 * page)
        assert os.stat(fd).st_blocks * 512 == page
        os.ftruncate(fd, 2 * page)
        assert os.stat(fd).st_blocks == 0
    assert os.statvfs(mounted.path).f_bsize == page
    mounted.audit()


def test_what_a_file_holds_is_what_it_says(mount: Mounter, kind: Kind) -> None:
    mounted = mount(*kind.options)
    with opened(mounted.path / "f") as fd:
        _call_fallocate(fd, 0, 0, 4 * HUGE)
        found = mounted.stat("f")
        assert found["held"] == found["allocated"] == 4 * HUGE
        assert found["backing"]["page_size"] == kind.page
        assert mounted.ask("status")["backing"] == found["backing"]
    said = privfs("stat", mounted.path / "f").stdout
    assert re.search(rf"Backing: +\w+, pages of {'2M' if kind.page == HUGE else '4K'}\n", said)


def test_a_fault_brings_one_page(mount: Mounter, kind: Kind) -> None:
    mounted = mount(*kind.options)
    with opened(mounted.path / "f") as fd:
        os.ftruncate(fd, 16 * HUGE)
    with using(mounted.path / "f", "ack") as user:
        before = mounted.stat("f")["held"]
        tell(user, f"get {4 * UNIT + 3}")
        assert expect(user, "granted")[1:] == [str(4 * UNIT + 3), str(4 * UNIT + 4)]
        assert mounted.stat("f")["held"] == before + kind.page
        mounted.audit()
        tell(user, "leave")
        expect(user, "left")


@pytest.mark.parametrize("deed", ["punch", "shrink", "unlink"])
def test_nothing_is_freed_before_its_user_has_proven(mount: Mounter, kind: Kind, deed: str) -> None:
    """An unlinked guest_memfd goes at once, also from under its users."""
    personality = "guest_memfd" if deed == "unlink" else "resizable"
    mounted = mount(*kind.options, f"personality={personality}", "t_ack=0")
    path = mounted.path / "f"
    with opened(path) as fd:
        os.ftruncate(fd, 4 * HUGE)
        _call_fallocate(fd, KEEP_SIZE, 0, 4 * HUGE)
    script = {"punch": 'fallocate -p -l 4M "$1"', "shrink": 'truncate -s 0 "$1"'}
    with using(path, "held") as user:
        caller = subprocess.Popen(["sh", "-c", script.get(deed, 'rm "$1"'), "sh", path])
        try:
            expect(user, "zap")
            assert mounted.ask("status")["sessions"][0]["unacknowledged"] == 1
            assert held_bytes(mounted) == 4 * HUGE
            tell(user, "ack")
            assert caller.wait(20) == 0
        finally:
            caller.kill()
            caller.wait()
        left = 4 * HUGE - 4 * MIB if deed == "punch" else 0
        until(lambda: settled(mounted))
        assert held_bytes(mounted) == left
        mounted.audit()
        tell(user, "leave")
        expect(user, "left")


def held_bytes(mounted: Mounted) -> int:
    """Return the memory in all memfds of a mount, found out without asking it."""
    folder = Path(f"/proc/{mounted.process.pid}/fd")
    total = 0
    for link in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(link).startswith("/memfd:privfs:"):
                total += link.stat().st_blocks * 512
            elif os.readlink(link).startswith("/secretmem"):
                total += secret_bytes(mounted.process.pid, int(link.name))
    return total


def secret_bytes(pid: int, number: int) -> int:
    """Return the memory in another's memfd_secret, which no file of /proc tells; root may take it.

    0 if it was closed meanwhile.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        fd = libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            assert ctypes.get_errno() == errno.EBADF
            return 0
        try:
            return Secretmem().held(fd)
        finally:
            os.close(fd)
    finally:
        os.close(pidfd)


def settled(mounted: Mounted) -> bool:
    """Whether no operation is under way any more; each look is a round trip."""
    return mounted.ask("audit")["skipped"] == 0


def test_a_guest_lives_in_it(mount: Mounter, kind: Kind, image: bytes, tmp_path: Path) -> None:
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if "backing=secretmem" in kind.options and os.geteuid() != 0 and 0 <= locked < 32 * MIB:
        pytest.skip(f"root: a guest of 32 MiB needs more than RLIMIT_MEMLOCK of {locked} bytes")
    path = tmp_path / "kernel.elf"
    path.write_bytes(image)
    mounted = mount(*kind.options)
    with opened(mounted.path / "ram") as fd:
        os.ftruncate(fd, 32 * MIB)
    done = subprocess.run(
        [sys.executable, "-m", "kvmsim", "boot", "--kernel", path, "--memory",
         mounted.path / "ram"],
        input="test\n", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ok test" in done.stdout
    mounted.audit()


# --- huge pages --------------------------------------------------------------------------------


def test_the_pool_is_all_there_is(pool: int, mount: Mounter) -> None:
    """ENOSPC at its end, what was there before stays, and all of it comes back."""
    free = huge_pages()
    mounted = mount("backing=hugetlb")
    with opened(mounted.path / "f") as fd, opened(mounted.path / "g") as other:
        _call_fallocate(fd, 0, 0, 4 * HUGE)
        assert huge_pages() == free - 4
        mounted.expected_log = "enlarge the pool: sysctl -w vm.nr_hugepages=N"
        refused(errno.ENOSPC, lambda: _call_fallocate(other, 0, 0, (free + 1) * HUGE))
        assert os.stat(other).st_blocks == 0
        assert huge_pages() == free - 4
        mounted.audit()
        _call_fallocate(other, 0, 0, (free - 4) * HUGE)
        assert huge_pages() == 0
        os.ftruncate(other, 0)
        assert huge_pages() == free - 4
    mounted.end()
    assert huge_pages() == free


def test_the_budget_is_the_pool(pool: int, tmp_path: Path) -> None:
    done = privfs("run", "-o", "backing=hugetlb", "--", "sh", "-c", 'stat -f -c %b "$PRIVFS"')
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == huge_pages("Total") * UNIT


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("backing=secretmem,pagesize=4K", "in chunks of 2M to 64M"),
        ("pagesize=64K", "shmem has pages of 4K"),
        ("backing=hugetlb,pagesize=1G", "extents from 64M"),
        ("pagesize=3M", "pagesize=BYTES"),
        ("backing=disk", "backing=shmem|hugetlb|secretmem"),
    ],
)
def test_other_memory_is_refused_before_anything_is_mounted(options: str, why: str) -> None:
    done = privfs("run", "-o", options, "--", "true")
    assert (done.returncode, done.stderr.count("\n")) == (125, 1)
    assert why in done.stderr


def test_the_pages_of_a_pool_come_one_by_one(pool: int) -> None:
    """A fallocate that fails part-way keeps what it got, so what it got must be known."""
    backing = Backing(store=Hugetlb())
    free = huge_pages()
    try:
        backing.allocate(7, 0, UNIT)
        with pytest.raises(BackingError, match="nr_hugepages") as caught:
            backing.allocate(7, 0, (free + 1) * UNIT)
        assert (caught.value.errno, caught.value.completed) == (errno.ENOSPC, free * UNIT)
        assert backing.blocks(7) * 512 == free * HUGE
        backing.kill(7, 0)
        assert huge_pages() == min(free, 32)  # an extent of 64 MiB has 32 of them
    finally:
        backing.close()
    assert huge_pages() == free


def test_the_audit_counts_huge_pages_that_came_back(pool: int) -> None:
    """Which they are it cannot know; that there is one too many, it does."""
    backing = Backing(store=Hugetlb())
    try:
        backing.allocate(7, 0, 4 * UNIT)
        assert backing.audit(7, 4 * UNIT, lambda start, end: end <= 4 * UNIT) == []
        backing.punch(7, UNIT, 2 * UNIT)
        assert backing.audit(7, 3 * UNIT, lambda start, end: True) == []
        with mmap.mmap(backing.fd(7, 0), 4 * HUGE) as memory:
            memory[HUGE] = 1
            assert [f.name for f in backing.audit(7, 3 * UNIT, lambda s, e: True)] == ["held"]
    finally:
        backing.close()


def test_huge_pages_move_and_the_pool_gets_the_old_ones_back(pool: int) -> None:
    backing = Backing(store=Hugetlb())
    free = huge_pages()
    try:
        backing.allocate(7, 0, 2 * UNIT)
        backing.allocate(7, 5 * UNIT, 6 * UNIT)
        with mmap.mmap(backing.fd(7, 0), 6 * HUGE) as memory:
            memory[HUGE + 5], memory[6 * HUGE - 1] = 17, 18
        pages = BitMap(range(2 * UNIT)) | BitMap(range(5 * UNIT, 6 * UNIT))
        old = backing.extent(7, 0)
        copy_extent(backing, 7, 0, pages, lambda count: True)
        assert huge_pages() == free - 6
        backing.swap(7, 0)
        assert backing.extent(7, 0).generation != old.generation
        with mmap.mmap(backing.fd(7, 0), 6 * HUGE) as memory:
            assert (memory[HUGE + 5], memory[6 * HUGE - 1]) == (17, 18)
        assert (huge_pages(), backing.blocks(7) * 512) == (free - 3, 3 * HUGE)
    finally:
        backing.close()


def test_a_dead_memfd_of_huge_pages_stays_dead(pool: int) -> None:
    backing = Backing(store=Hugetlb())
    try:
        backing.allocate(7, 0, UNIT)
        theirs = os.dup(backing.fd(7, 0))
        try:
            backing.kill(7, 0)
            assert os.stat(theirs).st_blocks == 0
            refused(errno.EPERM, lambda: os.ftruncate(theirs, HUGE))
            refused(errno.EPERM, lambda: _call_fallocate(theirs, 0, 0, HUGE))
        finally:
            os.close(theirs)
    finally:
        backing.close()
