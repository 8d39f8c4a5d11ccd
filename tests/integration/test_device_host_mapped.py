# SPDX-License-Identifier: GPL-2.0-or-later
"""guest_memfds that the host maps, by the device: flags, whole slots, punches under a guest."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator

import pytest
from actors import until
from device_program import HIGH, PAGE, TEXT, Program
from host_mapping import SIGBUS, fallocate, touch
from mounts import Mounted, Mounter

from kvmsim import exits
from kvmsim.uapi import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CAP_GUEST_MEMFD_FLAGS,
    KVM_CHECK_EXTENSION,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_X86_DEFAULT_VM,
    KVM_X86_SW_PROTECTED_VM,
    requests,
    structs,
)

pytest_plugins = ["actor_fixtures"]
pytestmark = pytest.mark.fuse

NPAGES = 16
SIZE = NPAGES * PAGE
KEEP, PUNCH = 1, 3
MMAP, SHARED = GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_FLAG_INIT_SHARED

# 1: mov rax, [rdi]; mov [rdi], rsi; mov r8, rdi; mov rdi, rax; in al, 4; mov rdi, r8; jmp 1b
SWAP = bytes.fromhex("488b074889374989f84889c7e4044c89c7ebec")

Boot = Callable[..., Program]


@pytest.fixture
def mounted(mount: Mounter) -> Mounted:
    made = mount("personality=guest_memfd,t_ack=300")
    if not made.ask("status")["host_mappable"]:
        pytest.skip("no FUSE passthrough: needs root and Linux 6.9")
    return made


@pytest.fixture
def boot(mounted: Mounted) -> Iterator[Boot]:
    made: list[Program] = []

    def start(*codes: bytes, type: int = KVM_X86_DEFAULT_VM) -> Program:
        program = Program(mounted.path, type=type)
        made.append(program)
        program.boot(*codes)
        return program

    yield start
    for program in reversed(made):
        program.close()


def swap(program: Program, gpa: int, value: int) -> int:
    """Have the vCPU store ``value`` at ``gpa``; what was there."""
    fd = program.vcpus[0]
    program.set_regs(fd, rip=TEXT, rdi=gpa, rsi=value)
    return program.ucall(fd)


def flags_of(program: Program, fd: int) -> int:
    return program.ioctl(fd, KVM_CHECK_EXTENSION, None, KVM_CAP_GUEST_MEMFD_FLAGS)


def refused(program: Program, flags: int) -> None:
    with pytest.raises(OSError, match="flags") as caught:
        program.guest_memfd(SIZE, flags)
    assert caught.value.errno == errno.EINVAL


def bound(program: Program, flags: int, *, address: int = 0, offset: int = 0) -> int:
    gmem = program.guest_memfd(SIZE + offset, flags)
    program.slot(1, HIGH, SIZE, address, gmem=gmem, offset=offset)
    return gmem


# --- flags --------------------------------------------------------------------------------------


def test_the_capability_says_which_flags_there_are(boot: Boot) -> None:
    program = boot()
    assert flags_of(program, program.kvm) == flags_of(program, program.vm) == MMAP | SHARED
    for flags in (0, MMAP, SHARED, MMAP | SHARED):
        status = os.fstat(program.guest_memfd(SIZE, flags))
        assert (status.st_size, status.st_nlink, status.st_mode & 0o777) == (SIZE, 0, 0o600)
    for bit in range(2, 64):
        refused(program, 1 << bit)


def test_a_vm_with_private_memory_has_no_files_that_begin_shared(boot: Boot) -> None:
    program = boot(type=KVM_X86_SW_PROTECTED_VM)
    assert flags_of(program, program.vm) == MMAP
    assert flags_of(program, program.kvm) == MMAP | SHARED
    program.guest_memfd(SIZE, MMAP)
    refused(program, SHARED)
    refused(program, MMAP | SHARED)


def test_a_mount_without_passthrough_has_no_flags(mount: Mounter) -> None:
    with Program(mount("personality=guest_memfd", "direct_io").path) as program:
        assert flags_of(program, program.kvm) == flags_of(program, program.vm) == 0
        refused(program, MMAP)
        refused(program, SHARED)


@pytest.mark.parametrize("flags", [0, SHARED])
def test_without_mmap_there_is_no_mapping(boot: Boot, flags: int) -> None:
    assert touch(boot().guest_memfd(SIZE, flags), 0) == errno.ENODEV


# --- whole slots --------------------------------------------------------------------------------


def test_host_and_guest_see_each_other_s_stores(boot: Boot) -> None:
    program = boot(SWAP)
    gmem = bound(program, MMAP | SHARED)
    with mmap.mmap(gmem, SIZE) as memory:
        memory[3 * PAGE : 3 * PAGE + 8] = (0x1122).to_bytes(8, "little")
        assert swap(program, HIGH + 3 * PAGE, 0x3344) == 0x1122
        assert memory[3 * PAGE : 3 * PAGE + 8] == (0x3344).to_bytes(8, "little")
        assert swap(program, HIGH + 5 * PAGE, 0x55) == 0
        assert memory[5 * PAGE] == 0x55
        memory[5 * PAGE] = 0x66
        assert swap(program, HIGH + 5 * PAGE, 0) == 0x66


def test_a_slot_of_such_a_file_has_nothing_behind_its_address(boot: Boot) -> None:
    """As measured: without attributes every access goes to the file (KVM_MEMSLOT_GMEM_ONLY)."""
    program = boot(SWAP)
    ram = program.process.ranges.allocate(SIZE)
    ram.write(0, b"\xff" * 8)
    gmem = bound(program, MMAP | SHARED, address=ram.address, offset=2 * PAGE)
    assert swap(program, HIGH, 0x77) == 0
    assert ram.read(0, 8) == b"\xff" * 8
    with mmap.mmap(gmem, SIZE + 2 * PAGE) as memory:
        assert memory[2 * PAGE] == 0x77


def test_without_init_shared_only_the_guest_has_the_pages(boot: Boot) -> None:
    program = boot(SWAP)
    gmem = bound(program, MMAP)
    assert swap(program, HIGH, 0x11) == 0
    assert swap(program, HIGH, 0x12) == 0x11
    assert touch(gmem, 0) == touch(gmem, PAGE, store=True) == SIGBUS
    fallocate(gmem, PUNCH, 0, 1)
    assert swap(program, HIGH, 0x13) == 0


def test_a_private_vm_converts_gfns_whose_file_serves_both(boot: Boot) -> None:
    program = boot(SWAP, type=KVM_X86_SW_PROTECTED_VM)
    bound(program, MMAP)
    assert swap(program, HIGH, 0x21) == 0
    program.attributes(HIGH, PAGE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
    assert swap(program, HIGH, 0x22) == 0x21, "it is the same page"


# --- taking away --------------------------------------------------------------------------------


def test_a_punch_is_seen_by_guest_and_host(boot: Boot, mounted: Mounted) -> None:
    program = boot(SWAP)
    gmem = bound(program, MMAP | SHARED)
    with mmap.mmap(gmem, SIZE) as memory:
        for page in range(NPAGES):
            assert swap(program, HIGH + page * PAGE, page + 1) == 0
        before = mounted.ask("status")["invalidations"]["total"]
        fallocate(gmem, PUNCH, 4, 6)
        assert mounted.ask("status")["invalidations"]["total"] == before + 1
        assert os.fstat(gmem).st_blocks == (NPAGES - 2) * PAGE // 512
        assert memory[4 * PAGE] == memory[5 * PAGE] == 0
        assert [memory[page * PAGE] for page in (3, 6)] == [4, 7]
        assert swap(program, HIGH + 5 * PAGE, 0x99) == 0
        assert memory[5 * PAGE] == 0x99


def test_what_the_host_alone_touched_is_punched_too(boot: Boot) -> None:
    program = boot(SWAP)
    gmem = bound(program, MMAP | SHARED)
    with mmap.mmap(gmem, SIZE) as memory:
        memory[2 * PAGE] = 1
        fallocate(gmem, PUNCH, 0, NPAGES)
        assert os.fstat(gmem).st_blocks == 0
        assert memory[2 * PAGE] == 0
        assert swap(program, HIGH + 2 * PAGE, 5) == 0


def test_madv_remove_is_a_punch_for_the_guest(boot: Boot) -> None:
    program = boot(SWAP)
    gmem = bound(program, MMAP | SHARED)
    with mmap.mmap(gmem, SIZE) as memory:
        assert swap(program, HIGH, 0x31) == 0
        memory.madvise(mmap.MADV_REMOVE, 0, PAGE)
        assert swap(program, HIGH, 0x32) == 0
        assert memory[0] == 0x32


def test_bytes_outlive_their_slot(boot: Boot) -> None:
    program = boot(SWAP)
    gmem = bound(program, MMAP | SHARED)
    assert swap(program, HIGH, 0x41) == 0
    program.slot(1, HIGH, 0, 0)
    with mmap.mmap(gmem, SIZE) as memory:
        assert memory[0] == 0x41
        memory[0] = 0x42
        program.slot(2, HIGH + SIZE, SIZE, 0, gmem=gmem)
        assert swap(program, HIGH + SIZE, 0) == 0x42


def test_the_last_close_takes_the_memory(boot: Boot, mounted: Mounted) -> None:
    program = boot(SWAP)
    gmem = bound(program, MMAP | SHARED)
    assert swap(program, HIGH, 0x51) == 0
    program.extra.remove(gmem)
    os.close(gmem)
    until(lambda: mounted.ask("status")["memory"]["used"] == 0, "the memory is given back")
    program.set_regs(program.vcpus[0], rip=TEXT, rdi=HIGH, rsi=0)
    left = program.run(program.vcpus[0])
    assert left == exits.MemoryFaultExit(HIGH, PAGE, False, errno.EFAULT)


def test_addresses_are_translated_through_the_caller_s_mapping(boot: Boot) -> None:
    """KVM reads a guest's tables by userspace_addr, whatever the slot is bound to."""
    program = boot(SWAP)
    found = program.get(
        program.vcpus[0], requests.KVM_TRANSLATE, structs.TRANSLATION.size,
        structs.TRANSLATION.pack(TEXT, 0, 0, 0, 0),
    )  # fmt: skip
    assert structs.TRANSLATION.unpack(found)[1:3] == (TEXT, 1)
