# SPDX-License-Identifier: GPL-2.0-or-later
"""Private memory through the simulated device: guest_memfd, attributes, conversion, lifetimes."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from actors import Cast, until
from device_program import HIGH, PAGE, PLAIN, TEXT, Program
from mounts import Mounted, Mounter

from kvmsim import exits
from kvmsim.device.results import Begun, Failure, Value
from kvmsim.kind import SHARED_BIT
from kvmsim.uapi import (
    ENC_REGION,
    KVM_CAP_EXIT_HYPERCALL,
    KVM_CAP_GUEST_MEMFD,
    KVM_CAP_GUEST_MEMFD_FLAGS,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_MEMORY_ENCRYPT_REG_REGION,
    KVM_MEMORY_ENCRYPT_UNREG_REGION,
    KVM_PRE_FAULT_MEMORY,
    KVM_RUN,
    KVM_X86_SW_PROTECTED_VM,
    PRE_FAULT_MEMORY,
    requests,
    structs,
)
from kvmsim.vcpus import State

pytest_plugins = ["actor_fixtures"]
pytestmark = pytest.mark.fuse

NPAGES = 16
SIZE = NPAGES * PAGE
PRIVATE = KVM_MEMORY_ATTRIBUTE_PRIVATE
KEEP_AND_PUNCH = 3

# 1: mov rax, [rdi]; mov [rdi], rsi; mov r8, rdi; mov rdi, rax; in al, 4; mov rdi, r8; jmp 1b
SWAP = bytes.fromhex("488b074889374989f84889c7e4044c89c7ebec")
# 1: mov rbx, rsi; mov rcx, rdx; mov rdx, r8; mov eax, 12; vmcall; mov rdi, rax; in al, 4; jmp 1b
MAP_GPA_RANGE = bytes.fromhex("4889f34889d14c89c2b80c0000000f01c14889c7e404ebe8")

Boot = Callable[..., Program]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if libc.fallocate(fd, mode, offset, length):
        raise OSError(ctypes.get_errno(), f"fallocate {mode} {offset:#x} {length:#x}")


@pytest.fixture
def mounted(mount: Mounter) -> Mounted:
    return mount("personality=guest_memfd,t_ack=300")


@pytest.fixture
def boot(mounted: Mounted) -> Iterator[Boot]:
    made: list[Program] = []

    def start(*codes: bytes, type: int = KVM_X86_SW_PROTECTED_VM, gpa_bits: int = 0) -> Program:
        program = Program(mounted.path, type=type)
        made.append(program)
        program.boot(*codes, gpa_bits=gpa_bits)
        return program

    yield start
    for program in reversed(made):
        program.close()


def with_slot(program: Program, *, offset: int = 0, gpa: int = HIGH) -> tuple[int, int]:
    """A slot of NPAGES with both sides; the private file and the address of the shared one."""
    gmem = program.guest_memfd(SIZE + offset)
    shared = program.process.ranges.allocate(SIZE)
    program.slot(1, gpa, SIZE, shared.address, gmem=gmem, offset=offset)
    return gmem, shared.address


def swap(program: Program, gpa: int, value: int, vcpu: int = 0) -> int:
    """Have a vCPU store ``value`` at ``gpa``; what was there."""
    fd = program.vcpus[vcpu]
    program.set_regs(fd, rip=TEXT + vcpu * PAGE, rdi=gpa, rsi=value)
    return program.ucall(fd)


def faults(program: Program, gpa: int, *, private: bool = True) -> None:
    """The vCPU leaves with a memory fault, having done nothing."""
    fd = program.vcpus[0]
    program.set_regs(fd, rip=TEXT, rdi=gpa, rsi=0)
    left = program.run(fd)
    assert left == exits.MemoryFaultExit(gpa & -PAGE, PAGE, private, errno.EFAULT)
    assert program.regs(fd)["rip"] == TEXT


def descriptor_of(program: Program, fd: int) -> dict[str, str]:
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


# --- the file -----------------------------------------------------------------------------------


def test_a_guest_memfd_is_an_unlinked_private_file(boot: Boot, mounted: Mounted) -> None:
    program = boot()
    flags = 3 if mounted.ask("status")["host_mappable"] else 0
    assert program.ioctl(program.kvm, KVM_CHECK_EXTENSION, None, KVM_CAP_GUEST_MEMFD) == 1
    assert program.ioctl(program.kvm, KVM_CHECK_EXTENSION, None, KVM_CAP_GUEST_MEMFD_FLAGS) == flags
    fd = program.guest_memfd(SIZE)
    status = os.fstat(fd)
    assert (status.st_size, status.st_nlink, status.st_mode & 0o777) == (SIZE, 0, 0o600)
    assert int(descriptor_of(program, fd)["flags"], 8) & os.O_ACCMODE == os.O_RDWR
    for call in (lambda: os.read(fd, 1), lambda: os.write(fd, b"x")):
        with pytest.raises(OSError, match="Invalid argument"):
            call()
    with pytest.raises(OSError, match="Invalid argument"):
        os.ftruncate(fd, 2 * SIZE)


def test_sizes_that_no_file_has(boot: Boot) -> None:
    program = boot()
    for size in (0, 1, PAGE - 1, PAGE + 1, 1 << 63, (1 << 64) - PAGE):
        with pytest.raises(OSError, match="pages") as caught:
            program.guest_memfd(size)
        assert caught.value.errno == errno.EINVAL


def test_flags_that_the_mount_lacks(boot: Boot) -> None:
    program = boot()
    for flag in range(1, 64):  # INIT_SHARED too: this VM has private memory
        with pytest.raises(OSError, match="flags") as caught:
            program.guest_memfd(PAGE, 1 << flag)
        assert caught.value.errno == errno.EINVAL


# --- binding ------------------------------------------------------------------------------------


def refused(program: Program, number: int, **slot: int) -> None:
    values = {"slot": 1, "gpa": HIGH, "size": SIZE, "address": 0, **slot}
    with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION2") as caught:
        program.slot(**values)
    assert caught.value.errno == number, caught.value


def test_what_cannot_be_bound(boot: Boot) -> None:
    program = boot()
    gmem = program.guest_memfd(SIZE)
    refused(program, errno.EBADF, gmem=0xFFFF_FFFF)
    refused(program, errno.EBADF, gmem=999)
    refused(program, errno.EINVAL, gmem=program.vm)
    memfd = os.memfd_create("ordinary")
    program.extra.append(memfd)
    refused(program, errno.EINVAL, gmem=memfd)
    other = program.ioctl(program.kvm, KVM_CREATE_VM, None, KVM_X86_SW_PROTECTED_VM)
    mine, program.vm = program.vm, other
    refused(program, errno.EINVAL, gmem=gmem)
    program.vm = mine
    refused(program, errno.EINVAL, gmem=gmem, offset=PAGE)
    refused(program, errno.EINVAL, gmem=gmem, offset=1)
    refused(program, errno.EEXIST, gmem=gmem, gpa=0)
    refused(program, errno.EEXIST, gmem=999, gpa=0)
    program.slot(1, HIGH, SIZE, 0, gmem=gmem)
    refused(program, errno.EINVAL, gmem=gmem, slot=2, gpa=HIGH + SIZE)
    refused(program, errno.EINVAL, gmem=gmem)
    with pytest.raises(OSError, match="delete it first"):
        program.slot(1, HIGH, SIZE, 0)
    program.slot(1, HIGH, 0, 0)
    with pytest.raises(OSError, match="no such slot"):
        program.slot(1, HIGH, 0, 0)
    program.slot(2, HIGH + SIZE, SIZE, 0, gmem=gmem)


def test_a_file_that_is_bound_nowhere_is_used_by_nobody(boot: Boot, mounted: Mounted) -> None:
    program = boot()
    gmem = program.guest_memfd(SIZE)

    def users() -> int:
        return sum(len(row["files"]) for row in mounted.ask("status")["sessions"])

    program.slot(1, HIGH, SIZE, 0, gmem=gmem)
    assert users() == 1
    program.slot(1, HIGH, 0, 0)
    assert users() == 0
    refused(program, errno.EINVAL, gmem=gmem, offset=PAGE)
    assert users() == 0, "nor one whose binding was refused"


# --- faults and conversion ----------------------------------------------------------------------


def test_both_sides_hold_their_own_bytes(boot: Boot, mounted: Mounted) -> None:
    program = boot(SWAP)
    gmem, address = with_slot(program)
    shared = program.process.caller
    assert swap(program, HIGH, 0x51) == 0
    assert shared.read(address, 1) == b"\x51"
    program.attributes(HIGH, SIZE, PRIVATE)
    assert swap(program, HIGH, 0x52) == 0, "a new private page"
    assert shared.read(address, 1) == b"\x51"
    program.attributes(HIGH, SIZE, 0)
    assert swap(program, HIGH, 0x53) == 0x51
    program.attributes(HIGH, PAGE, PRIVATE)
    assert swap(program, HIGH, 0x54) == 0x52
    assert swap(program, HIGH + PAGE, 0x55) == 0
    assert shared.read(address + PAGE, 1) == b"\x55"
    fallocate(gmem, KEEP_AND_PUNCH, 0, PAGE)
    assert swap(program, HIGH, 0x56) == 0, "punched"
    mounted.audit()


def test_a_file_is_bound_from_an_offset(boot: Boot) -> None:
    program = boot(SWAP)
    gmem, _ = with_slot(program, offset=4 * PAGE)
    program.attributes(HIGH, SIZE, PRIVATE)
    assert swap(program, HIGH + PAGE, 0x77) == 0
    fallocate(gmem, KEEP_AND_PUNCH, 0, 5 * PAGE)
    assert swap(program, HIGH + PAGE, 0x78) == 0x77
    fallocate(gmem, KEEP_AND_PUNCH, 5 * PAGE, PAGE)
    assert swap(program, HIGH + PAGE, 0x79) == 0


def test_private_access_without_a_private_side(boot: Boot) -> None:
    program = boot(SWAP)
    shared = program.process.ranges.allocate(SIZE)
    program.slot(1, HIGH, SIZE, shared.address)
    program.attributes(HIGH, SIZE, PRIVATE)
    faults(program, HIGH + 8)
    program.attributes(HIGH, SIZE, 0)
    assert swap(program, HIGH + 8, 1) == 0


def test_private_access_where_the_slot_is_gone(boot: Boot) -> None:
    """private_mem_kvm_exits_test of the kernel's selftests."""
    program = boot(SWAP)
    gmem, address = with_slot(program)
    program.attributes(HIGH, SIZE, PRIVATE)
    assert swap(program, HIGH, 0x11) == 0
    program.slot(1, HIGH, 0, 0)
    faults(program, HIGH)
    program.slot(1, HIGH, SIZE, address, gmem=gmem)
    assert swap(program, HIGH, 0x12) == 0x11, "the bytes are the file's"
    program.slot(1, HIGH, 0, 0)
    program.slot(7, HIGH + SIZE, SIZE, address, gmem=gmem)
    program.attributes(HIGH + SIZE, SIZE, PRIVATE)
    assert swap(program, HIGH + SIZE, 0x13) == 0x12, "wherever they are bound"


def test_the_last_close_takes_the_memory(boot: Boot, mounted: Mounted) -> None:
    program = boot(SWAP)
    gmem, _ = with_slot(program)
    program.attributes(HIGH, SIZE, PRIVATE)
    assert swap(program, HIGH, 0x11) == 0
    other = os.dup(gmem)
    os.close(gmem)
    assert swap(program, HIGH, 0x12) == 0x11
    program.extra.remove(gmem)
    os.close(other)
    until(lambda: mounted.ask("status")["memory"]["used"] == 0, "the memory is given back")
    faults(program, HIGH)
    program.slot(1, HIGH, 0, 0)


def test_memory_attributes_of_a_vm_without_private_memory(boot: Boot) -> None:
    program = boot(SWAP, type=0)
    with pytest.raises(OSError, match="not supported") as caught:
        program.attributes(HIGH, SIZE, PRIVATE)
    assert caught.value.errno == errno.EINVAL
    _, address = with_slot(program)
    assert swap(program, HIGH, 0x66) == 0
    assert program.process.caller.read(address, 1) == b"\x66", "the file is never touched"


def test_conversion_as_the_guest_asks(boot: Boot) -> None:
    """private_mem_conversions_test of the kernel's selftests, in small."""
    program = boot(SWAP, MAP_GPA_RANGE)
    gmem, address = with_slot(program)
    program.ioctl(
        program.vm, requests.KVM_ENABLE_CAP, structs.ENABLE_CAP, KVM_CAP_EXIT_HYPERCALL, 0,
        1 << 12, 0, 0, 0,
    )  # fmt: skip
    caller = program.process.caller
    asking = program.vcpus[1]

    def convert(page: int, npages: int, *, private: bool) -> None:
        gpa = HIGH + page * PAGE
        program.set_regs(
            asking, rip=TEXT + PAGE, rsi=gpa, rdx=npages, r8=int(private) << 4
        )  # fmt: skip
        left = program.run(asking)
        assert isinstance(left, exits.HypercallExit)
        assert left.args[:3] == (gpa, npages, int(private) << 4)
        if not private:
            fallocate(gmem, KEEP_AND_PUNCH, page * PAGE, npages * PAGE)
        program.attributes(gpa, npages * PAGE, PRIVATE if private else 0)
        if private:
            fallocate(gmem, 1, page * PAGE, npages * PAGE)
        program.run_buffer(asking)[32 + 56 : 32 + 64] = bytes(8)
        assert program.ucall(asking) == 0

    for page in range(NPAGES):
        caller.write(address + page * PAGE, bytes([0xA0 + page]) * 8)
    convert(0, NPAGES, private=True)
    for page in range(NPAGES):
        assert swap(program, HIGH + page * PAGE, 0xB0 + page) == 0
        shared = caller.read(address + page * PAGE, 8)
        assert shared == bytes([0xA0 + page]) * 8
    convert(4, 4, private=False)
    for page in range(NPAGES):
        expected = int.from_bytes(bytes([0xA0 + page]) * 8, "little")
        if page not in range(4, 8):
            expected = 0xB0 + page
        assert swap(program, HIGH + page * PAGE, 0xC0 + page) == expected
    convert(4, 4, private=True)
    for page in range(4, 8):
        assert swap(program, HIGH + page * PAGE, 0) == 0, "punched before"


@pytest.mark.parametrize("private", [False, True])
def test_an_answered_instruction_may_have_to_wait_for_its_page(boot: Boot, private: bool) -> None:
    """INS into memory that was never touched, completed under immediate_exit."""
    program = boot(bytes.fromhex("ba05000000" + "6c" + "f4"))  # mov edx, 5; insb; hlt
    _, address = with_slot(program)
    if private:
        program.attributes(HIGH, SIZE, PRIVATE)
    vcpu = program.vcpus[0]
    program.set_regs(vcpu, rdi=HIGH)
    assert program.run(vcpu) == exits.IoExit(5, 1, False)
    run = program.run_buffer(vcpu)
    run[PAGE], run[1] = 0x5A, 1
    with pytest.raises(OSError, match="immediate_exit") as caught:
        program.process.ioctl(vcpu, KVM_RUN)
    assert caught.value.errno == errno.EINTR
    regs = program.regs(vcpu)
    assert (regs["rip"], regs["rdi"]) == (TEXT + 6, HIGH + 1)
    if not private:
        assert program.process.caller.read(address, 1) == b"\x5a"
    run[1] = 0
    assert program.run(vcpu) == exits.HltExit()


# --- faults beforehand --------------------------------------------------------------------------


def pre_fault(program: Program, gpa: int, size: int, flags: int = 0) -> tuple[int, int, int]:
    """KVM_PRE_FAULT_MEMORY: errno, gpa, size."""
    space = ctypes.create_string_buffer(PRE_FAULT_MEMORY.pack(gpa, size, flags), 64)
    number = 0
    try:
        program.process.ioctl(program.vcpus[0], KVM_PRE_FAULT_MEMORY, space)
    except OSError as error:
        number = error.errno or -1
    left = struct.unpack_from("<QQ", space.raw)
    return (number, *left)


@pytest.mark.parametrize("private", [True, False])
def test_a_range_is_mapped_before_the_guest_runs(boot: Boot, private: bool) -> None:
    """pre_fault_memory_test of the kernel's selftests."""
    program = boot(SWAP)
    with_slot(program)
    if private:
        program.attributes(HIGH, SIZE, PRIVATE)
    vm = program.process.caller.objects[program.vm]
    gpa, size, number = HIGH, SIZE + PAGE, 0
    while size and not number:
        number, gpa, size = pre_fault(program, gpa, size)
    assert (number, gpa, size) == (errno.ENOENT, HIGH + SIZE, PAGE)
    found = vm.running.vm.statistics()  # type: ignore[attr-defined]
    assert found.installed_pages >= NPAGES
    before = found.faults
    assert swap(program, HIGH + PAGE, 1) == 0
    after = vm.running.vm.statistics().faults  # type: ignore[attr-defined]
    data_faults = after - before
    assert data_faults <= 12, "only the guest's own code and tables"


def test_what_cannot_be_mapped_beforehand(boot: Boot) -> None:
    program = boot(SWAP)
    with_slot(program)
    assert pre_fault(program, HIGH, PAGE, 1)[0] == errno.EINVAL
    assert pre_fault(program, HIGH, 0)[0] == errno.EINVAL
    assert pre_fault(program, HIGH + 1, PAGE)[0] == errno.EINVAL
    assert pre_fault(program, HIGH, PAGE + 1)[0] == errno.EINVAL
    assert pre_fault(program, (1 << 64) - PAGE, 2 * PAGE)[0] == errno.EINVAL
    assert pre_fault(program, HIGH + SIZE, PAGE) == (errno.ENOENT, HIGH + SIZE, PAGE)
    with pytest.raises(OSError, match="cannot be reached") as caught:
        program.process.ioctl(program.vcpus[0], KVM_PRE_FAULT_MEMORY, 8)
    assert caught.value.errno == errno.EFAULT


# --- a page that does not come ------------------------------------------------------------------


def waits(mounted: Mounted) -> int:
    return sum(row["unacknowledged"] for row in mounted.ask("status")["sessions"])


def test_a_run_and_a_pre_fault_that_wait_for_a_page_can_be_cancelled(
    boot: Boot, mounted: Mounted, actor: Cast
) -> None:
    program = boot(SWAP)
    path = mounted.path / "ram"
    path.touch()
    os.truncate(path, SIZE)
    fd = os.open(path, os.O_RDWR)
    program.extra.append(fd)
    program.slot(1, HIGH, SIZE, 0, gmem=fd)
    program.attributes(HIGH, SIZE, PRIVATE)
    assert swap(program, HIGH, 0x21) == 0
    held = actor("light_user", path, "held", "held")
    held.expect("ready")
    punching = actor("storm", path, "0", "1", "1", "0")
    until(lambda: waits(mounted) == 1, "one has not acknowledged")

    vcpu = program.vcpus[0]
    caller = program.process.caller
    device = caller.objects[vcpu]
    program.set_regs(vcpu, rip=TEXT, rdi=HIGH, rsi=0x22)
    begun = device.ioctl(KVM_RUN, 0, caller)
    assert isinstance(begun, Begun)
    until(lambda: device.engine.state is State.WAITS, "the fault is parked")  # type: ignore[attr-defined]
    begun.pending.cancel()
    outcome = begun.pending.wait(20)
    assert isinstance(outcome, Failure)
    assert outcome.errno == errno.EINTR

    space = ctypes.create_string_buffer(PRE_FAULT_MEMORY.pack(HIGH, PAGE, 0), 64)
    mapping = device.ioctl(KVM_PRE_FAULT_MEMORY, ctypes.addressof(space), caller)
    assert isinstance(mapping, Begun)
    assert mapping.pending.wait(0.05) is None
    mapping.pending.cancel()
    outcome = mapping.pending.wait(20)
    assert isinstance(outcome, Failure)
    assert outcome.errno == errno.EINTR

    again = device.ioctl(KVM_RUN, 0, caller)
    assert isinstance(again, Begun)
    held.send("ack")
    punching.expect("done 1 0")
    assert again.pending.wait(20) == Value(0)
    assert program.regs(vcpu)["rdi"] == 0, "punched"
    mounted.audit()


# --- other kinds --------------------------------------------------------------------------------


def test_the_interface_of_the_series(mount: Mounter) -> None:
    """v7: an ordinary private file, KVM_MEM_PRIVATE, REG_REGION on gpas, exit 37 that returns 0."""
    mounted = mount("personality=v7")
    path = mounted.path / "ram"
    path.touch()
    os.truncate(path, SIZE)
    with Program(mounted.path, abi="v7") as program:
        fd = os.open(path, os.O_RDWR)
        program.extra.append(fd)
        program.boot(SWAP, gpa_bits=SHARED_BIT)
        shared = program.process.ranges.allocate(SIZE)
        program.slot(1, HIGH, SIZE, shared.address, gmem=fd)
        program.slot(2, HIGH + SIZE, SIZE, 0, gmem=fd)  # v7 lets two slots share pages
        vcpu = program.vcpus[0]
        assert swap(program, HIGH, 0x31) == 0
        assert shared.read(0, 1) == b"\x31"
        program.ioctl(program.vm, KVM_MEMORY_ENCRYPT_REG_REGION, ENC_REGION, HIGH, SIZE)
        program.set_regs(vcpu, rip=TEXT, rdi=HIGH, rsi=0)
        program.process.ioctl(vcpu, KVM_RUN)  # returns 0
        run = program.run_buffer(vcpu)
        assert int.from_bytes(run[8:12], "little") == 37
        assert struct.unpack_from("<IIQQ", run, 32) == (0, 0, HIGH, PAGE)
        program.ioctl(program.vm, KVM_MEMORY_ENCRYPT_UNREG_REGION, ENC_REGION, HIGH, SIZE)
        assert program.ucall(vcpu) == 0x31
        with pytest.raises(OSError, match="no private files"):
            program.guest_memfd(SIZE)
        with pytest.raises(OSError, match="v7") as caught:
            program.attributes(HIGH, SIZE, PRIVATE)
        assert caught.value.errno == errno.ENOTTY
        closed = {"slot": 3, "gpa": 2 * HIGH, "size": SIZE, "address": 0, "gmem": 999}
        with pytest.raises(OSError, match="not open") as caught:
            program.slot(**closed)
        assert caught.value.errno == errno.EINVAL


def test_a_guest_with_a_shared_bit(boot: Boot) -> None:
    """The address says which side is meant; the attribute says which one is right."""
    program = boot(SWAP, type=30, gpa_bits=SHARED_BIT)
    with_slot(program)
    vcpu = program.vcpus[0]

    def leaves(linear: int, *, private: bool) -> None:
        program.set_regs(vcpu, rip=TEXT, rdi=linear, rsi=0)
        assert program.run(vcpu) == exits.MemoryFaultExit(HIGH, PAGE, private, errno.EFAULT)

    assert swap(program, HIGH, 0x41) == 0
    leaves(PLAIN, private=True)
    program.attributes(HIGH, SIZE, PRIVATE)
    leaves(HIGH, private=False)
    assert swap(program, PLAIN, 0x42) == 0
    program.attributes(HIGH, SIZE, 0)
    assert swap(program, HIGH, 0x43) == 0x41


def test_a_file_of_a_mount_that_is_gone_is_refused(mount: Mounter) -> None:
    mounted = mount("personality=guest_memfd")
    with Program(mounted.path, type=KVM_X86_SW_PROTECTED_VM) as program:
        gmem = program.guest_memfd(SIZE)
        mounted.kill()
        refused(program, errno.EINVAL, gmem=gmem)
        with pytest.raises(OSError, match="KVM_CREATE_GUEST_MEMFD") as caught:
            program.guest_memfd(SIZE)
        assert caught.value.errno == errno.ENOTCONN


# --- the end of the owner, the top of memory, the documentation ---------------------------------


@pytest.mark.logs("the owner")
def test_without_its_owner_a_vm_is_dead(mount: Mounter) -> None:
    mounted = mount("personality=guest_memfd")
    with Program(mounted.path, type=KVM_X86_SW_PROTECTED_VM) as program:
        program.boot(SWAP, bytes.fromhex("ebfe"))
        gmem, _ = with_slot(program)
        program.attributes(HIGH, SIZE, PRIVATE)
        assert swap(program, HIGH, 1) == 0
        spinning = program.vcpus[1]
        caller = program.process.caller
        begun = caller.objects[spinning].ioctl(KVM_RUN, 0, caller)
        assert isinstance(begun, Begun)
        mounted.kill()
        outcome = begun.pending.wait(30)
        assert isinstance(outcome, Failure)
        assert outcome.errno == errno.EIO
        for fd, request in ((program.vm, KVM_CHECK_EXTENSION), (spinning, KVM_RUN)):
            with pytest.raises(OSError, match="owner") as caught:
                program.process.ioctl(fd, request)
            assert caught.value.errno == errno.EIO
        assert program.ioctl(program.kvm, KVM_CHECK_EXTENSION, None, KVM_CAP_GUEST_MEMFD) == 1
        assert gmem in program.extra


@pytest.mark.parametrize("type", [0, KVM_X86_SW_PROTECTED_VM])
def test_memory_at_the_end_of_what_the_guest_can_address(boot: Boot, type: int) -> None:
    """Where pre_fault_memory_test of the kernel's selftests puts its slot."""
    program = boot(SWAP, type=type)
    assert program.ram is not None
    top = (1 << 40) - SIZE
    program.ram.write(0x5000, struct.pack("<Q", top & -(1 << 21) | 0x87))
    _, address = with_slot(program, gpa=top)
    if type:
        program.attributes(top, SIZE, PRIVATE)
    assert pre_fault(program, top, SIZE + PAGE)[0] == 0
    linear = HIGH + (1 << 30) + (top & (1 << 21) - 1)
    assert swap(program, linear, 0x99) == 0
    assert swap(program, linear, 0x9A) == 0x99
    assert program.process.caller.read(address, 1) == (b"\0" if type else b"\x9a")
    with pytest.raises(OSError, match="beyond"):
        program.slot(5, 1 << 40, PAGE, 0)


def test_the_example_of_the_documentation_runs(
    mounted: Mounted, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "ioctls.md").read_text()
    (example,) = page.split("```python\n")[1:]
    exec(example.split("```")[0], {"folder": mounted.path})
    assert capsys.readouterr().out == "42\n"
