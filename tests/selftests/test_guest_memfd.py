# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_memfd_test: the file itself, under each set of its flags.

After tools/testing/selftests/kvm/guest_memfd_test.c.  The simulator's files that can be mapped are
those of a mount with FUSE passthrough, whose capability has the flags.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import closing

import pytest
from selftests.machine import (
    KEEP,
    MAPPABLE,
    PUNCH,
    Machine,
    code,
    fallocate,
    try_mmap,
)

from kvmsim.api import GuestMemfd, Memory
from kvmsim.uapi import (
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CAP_GUEST_MEMFD_FLAGS,
    PAGE_SIZE,
)

PAGES = 4
SIZE = PAGES * PAGE_SIZE
FLAGS = pytest.mark.parametrize(
    "flags", [0, GUEST_MEMFD_FLAG_MMAP, MAPPABLE], ids=["none", "mmap", "shared"]
)
RAM = 4 << 20
A_MEMFD = "what is mapped is a memfd, and the kernel lets that be"


@contextlib.contextmanager
def made(machine: Machine, flags: int, size: int = SIZE) -> Iterator[GuestMemfd]:
    machine.need_guest_memfd(flags)
    with machine.vm() as vm, vm.create_guest_memfd(size, flags) as file:
        yield file


# --- creation -----------------------------------------------------------------------------------


def test_guest_memfd_flags(machine: Machine) -> None:
    """Each flag creates a file if the capability has it, else EINVAL."""
    machine.need_guest_memfd()
    with machine.vm() as vm:
        offered = vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS)
        for bit in range(64):
            expected = "0" if 1 << bit & offered else "EINVAL"
            found = code(lambda bit=bit: vm.create_guest_memfd(PAGE_SIZE, 1 << bit).close())
            assert found == expected, f"flag {1 << bit:#x}"


def test_create_guest_memfd_multiple(machine: Machine) -> None:
    """Two files have sizes and inode numbers of their own."""
    with made(machine, 0) as first, machine.vm().create_guest_memfd(2 * SIZE) as second:
        one, two = os.fstat(first.fileno()), os.fstat(second.fileno())
        assert (one.st_size, two.st_size) == (SIZE, 2 * SIZE)
        assert one.st_ino != two.st_ino
        assert os.fstat(first.fileno()).st_size == SIZE


@FLAGS
def test_create_guest_memfd_invalid_sizes(machine: Machine, flags: int) -> None:
    """Every size from 1 to 4095 is EINVAL."""
    machine.need_guest_memfd(flags)
    with machine.vm() as vm:
        assert {
            code(lambda size=size: vm.create_guest_memfd(size, flags))
            for size in range(1, PAGE_SIZE)
        } == {"EINVAL"}


# --- file operations ----------------------------------------------------------------------------


@FLAGS
def test_file_read_write(machine: Machine, flags: int) -> None:
    """read, write, pread and pwrite fail."""
    with made(machine, flags) as file:
        fd = file.fileno()
        assert code(lambda: os.read(fd, 64)) == "EINVAL"
        assert code(lambda: os.write(fd, bytes(64))) == "EINVAL"
        assert code(lambda: os.pread(fd, 64, 0)) != "0"
        assert code(lambda: os.pwrite(fd, bytes(64), 0)) != "0"


@FLAGS
def test_file_size(machine: Machine, flags: int) -> None:
    """fstat: the size it was made with, blocks of a page."""
    with made(machine, flags) as file:
        status = os.fstat(file.fileno())
        assert (status.st_size, status.st_blksize) == (SIZE, PAGE_SIZE)


@FLAGS
def test_fallocate(machine: Machine, flags: int) -> None:
    """What may be allocated and punched: aligned, allocation inside the file."""
    with made(machine, flags) as file:
        fd = file.fileno()
        assert fallocate(fd, KEEP, 0, SIZE) == "0"
        assert fallocate(fd, PUNCH, PAGE_SIZE - 1, PAGE_SIZE) == "EINVAL"
        assert fallocate(fd, KEEP, SIZE, PAGE_SIZE) == "EINVAL"
        assert fallocate(fd, KEEP, SIZE + PAGE_SIZE, PAGE_SIZE) == "EINVAL"
        assert fallocate(fd, PUNCH, SIZE, PAGE_SIZE) == "0"
        assert fallocate(fd, PUNCH, SIZE + PAGE_SIZE, PAGE_SIZE) == "0"
        assert fallocate(fd, PUNCH, PAGE_SIZE, PAGE_SIZE - 1) == "EINVAL"
        assert fallocate(fd, PUNCH, PAGE_SIZE, PAGE_SIZE) == "0"
        assert fallocate(fd, KEEP, PAGE_SIZE, PAGE_SIZE) == "0"


@FLAGS
def test_invalid_punch_hole(machine: Machine, flags: int) -> None:
    """Whatever is not aligned is EINVAL, wherever it lies."""
    page = PAGE_SIZE
    unaligned = [
        (0, 1), (0, page - 1), (0, page + 1),
        (1, 1), (1, page - 1), (1, page), (1, page + 1),
        (page, 1), (page, page - 1), (page, page + 1),
    ]  # fmt: skip
    with made(machine, flags) as file:
        found = {at: fallocate(file.fileno(), PUNCH, *at) for at in unaligned}
        assert set(found.values()) == {"EINVAL"}, found


# --- mappings -----------------------------------------------------------------------------------


@contextlib.contextmanager
def mapped(machine: Machine, flags: int, size: int = SIZE) -> Iterator[tuple[GuestMemfd, Memory]]:
    with made(machine, flags, size) as file, closing(file.map()) as memory:
        yield file, memory


def test_mmap_supported(machine: Machine) -> None:
    """The host stores and loads; a punched page is zero, the others keep what they hold."""
    with mapped(machine, MAPPABLE) as (file, memory):
        memory.write(0, b"\xaa" * SIZE)
        assert memory.read(0, SIZE) == b"\xaa" * SIZE
        file.discard(0, PAGE_SIZE)
        assert memory.read(0, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert memory.read(PAGE_SIZE, SIZE - PAGE_SIZE) == b"\xaa" * (SIZE - PAGE_SIZE)
        memory.write(0, b"\xbb" * SIZE)
        assert memory.read(0, SIZE) == b"\xbb" * SIZE


def test_fault_overflow(machine: Machine) -> None:
    """A mapping four times as long: what lies past the end is SIGBUS, inside all is kept."""
    with mapped(machine, MAPPABLE) as (file, memory):
        assert in_child(file.fileno(), 4 * SIZE, SIZE) == "SIGBUS"
        assert in_child(file.fileno(), 4 * SIZE, 4 * SIZE - PAGE_SIZE) == "SIGBUS"
        memory.write(0, b"\xaa" * SIZE)
        assert in_child(file.fileno(), 4 * SIZE, SIZE - 1) == "0xaa"
        assert memory.read(0, SIZE) == b"\xaa" * SIZE


def test_fault_private(machine: Machine) -> None:
    """Without INIT_SHARED there is a mapping, and every touch of it is SIGBUS."""
    with made(machine, GUEST_MEMFD_FLAG_MMAP) as file:
        for page in range(PAGES):
            assert in_child(file.fileno(), SIZE, page * PAGE_SIZE) == "SIGBUS"


def in_child(fd: int, length: int, offset: int) -> str:
    """Map ``length`` bytes and load one of them, in a process that may die of it."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.signal(7, None)
        at = libc.mmap(None, ctypes.c_size_t(length), 1, 1, fd, ctypes.c_long(0))
        os.write(theirs, hex(ctypes.c_ubyte.from_address(at + offset).value).encode())
        os._exit(0)
    os.close(theirs)
    with open(ours) as told:
        said = told.read()
    _, status = os.waitpid(child, 0)
    return "SIGBUS" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == 7 else said


@pytest.mark.parametrize("flags", [GUEST_MEMFD_FLAG_MMAP, MAPPABLE], ids=["mmap", "shared"])
def test_mmap_cow(machine: Machine, flags: int) -> None:
    """No private (copy-on-write) mapping."""
    if machine.simulated:
        pytest.skip(f"MAP_PRIVATE: {A_MEMFD}; kvmsim exec refuses it")
    with made(machine, flags) as file:
        found = try_mmap(file.fileno(), SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE)
        assert found == "EINVAL"


def test_mmap_not_supported(machine: Machine) -> None:
    """Without the flag there is no shared mapping, of a page or of all."""
    with made(machine, 0) as file:
        for size in (PAGE_SIZE, SIZE):
            prot = mmap.PROT_READ | mmap.PROT_WRITE
            assert try_mmap(file.fileno(), size, prot, mmap.MAP_SHARED) == "ENODEV"


def test_mbind(machine: Machine) -> None:
    """A policy that was set for a mapping is the one that is told."""
    with mapped(machine, MAPPABLE) as (_, memory):
        for policy, nodes in ((BIND, 1), (INTERLEAVE, 1), (PREFERRED, 1), (DEFAULT, 0)):
            set_policy(memory.address, SIZE, policy, nodes)
            assert policy_of(memory.address) == (policy, nodes)
            memory.write(0, b"\xaa" * SIZE)
            assert policy_of(memory.address) == (policy, nodes)
        with pytest.raises(OSError, match="EINVAL"):
            set_policy(memory.address, SIZE, 0x7FFF, 1)


def test_numa_allocation(machine: Machine) -> None:
    """Pages come from the node of the policy, also after a punch."""
    if not os.path.exists("/sys/devices/system/node/node1"):
        pytest.skip("two NUMA nodes")
    with mapped(machine, MAPPABLE) as (file, memory):
        half = SIZE // 2
        for first in (0, 1):
            file.discard(0, SIZE)
            set_policy(memory.address, half, BIND, 1 << first)
            set_policy(memory.address + half, half, BIND, 1 << 1 - first)
            memory.write(0, b"\xaa" * SIZE)
            found = nodes_of(memory.address)
            assert found == [first] * (PAGES // 2) + [1 - first] * (PAGES // 2)


DEFAULT, PREFERRED, BIND, INTERLEAVE = range(4)  # MPOL_*
_MBIND, _GET_MEMPOLICY, _MOVE_PAGES = 237, 239, 279


def system_call(number: int, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = (ctypes.c_long(one) if isinstance(one, int) else one for one in arguments)
    if libc.syscall(ctypes.c_long(number), *words):
        raise OSError(ctypes.get_errno(), errno.errorcode[ctypes.get_errno()])


def set_policy(address: int, size: int, policy: int, nodes: int) -> None:
    system_call(_MBIND, address, size, policy, ctypes.byref(ctypes.c_ulong(nodes)), 65, 0)


def policy_of(address: int) -> tuple[int, int]:
    """The policy at an address, and the mask of its nodes."""
    policy, nodes = ctypes.c_int(-1), (ctypes.c_ulong * 16)()
    system_call(_GET_MEMPOLICY, ctypes.byref(policy), nodes, 1024, address, 1 << 1)
    return policy.value, nodes[0]


def nodes_of(address: int) -> list[int]:
    """Where the pages of a mapping of PAGES pages are."""
    pages = (ctypes.c_void_p * PAGES)(*(address + page * PAGE_SIZE for page in range(PAGES)))
    status = (ctypes.c_int * PAGES)()
    system_call(_MOVE_PAGES, 0, PAGES, pages, 0, status, 0)
    return list(status)


def test_collapse(machine: Machine) -> None:
    """MADV_HUGEPAGE is taken and changes nothing: there is nothing to collapse."""
    huge = 2 << 20
    with mapped(machine, MAPPABLE, 2 * huge) as (_, memory):
        at = -memory.address % huge
        assert madvise(memory.address + at, huge, mmap.MADV_HUGEPAGE) == "0"
        memory.write(at, b"\xaa" * huge)
        if not machine.simulated:
            assert madvise(memory.address + at, huge, 25) == "EINVAL", "MADV_COLLAPSE"
        assert madvise(memory.address + at, huge, mmap.MADV_DONTNEED) == "0"
        assert memory.read(at, huge) == b"\xaa" * huge


def madvise(address: int, size: int, advice: int) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = ctypes.c_void_p(address), ctypes.c_size_t(size), advice

    def call() -> None:
        if libc.madvise(*arguments):
            raise OSError(ctypes.get_errno(), "madvise")

    return code(call)


# --- a guest ------------------------------------------------------------------------------------


def test_guest_memfd_guest(machine: Machine) -> None:
    """A guest reads what the host wrote and the host what the guest wrote; no userspace_addr."""
    machine.need_guest_memfd(MAPPABLE)
    vm = machine.vm()
    (player,) = machine.players(vm)
    with vm.create_guest_memfd(SIZE, MAPPABLE) as file, closing(file.map()) as memory:
        vm.add_slot(RAM, guest_memfd=file)
        memory.write(0, b"\xaa" * SIZE)
        script = player.script().check(RAM, SIZE, 0xAA).fill(RAM, SIZE, 0xFF)
        assert player.play(script.check(RAM, SIZE, 0xFF)) is None
        assert memory.read(0, SIZE) == b"\xff" * SIZE
