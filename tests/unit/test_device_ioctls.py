# SPDX-License-Identifier: GPL-2.0-or-later
"""What each level of the simulated device answers and refuses, without a guest that runs."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import device_msrs
import pytest
from device_errors import BAD, ERRORS, POINTERS, U64, VCPU_IDS, WRONG_LEVEL
from device_program import PAGE, STACK, TEXT, Program, buffer

from hwemu.arena import ArenaFullError
from kvmsim import uapi
from kvmsim.api import IoctlError, Kvm, Simulation
from kvmsim.device import irqchip
from kvmsim.device.local import LocalCaller, LocalProcess
from kvmsim.device.results import Failure
from kvmsim.device.system import KvmDevice
from kvmsim.device.table import NAMES
from kvmsim.uapi import capabilities as cap
from kvmsim.uapi import requests, structs


@pytest.fixture(scope="module")
def shared() -> Iterator[Program]:
    """One VM with one vCPU, for what changes nothing."""
    with Program() as program:
        program.add_vcpu(0)
        yield program


@pytest.fixture
def program() -> Iterator[Program]:
    with Program() as program:
        yield program


def number(program: Program, level: str, request: int, argument: object = 0) -> int:
    """What an ioctl fails with, 0 if it does not."""
    fd = {"system": program.kvm, "vm": program.vm, "vcpu": (program.vcpus or [-1])[0]}[level]
    if isinstance(argument, bytes):
        argument = ctypes.create_string_buffer(argument, max(len(argument), 1))
    try:
        program.process.ioctl(fd, request, argument)  # type: ignore[arg-type]
    except OSError as error:
        return error.errno or -1
    return 0


# --- tables of errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "request_"), [(level, one) for level, many in POINTERS.items() for one in many]
)
def test_bad_pointers(shared: Program, level: str, request_: int) -> None:
    assert number(shared, level, request_, BAD) == errno.EFAULT
    assert number(shared, level, request_, U64) == errno.EFAULT


@pytest.mark.parametrize(("level", "request_", "argument", "expected"), ERRORS)
def test_errors(
    shared: Program, level: str, request_: int, argument: object, expected: int
) -> None:
    assert number(shared, level, request_, argument) == expected


@pytest.mark.parametrize(("level", "request_", "expected"), WRONG_LEVEL)
@pytest.mark.logs("is not simulated")
def test_requests_of_another_level(
    shared: Program, level: str, request_: int, expected: int
) -> None:
    assert number(shared, level, request_) == expected


def test_a_request_of_another_driver(shared: Program) -> None:
    assert number(shared, "vcpu", 0x5401) == errno.EINVAL


# --- the system ---------------------------------------------------------------------------------


def test_the_system_says_what_it_is(shared: Program) -> None:
    assert shared.ioctl(shared.kvm, uapi.KVM_GET_API_VERSION) == 12
    assert shared.ioctl(shared.kvm, uapi.KVM_GET_VCPU_MMAP_SIZE) == 3 * PAGE
    assert shared.ioctl(shared.kvm, uapi.KVM_CHECK_EXTENSION, None, cap.KVM_CAP_MAX_VCPUS) == 256
    assert shared.ioctl(shared.vm, uapi.KVM_CHECK_EXTENSION, None, uapi.KVM_CAP_NR_MEMSLOTS) == (
        32764
    )
    assert shared.ioctl(shared.vm, uapi.KVM_CHECK_EXTENSION, None, 12345) == 0
    types = shared.ioctl(shared.kvm, uapi.KVM_CHECK_EXTENSION, None, uapi.KVM_CAP_VM_TYPES)
    assert types == 1 << 30 | 0b11_0011
    khz = shared.ioctl(shared.vm, requests.KVM_GET_TSC_KHZ)
    assert 100_000 < khz < 10_000_000
    assert shared.ioctl(shared.vcpus[0], requests.KVM_GET_TSC_KHZ) == khz


def test_lists_tell_how_long_they_are(shared: Program) -> None:
    space = ctypes.create_string_buffer(structs.MSR_LIST.pack(0), 4)
    with pytest.raises(OSError, match="indices"):
        shared.process.ioctl(shared.kvm, requests.KVM_GET_MSR_INDEX_LIST, space)
    (count,) = structs.MSR_LIST.unpack(space.raw)
    data = shared.get(
        shared.kvm, requests.KVM_GET_MSR_INDEX_LIST, 4 + 4 * count, structs.MSR_LIST.pack(count)
    )
    indices = struct.unpack(f"<{count}I", data[4:])
    assert {0x10, 0xC000_0080, 0x277} <= set(indices)
    assert len(set(indices)) == count


def test_registers_that_are_listed_take_their_own_value(program: Program) -> None:
    program.add_vcpu(0)
    listed = device_msrs.listed(partial(device_msrs.ours, program))
    assert {0xFE, 0x179}.isdisjoint(listed), "nobody can write them"
    for index in (0xFE, 0x179):
        assert device_msrs.read(partial(device_msrs.ours, program), index) is not None


def test_machine_check_registers_are_as_they_were_set_up(program: Program) -> None:
    program.add_vcpu(0)
    device_msrs.check_machine_check(partial(device_msrs.ours, program))


def test_the_hardware_configuration_of_amd(program: Program) -> None:
    program.add_vcpu(0)
    device_msrs.check_hwcr(partial(device_msrs.ours, program))


def test_attributes_of_the_system(program: Program) -> None:
    for group, attribute in ((0, 0), (1, 0)):
        space = ctypes.create_string_buffer(b"\xff" * 8, 8)
        address = ctypes.addressof(space)
        program.ioctl(
            program.kvm, requests.KVM_GET_DEVICE_ATTR, structs.DEVICE_ATTR, 0, group, attribute,
            address,
        )  # fmt: skip
        assert space.raw == bytes(8), "no XSAVE; no features of a VMSA to choose"
    with Program(abi="v7") as old, pytest.raises(OSError, match="no attribute 0 in group 1"):
        old.ioctl(old.kvm, requests.KVM_HAS_DEVICE_ATTR, structs.DEVICE_ATTR, 0, 1, 0, 0)


def test_feature_registers_are_read_up_to_the_first_unknown(shared: Program) -> None:
    data = structs.MSRS.pack(3) + b"".join(
        structs.MSR_ENTRY.pack(index, 0) for index in (0x8B, 0x12345, 0xCE)
    )
    space = ctypes.create_string_buffer(data, len(data))
    assert shared.process.ioctl(shared.kvm, requests.KVM_GET_MSRS, space) == 1
    assert struct.unpack_from("<Q", space.raw, 16)[0] == 0x0100_0065


# --- vCPU state ---------------------------------------------------------------------------------


def test_state_that_was_set_is_read_back(program: Program) -> None:
    vcpu = program.add_vcpu(7)
    values = range(0x100, 0x100 + 17)
    regs = structs.REGS.pack(*values, 0x202)
    program.put(vcpu, requests.KVM_SET_REGS, regs)
    assert program.get(vcpu, requests.KVM_GET_REGS, len(regs)) == regs
    program.start_at(vcpu, TEXT, STACK)
    sregs = program.get(vcpu, requests.KVM_GET_SREGS, structs.SREGS_SIZE)
    program.put(vcpu, requests.KVM_SET_SREGS, sregs)
    assert program.get(vcpu, requests.KVM_GET_SREGS, structs.SREGS_SIZE) == sregs
    sregs2 = program.get(vcpu, requests.KVM_GET_SREGS2, structs.SREGS2_SIZE)
    assert sregs2[:280] == sregs[:280]
    program.put(vcpu, requests.KVM_SET_SREGS2, sregs2)
    fpu = program.get(vcpu, requests.KVM_GET_FPU, structs.FPU.size)
    fpu = fpu[:152] + bytes(range(256)) + fpu[408:]
    program.put(vcpu, requests.KVM_SET_FPU, fpu)
    assert program.get(vcpu, requests.KVM_GET_FPU, structs.FPU.size) == fpu
    xsave = program.get(vcpu, requests.KVM_GET_XSAVE, structs.XSAVE_SIZE)
    assert xsave[160:416] == bytes(range(256))
    assert xsave == program.get(vcpu, requests.KVM_GET_XSAVE2, structs.XSAVE_SIZE)
    program.put(vcpu, requests.KVM_SET_XSAVE, xsave)
    assert program.get(vcpu, requests.KVM_GET_XSAVE, structs.XSAVE_SIZE) == xsave
    debug = structs.DEBUGREGS.pack(1, 2, 3, 4, 0xFFFF0FF0, 0x400, 0)
    program.put(vcpu, requests.KVM_SET_DEBUGREGS, debug)
    assert program.get(vcpu, requests.KVM_GET_DEBUGREGS, len(debug)) == debug
    assert program.get(vcpu, requests.KVM_GET_XCRS, structs.XCRS_SIZE) == bytes(392)


def test_the_state_after_reset_is_the_processors(program: Program) -> None:
    program.vcpus.append(program.ioctl(program.vm, uapi.KVM_CREATE_VCPU, None, 0))
    vcpu = program.vcpus[0]
    regs = program.regs(vcpu)
    assert (regs["rip"], regs["rdx"], regs["rflags"]) == (0xFFF0, 0x600, 2)
    sregs = program.get(vcpu, requests.KVM_GET_SREGS, structs.SREGS_SIZE)
    assert structs.SEGMENT.unpack(sregs[:24])[:3] == (0xFFFF_0000, 0xFFFF, 0xF000)
    assert structs.DTABLE.unpack(sregs[192:208]) == (0, 0xFFFF)
    cr0, *_, apic_base = structs.SREGS_CONTROL.unpack(sregs[224:280])
    assert (cr0, apic_base) == (0x6000_0010, 0xFEE0_0900)
    room = structs.CPUID2.pack(100)
    cpuid = program.get(vcpu, requests.KVM_GET_CPUID2, 8 + 4000, room)
    assert structs.CPUID2.unpack_from(cpuid) == (0,), "none before it is set"


def test_registers_of_the_processor_are_written_up_to_the_first_refusal(program: Program) -> None:
    vcpu = program.add_vcpu(0)
    wanted = ((0xC000_0081, 5), (0x277, 0x0606_0606_0606_0606), (0x277, 0xFF), (0x175, 1))
    entries = b"".join(structs.MSR_ENTRY.pack(*one) for one in wanted)
    assert program.put(vcpu, requests.KVM_SET_MSRS, structs.MSRS.pack(4) + entries) == 2
    data = structs.MSRS.pack(3) + b"".join(
        structs.MSR_ENTRY.pack(index, 0) for index in (0xC000_0081, 0x277, 0x175)
    )
    space = ctypes.create_string_buffer(data, len(data))
    assert program.process.ioctl(vcpu, requests.KVM_GET_MSRS, space) == 3
    values = [value for _, value in structs.MSR_ENTRY.iter_unpack(space.raw[8:])]
    assert values == [5, 0x0606_0606_0606_0606, 0]


def test_addresses_are_translated(program: Program) -> None:
    program.boot(b"\xf4")
    vcpu = program.vcpus[0]
    for linear, valid in ((TEXT, 1), (1 << 32, 1), (1 << 46, 0)):
        space = buffer(structs.TRANSLATION, linear, 0, 0, 0, 0)
        program.process.ioctl(vcpu, requests.KVM_TRANSLATE, space)
        found = structs.TRANSLATION.unpack(space.raw)
        assert found[:3] == (linear, linear if valid else U64, valid)


def test_the_clock_goes_on_from_where_it_is_set(program: Program) -> None:
    clock = program.get(program.vm, requests.KVM_GET_CLOCK, structs.CLOCK_DATA.size)
    now, flags, realtime, tsc = structs.CLOCK_DATA.unpack(clock)
    assert flags == 0b1110
    assert realtime
    assert tsc
    later = now + (1 << 50)
    program.put(program.vm, requests.KVM_SET_CLOCK, structs.CLOCK_DATA.pack(later, 0, 0, 0))
    clock = program.get(program.vm, requests.KVM_GET_CLOCK, structs.CLOCK_DATA.size)
    assert structs.CLOCK_DATA.unpack(clock)[0] >= later


def test_no_interrupt_is_promised(shared: Program, caplog: pytest.LogCaptureFixture) -> None:
    """Without KVM_CREATE_IRQCHIP; what a program may ask before says that there is nothing."""
    caplog.set_level("INFO", "kvmsim.device.irqchip")
    for request, rule in irqchip.RULES.items():
        argument = bytes(structs.IRQCHIP.size)
        assert number(shared, "vm", request, argument) == rule.number, rule
        assert NAMES[request] in caplog.text
    for capability in (cap.KVM_CAP_IRQCHIP, 33, 32, 36, 67, 77):  # PIT2, IRQFD, IOEVENTFD, …MSI
        assert shared.ioctl(shared.vm, uapi.KVM_CHECK_EXTENSION, None, capability) == 0


def test_chips_come_before_vcpus(program: Program) -> None:
    assert number(program, "vm", requests.KVM_CREATE_IRQCHIP) == 0
    assert number(program, "vm", requests.KVM_CREATE_IRQCHIP) == errno.EEXIST
    for request, rule in irqchip.RULES.items():
        argument = bytes(structs.IRQCHIP.size)
        expected = rule.number if rule.always else errno.EOPNOTSUPP
        assert number(program, "vm", request, argument) == expected, rule
    assert number(program, "vm", requests.KVM_SET_BOOT_CPU_ID, 3) == 0
    for id in (0, 3):
        program.add_vcpu(id)
    states = [program.get(vcpu, requests.KVM_GET_MP_STATE, 4)[0] for vcpu in program.vcpus]
    assert states == [1, 0], "the boot CPU runs, the other waits for INIT"
    assert number(program, "vcpu", requests.KVM_INTERRUPT, structs.INTERRUPT.pack(1)) == (
        errno.ENXIO
    )
    lapic = program.get(program.vcpus[1], requests.KVM_GET_LAPIC, 1024)
    assert struct.unpack_from("<I", lapic, 0x20)[0] == 3 << 24
    program.put(program.vcpus[1], requests.KVM_SET_LAPIC, bytes(1024))
    assert program.get(program.vcpus[1], requests.KVM_GET_LAPIC, 1024) == bytes(1024)


def test_a_limit_on_vcpu_ids(program: Program) -> None:
    def limit(value: int) -> int:
        data = structs.ENABLE_CAP.pack(cap.KVM_CAP_MAX_VCPU_ID, 0, value, 0, 0, 0)
        return number(program, "vm", requests.KVM_ENABLE_CAP, data)

    assert limit(2) == 0
    assert limit(3) == errno.EINVAL
    assert limit(2) == 0
    assert number(program, "vm", uapi.KVM_CREATE_VCPU, 2) == errno.EINVAL
    program.add_vcpu(1)


def test_ids_of_the_boot_cpu_and_its_limit(program: Program) -> None:
    for request, argument, expected in VCPU_IDS:
        assert number(program, "vm", request, argument) == expected, (request, argument)


def test_there_is_an_end_of_vcpus(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmsim.device.vm.MAX_VCPUS", 2)
    program.add_vcpu(0)
    program.add_vcpu(1)
    assert number(program, "vm", uapi.KVM_CREATE_VCPU, 2) == errno.EINVAL


@pytest.mark.logs("out of memory")
def test_a_slot_that_cannot_be_mapped_is_not_made(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise ArenaFullError("no free stretch")

    memory = program.process.ranges.allocate(PAGE)
    with monkeypatch.context() as patched:
        patched.setattr(program.device.host, "place", full)
        with pytest.raises(OSError, match="free stretch") as caught:
            program.slot(1, 1 << 32, PAGE, memory.address)
        assert caught.value.errno == errno.ENOMEM
    with pytest.raises(OSError, match="no such slot"):
        program.slot(1, 0, 0, 0)
    program.slot(1, 1 << 32, PAGE, memory.address)


def test_without_a_mount_there_are_no_private_files(tmp_path: Path) -> None:
    """None is made of what anybody could read."""
    for folder, in_place in ((tmp_path, False), (tmp_path / "missing", False), (tmp_path, True)):
        with Program(folder, type=uapi.KVM_X86_SW_PROTECTED_VM, in_place=in_place) as program:
            for fd in (program.kvm, program.vm):
                for one in (uapi.KVM_CAP_GUEST_MEMFD, uapi.KVM_CAP_GUEST_MEMFD_FLAGS):
                    assert program.ioctl(fd, uapi.KVM_CHECK_EXTENSION, None, one) == 0
            with pytest.raises(OSError, match="make one with: privfs mount DIR") as caught:
                program.guest_memfd(PAGE)
            assert caught.value.errno == errno.ENOTTY
    assert not list(tmp_path.iterdir())


def test_the_api_says_how_to_mount(tmp_path: Path) -> None:
    with Kvm(Simulation(tmp_path)) as kvm, kvm.create_vm() as vm:
        with pytest.raises(IoctlError, match="make one with: privfs mount DIR") as caught:
            vm.create_guest_memfd(PAGE)
        assert caught.value.errno == errno.ENOTTY
        assert str(tmp_path) in str(caught.value)


# --- address spaces and descriptors -------------------------------------------------------------


class Child(LocalCaller):
    @property
    def mm(self) -> str:
        return "child"


def test_another_address_space_gets_eio(shared: Program) -> None:
    child = Child(shared.process.ranges, shared.process.caller.objects)
    objects = shared.process.caller.objects
    for fd in (shared.vm, shared.vcpus[0]):
        result = objects[fd].ioctl(uapi.KVM_CHECK_EXTENSION, 0, child)
        assert isinstance(result, Failure)
        assert result.errno == errno.EIO
    assert not isinstance(objects[shared.kvm].ioctl(uapi.KVM_GET_API_VERSION, 0, child), Failure), (
        "/dev/kvm is everybody's"
    )


def test_nothing_is_left_of_a_process() -> None:
    before = set(os.listdir("/proc/self/fd"))
    device = KvmDevice()
    process = LocalProcess(device)
    kvm = process.open()
    vm = process.ioctl(kvm, uapi.KVM_CREATE_VM)
    process.ioctl(vm, uapi.KVM_CREATE_VCPU, 0)
    memory = process.ranges.allocate(PAGE)
    region = buffer(uapi.USERSPACE_MEMORY_REGION, 0, 0, 0, PAGE, memory.address)
    process.ioctl(vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
    with pytest.raises(RuntimeError, match="open descriptors"):
        device.close()
    process.close_all()
    device.close()
    assert set(os.listdir("/proc/self/fd")) == before


# --- slots --------------------------------------------------------------------------------------


def test_as_many_slots_as_there_can_be(program: Program) -> None:
    """set_memory_region_test of the kernel's selftests, on fewer slots and then the last one."""
    memory = program.process.ranges.allocate(1 << 20)
    for slot in range(200):
        program.slot(slot, slot * PAGE, PAGE, memory.address + slot * PAGE)
    program.slot(32763, 1 << 30, PAGE, memory.address)
    for slot in (32764, 32768, 0xFFFF, 1 << 16):
        with pytest.raises(OSError, match="slot") as caught:
            program.slot(slot, 1 << 31, PAGE, memory.address)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="overlap") as caught:
        program.slot(300, 0, PAGE, memory.address)
    assert caught.value.errno == errno.EEXIST
    for slot in range(200):
        program.slot(slot, 0, 0, 0)


def test_flags_of_slots(program: Program) -> None:
    memory = program.process.ranges.allocate(PAGE)
    for bit in range(32):
        if bit < 2:
            program.slot(1, 1 << 30, PAGE, memory.address, flags=1 << bit)
            program.slot(1, 0, 0, 0)
            continue
        with pytest.raises(OSError, match="flags") as caught:
            program.slot(1, 1 << 30, PAGE, memory.address, flags=1 << bit)
        assert caught.value.errno == errno.EINVAL


def test_a_slot_that_moves_keeps_its_memory(program: Program) -> None:
    program.boot(bytes.fromhex("488b07e404f4"), bytes.fromhex("f4"))  # mov rax, [rdi]; in al, 4
    memory = program.process.ranges.allocate(PAGE)
    memory.write(0, b"\x11\x22")
    high = 1 << 32
    program.slot(1, high, PAGE, memory.address)
    vcpu = program.vcpus[0]
    for gpa in (high, high + PAGE, high):
        program.slot(1, gpa, PAGE, memory.address)
        program.set_regs(vcpu, rip=TEXT, rdi=gpa)
        program.ucall(vcpu)
        assert program.regs(vcpu)["rax"] & 0xFFFF == 0x2211
    other = program.process.ranges.allocate(PAGE)
    with pytest.raises(OSError, match="userspace side") as caught:
        program.slot(1, high, PAGE, other.address)
    assert caught.value.errno == errno.EINVAL
