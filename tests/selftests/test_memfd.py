# SPDX-License-Identifier: GPL-2.0-or-later
"""memfd_test: the algebra of seals, on memfds and on private files.

After tools/testing/selftests/memfd/memfd_test.c, and the selftest of "mm/memfd: Introduce
MFD_INACCESSIBLE" and "mm/shmem: support F_SEAL_AUTO_ALLOCATE" of v7 (July 2022).  The memfd is the
reference.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator

import pytest
from selftests.machine import KEEP, code, fallocate, try_mmap
from selftests.pidnamespace import in_pid_namespace
from selftests.sealing import (
    AUTO_ALLOCATE,
    EXEC,
    FUTURE_WRITE,
    GROW,
    MFD_ALLOW_SEALING,
    MFD_CLOEXEC,
    MFD_EXEC,
    MFD_NOEXEC_SEAL,
    READ_WRITE,
    SEAL,
    SHRINK,
    SIZE,
    WRITE,
    Memfd,
    Sealable,
    Target,
    punch,
    resize,
)

from kvmsim.uapi import PAGE_SIZE


@pytest.fixture(params=["plain", "shared table"])
def file_table(request: pytest.FixtureRequest) -> Iterator[None]:
    """The second time a thread shares the table of descriptors (CLONE_FILES)."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    if request.param != "plain":
        thread.start()
    yield
    over.set()
    if request.param != "plain":
        thread.join()


# --- making -------------------------------------------------------------------------------------


def test_create(target: Target) -> None:
    """Names and flags that are none; a file without leave to be sealed is sealed."""
    if target.private:
        with target.make() as file:
            assert file.seals() == (SEAL if target.sealed else 0)
            assert os.fstat(file.fd).st_size == SIZE
        return
    for name in ("", "a", "x" * 249):
        os.close(os.memfd_create(name))
    assert code(lambda: os.memfd_create("x" * 250)) == "EINVAL"
    for flags in (0x100, ~0xF & 0xFFFF_FFFF, ~MFD_CLOEXEC & 0xFFFF_FFFF, 0x80):
        assert code(lambda flags=flags: os.memfd_create("", flags)) == "EINVAL", hex(flags)
    fd = os.memfd_create("", MFD_CLOEXEC)
    assert (Memfd(fd).seals(), Memfd(fd).add(WRITE)) == (SEAL, "EPERM")
    os.close(fd)


def test_basic(target: Target) -> None:
    """Seals add up, twice is once, unknown ones are EINVAL; after F_SEAL_SEAL there are no more."""
    with target.make() as file:
        assert file.add(0x1000) == "EINVAL"
        if target.sealed:
            assert file.seals() == SEAL
            assert {file.add(seal) for seal in (SHRINK, GROW, WRITE, SEAL)} == {"EPERM"}
            assert file.seals() == SEAL
            return
        assert file.seals() == 0
        assert file.add(SHRINK | WRITE) == "0"
        assert file.seals() == SHRINK | WRITE
        assert file.add(SHRINK | WRITE) == "0"
        assert file.seals() == SHRINK | WRITE
        assert file.add(GROW | SEAL) == "0"
        assert file.seals() == SHRINK | WRITE | GROW | SEAL
        assert file.add(GROW) == "EPERM"
        assert file.add(0x1000) in ("EPERM", "EINVAL")
        assert file.seals() == SHRINK | WRITE | GROW | SEAL
    if not target.private:
        fd = os.memfd_create("basic", MFD_CLOEXEC)
        assert Memfd(fd).add(SHRINK) == "EPERM"
        os.close(fd)


# --- exec ---------------------------------------------------------------------------------------

ONLY_MEMFD = "a private file is never executed: the mount is noexec"


def mode(fd: int) -> int:
    return os.fstat(fd).st_mode & 0o777


def test_exec_seal(target: Target) -> None:
    """MFD_EXEC: executable until told otherwise; F_SEAL_EXEC keeps the mode as it is."""
    target.need_memfd(ONLY_MEMFD)
    for before, other in ((0o777, 0o666), (0o644, 0o755)):
        fd = os.memfd_create("exec", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_EXEC)
        assert mode(fd) == 0o777
        os.fchmod(fd, before)
        assert Memfd(fd).add(EXEC) == "0"
        implied = SHRINK | GROW | WRITE | FUTURE_WRITE if before & 0o111 else 0
        assert Memfd(fd).seals() == EXEC | implied
        assert code(lambda fd=fd, other=other: os.fchmod(fd, other)) == "EPERM"
        assert mode(fd) == before
        os.close(fd)


def test_exec_no_seal(target: Target) -> None:
    """MFD_EXEC without leave to be sealed: the mode can be changed for ever."""
    target.need_memfd(ONLY_MEMFD)
    fd = os.memfd_create("exec", MFD_CLOEXEC | MFD_EXEC)
    assert (mode(fd), Memfd(fd).seals()) == (0o777, SEAL)
    for wanted in (0o644, 0o755):
        os.fchmod(fd, wanted)
        assert mode(fd) == wanted
    os.close(fd)


def test_noexec_seal(target: Target) -> None:
    """MFD_NOEXEC_SEAL: not executable, for good, and it can be sealed."""
    target.need_memfd(ONLY_MEMFD)
    for flags in (MFD_NOEXEC_SEAL, MFD_NOEXEC_SEAL | MFD_ALLOW_SEALING):
        fd = os.memfd_create("noexec", MFD_CLOEXEC | flags)
        assert (mode(fd), Memfd(fd).seals()) == (0o666, EXEC)
        assert code(lambda fd=fd: os.fchmod(fd, 0o777)) == "EPERM"
        os.close(fd)
    both = MFD_NOEXEC_SEAL | MFD_EXEC
    assert code(lambda: os.memfd_create("both", both)) == "EINVAL"


# --- what a seal forbids ------------------------------------------------------------------------


def fails_to_store(target: Target, file: Sealable) -> None:
    """EPERM for the process itself, an exit for a guest."""
    assert file.store(0) == ("EFAULT" if target.private else "EPERM")


def test_seal_write(target: Target) -> None:
    """No store, no hole; not while anybody may store."""
    target.need(WRITE)
    with target.make() as file:
        assert file.store(0) == "0"
        with file.storing():
            assert file.add(WRITE) == "EBUSY"
        assert file.add(WRITE) == "0"
        assert file.seals() == WRITE
        assert file.load(0) == "0"
        fails_to_store(target, file)
        assert punch(file, 0) == "EPERM"
        assert resize(file, SIZE // 2) == "0"
        assert resize(file, SIZE) == "0"


def test_seal_future_write(target: Target) -> None:
    """Who has a writable mapping keeps it; nobody gets one."""
    target.need(FUTURE_WRITE)
    with target.make() as file, mmap.mmap(file.fd, SIZE) as before:
        assert file.add(FUTURE_WRITE) == "0"
        before[0] = 7
        assert os.pread(file.fd, 1, 0) == b"\7"
        fails_to_store(target, file)
        reopened = os.open(f"/proc/self/fd/{file.fd}", os.O_RDWR)
        try:
            assert code(lambda: os.write(reopened, b"x")) == "EPERM"
            assert try_mmap(reopened, SIZE, READ_WRITE, mmap.MAP_SHARED) == "EPERM"
        finally:
            os.close(reopened)
        assert try_mmap(file.fd, SIZE, mmap.PROT_READ, mmap.MAP_SHARED) == "0"
        assert resize(file, SIZE // 2) == "0"


def test_seal_write_map_read_shared(target: Target) -> None:
    """Behind the seal there are still shared mappings, and they can only be read."""
    target.need_memfd("a private file has no mappings")
    with target.make() as file:
        assert file.add(WRITE) == "0"
        assert try_mmap(file.fd, SIZE, mmap.PROT_READ, mmap.MAP_SHARED) == "0"
        assert try_mmap(file.fd, SIZE, READ_WRITE, mmap.MAP_SHARED) == "EPERM"
        assert file.load(0) == "0"


def test_seal_shrink(target: Target) -> None:
    """Not smaller; larger and stores as ever."""
    target.need(SHRINK)
    with target.make() as file:
        assert file.add(SHRINK) == "0"
        assert resize(file, SIZE // 2) == "EPERM"
        assert os.fstat(file.fd).st_size == SIZE
        assert resize(file, 2 * SIZE) == "0"
        assert (file.store(0), file.load(0)) == ("0", "0")
        assert punch(file, 0) == "0"


def test_seal_grow(target: Target) -> None:
    """Not larger, neither by ftruncate nor by fallocate; smaller and stores as ever."""
    target.need(GROW)
    with target.make() as file:
        assert file.add(GROW) == "0"
        assert resize(file, 2 * SIZE) == "EPERM"
        assert fallocate(file.fd, 0, 0, 2 * SIZE) == "EPERM"
        if not target.private:
            with contextlib.suppress(OSError):
                os.pwrite(file.fd, b"x", SIZE)
        assert os.fstat(file.fd).st_size == SIZE
        assert (file.store(0), file.load(0)) == ("0", "0")
        assert resize(file, SIZE // 2) == "0"


def test_seal_resize(target: Target) -> None:
    """Neither smaller nor larger: the size is for good, and everything else works."""
    target.need(SHRINK | GROW)
    with target.make() as file:
        assert file.add(SHRINK | GROW) == "0"
        for size in (0, SIZE // 2, 2 * SIZE):
            assert resize(file, size) == "EPERM"
        assert os.fstat(file.fd).st_size == SIZE
        assert resize(file, SIZE) == "0"
        assert (file.store(0), file.load(0)) == ("0", "0")
        assert fallocate(file.fd, KEEP, 0, SIZE) == "0"
        assert punch(file, 0) == "0"


# --- sysctl ------------------------------------------------------------------------------------


@pytest.mark.root
def test_sysctl_simple(target: Target) -> None:
    """vm.memfd_noexec: 0 leaves, 1 turns, 2 enforces; it may be lowered to the outer one's."""
    target.need_memfd("vm.memfd_noexec is about memfds")
    if not os.path.exists("/proc/sys/vm/memfd_noexec"):
        pytest.skip("vm.memfd_noexec (Linux 6.6)")
    said = in_pid_namespace(
        """
def run():
    for value in (0, 1, 2):
        print(value, sysctl(value), made(), made(0x10), made(0x8))
    print("back", sysctl(0))
nested(run)
"""
    )
    assert said == [
        "0 0 0o777 0o777 0o666",
        "1 0 0o666 0o777 0o666",
        "2 0 0o666 Permission denied 0o666",
        "back 0",
    ]


@pytest.mark.root
def test_sysctl_nested(target: Target) -> None:
    """A namespace inside has what the outer has, or more; what it sets is its own."""
    target.need_memfd("vm.memfd_noexec is about memfds")
    if not os.path.exists("/proc/sys/vm/memfd_noexec"):
        pytest.skip("vm.memfd_noexec (Linux 6.6)")
    said = in_pid_namespace(
        """
def inner():
    print("inner", made(), sysctl(0), sysctl(2), made(0x10))
def outer():
    print("outer", sysctl(1), made())
    nested(inner)
    print("outer", made(), made(0x10))
nested(outer)
"""
    )
    assert said == [
        "outer 0 0o666",
        "inner 0o666 Invalid argument 0 Permission denied",
        "outer 0o666 0o777",
    ]


# --- who shares a file shares its seals ---------------------------------------------------------


def test_share_dup(target: Target, file_table: None) -> None:
    """A duplicate is the same file."""
    target.need(WRITE)
    with target.make() as file:
        other = file.again(os.dup(file.fd))
        try:
            assert file.add(WRITE) == "0"
            assert (file.seals(), other.seals()) == (WRITE, WRITE)
            assert other.add(SHRINK) == "0"
            assert (file.seals(), other.seals()) == (WRITE | SHRINK, WRITE | SHRINK)
            assert file.add(SEAL) == "0"
            assert (file.add(GROW), other.add(GROW)) == ("EPERM", "EPERM")
        finally:
            os.close(other.fd)
        assert file.add(GROW) == "EPERM"


def test_share_mmap(target: Target, file_table: None) -> None:
    """Who may store keeps F_SEAL_WRITE away, and nothing else; who may only load does not."""
    target.need(WRITE)
    with target.make() as file:
        with file.storing():
            assert file.add(WRITE) == "EBUSY"
            assert file.seals() == 0
            assert file.add(SHRINK) == "0"
            assert file.seals() == SHRINK
        if not target.private:
            with mmap.mmap(file.fd, SIZE, flags=mmap.MAP_PRIVATE):
                assert file.add(WRITE) == "0"
                assert file.seals() == SHRINK | WRITE


def test_share_open(target: Target, file_table: None) -> None:
    """Opened again it is the same file; to seal a memfd one must be able to write it."""
    target.need(WRITE)
    with target.make() as file:
        other = file.again(os.open(f"/proc/self/fd/{file.fd}", os.O_RDWR))
        assert file.add(WRITE) == "0"
        assert (file.seals(), other.seals()) == (WRITE, WRITE)
        assert other.add(SHRINK) == "0"
        assert (file.seals(), other.seals()) == (WRITE | SHRINK, WRITE | SHRINK)
        os.close(other.fd)
        read_only = file.again(os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY))
        if not target.private:
            assert read_only.add(SEAL) == "EPERM"
            assert read_only.seals() == WRITE | SHRINK
        os.close(read_only.fd)
        assert file.add(SEAL) == "0"
        assert file.seals() == WRITE | SHRINK | SEAL


def test_share_fork(target: Target, file_table: None) -> None:
    """What a child seals is sealed for its parent."""
    target.need(WRITE)
    with target.make() as file:
        assert file.add(WRITE) == "0"
        child = os.fork()
        if child == 0:
            good = file.seals() == WRITE and file.add(SEAL) == "0"
            os._exit(not good)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert file.seals() == WRITE | SEAL
        assert file.add(GROW) == "EPERM"


# --- v7 -----------------------------------------------------------------------------------------


def test_seal_auto_allocate(target: Target) -> None:
    """After the seal only fallocate allocates: a store or load in a hole fails."""
    target.need(AUTO_ALLOCATE)
    if not target.private:
        pytest.skip("F_SEAL_AUTO_ALLOCATE was never merged: its number is F_SEAL_EXEC")
    with target.make() as file:
        assert file.store(0) == "0", "before the seal a hole is filled"
        assert file.add(AUTO_ALLOCATE) == "0"
        blocks = os.fstat(file.fd).st_blocks
        assert (file.store(0), file.load(0)) == ("0", "0"), "what is allocated"
        assert (file.store(1), file.load(1)) == ("EFAULT", "EFAULT"), "a hole"
        assert os.fstat(file.fd).st_blocks == blocks
        assert punch(file, 0) == "0"
        assert (file.store(0), file.load(0)) == ("EFAULT", "EFAULT"), "a hole again"
        assert fallocate(file.fd, KEEP, 0, 2 * PAGE_SIZE) == "0"
        assert [file.store(0), file.load(0), file.store(1), file.load(1)] == ["0"] * 4
