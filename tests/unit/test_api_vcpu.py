# SPDX-License-Identifier: GPL-2.0-or-later
"""What the API makes of a device's answers, with a device that answers what the test says."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator
from typing import Literal

import pytest

from kvmsim import exits
from kvmsim.api import IoctlError, Kvm, Memory, Regs, Vcpu
from kvmsim.api.guest import BOOT_PAGE, BOOT_SIZE, PML4, SHARED_VIEW, BootPage, Guest, Hypercall
from kvmsim.device.table import request_name
from kvmsim.uapi import (
    EHWPOISON,
    KVM_CREATE_GUEST_MEMFD,
    KVM_CREATE_VCPU,
    KVM_CREATE_VM,
    KVM_GET_API_VERSION,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_PIO_DATA_OFFSET,
    KVM_PRE_FAULT_MEMORY,
    KVM_RUN,
    KVM_RUN_MMAP_SIZE,
    KVM_RUN_UNION_OFFSET,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
    PAGE_SIZE,
    PRE_FAULT_MEMORY,
    RUN_HYPERCALL,
    RUN_MMIO,
    Abi,
)
from kvmsim.uapi.requests import KVM_GET_REGS, KVM_GET_SREGS, KVM_SET_REGS, KVM_SET_SREGS


class Bytes:
    """Memory that is a bytearray."""

    def __init__(self, size: int) -> None:
        self.address, self.size = 0x7F00_0000_0000, size
        self.data = bytearray(size)
        self.closed = False

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data

    def discard(self, offset: int, size: int) -> None:
        self.data[offset : offset + size] = bytes(size)

    def close(self) -> None:
        self.closed = True


class Script:
    """A transport that remembers every ioctl; KVM_RUN leaves with what the test queued."""

    name, abi = "script", "upstream"
    hypercall: Literal["vmcall", "vmmcall"] = "vmmcall"

    def __init__(self, abi: Abi = "upstream") -> None:
        self.abi: Abi = abi
        self.calls: list[tuple[int, int, int | bytes]] = []
        self.runs: deque[exits.Exit | int] = deque()
        self.immediate: list[bool] = []
        self.handles: list[int] = []
        self.memories: list[Bytes] = []
        self.regs = bytearray(144)
        self.sregs = bytearray(312)
        self.refuse: dict[int, int] = {}
        self.page = bytearray(KVM_RUN_MMAP_SIZE)
        self.closed = False
        self.bit = 0

    def open(self) -> int:
        return self._new()

    def _new(self) -> int:
        self.handles.append(len(self.calls) + 100)
        return self.handles[-1]

    def ioctl(self, handle: int, request: int, argument: int | bytearray = 0) -> int:
        assert handle in self.handles
        kept = argument if isinstance(argument, int) else bytes(argument)
        self.calls.append((handle, request, kept))
        if request in self.refuse:
            raise IoctlError(self.refuse[request], request_name(request))
        if request in (KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_CREATE_GUEST_MEMFD):
            return self._new()
        registers = {KVM_GET_REGS: self.regs, KVM_GET_SREGS: self.sregs}
        if isinstance(argument, bytearray) and request in registers:
            argument[:] = registers[request]
        if isinstance(argument, bytearray) and request == KVM_PRE_FAULT_MEMORY:
            gpa, size, flags = PRE_FAULT_MEMORY.unpack(argument)
            argument[:] = PRE_FAULT_MEMORY.pack(gpa + PAGE_SIZE, size - PAGE_SIZE, flags)
        if isinstance(argument, bytearray) and request == KVM_SET_REGS:
            self.regs[:] = argument
        if isinstance(argument, bytearray) and request == KVM_SET_SREGS:
            self.sregs[:] = argument
        return {KVM_GET_API_VERSION: 12, KVM_GET_VCPU_MMAP_SIZE: KVM_RUN_MMAP_SIZE}.get(request, 0)

    def shared_bit(self, type: int) -> int:
        return self.bit

    def open_file(self, path: object) -> int:
        return self._new()

    def map_run(self, vcpu: int, size: int) -> memoryview:
        assert size == KVM_RUN_MMAP_SIZE
        return memoryview(self.page)

    def run(self, vcpu: int) -> int:
        self.immediate.append(bool(self.page[1]))
        if self.page[1]:
            return -errno.EINTR
        left = self.runs.popleft()
        return left if isinstance(left, int) else exits.encode(left, self.page, self.abi)

    def finish(self, vcpu: int) -> None:
        self.immediate.append(bool(self.page[1]))

    def cancel(self, vcpu: int) -> None:
        self.runs.appendleft(-errno.EINTR)

    def allocate(self, size: int) -> Memory:
        self.memories.append(Bytes(size))
        return self.memories[-1]

    def map_file(self, file: int, offset: int, size: int) -> Memory:
        return self.allocate(size)

    def fallocate(self, file: int, mode: int, offset: int, size: int) -> None:
        self.calls.append((file, mode, offset))

    def fileno(self, file: int) -> int:
        return file

    def close_handle(self, handle: int) -> None:
        self.handles.remove(handle)

    def close(self) -> None:
        self.handles.clear()
        self.closed = True


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def kvm(script: Script) -> Iterator[Kvm]:
    with Kvm(script) as kvm:
        yield kvm


@pytest.fixture
def vcpu(kvm: Kvm) -> Vcpu:
    return kvm.create_vm().create_vcpu()


# --- exits --------------------------------------------------------------------------------------

EXITS: list[exits.Exit] = [
    exits.IoExit(0x80, 1, True, b"\x07"),
    exits.MmioExit(0x1000, 4, True, b"abcd"),
    exits.HltExit(),
    exits.HypercallExit(12, (1, 2, 3, 0, 0, 0)),
    exits.MemoryFaultExit(0x5000, 4096, True, errno.EFAULT),
    exits.MemoryFaultExit(0x5000, 4096, False, EHWPOISON),
    exits.BadHvaExit(0),
    exits.ShutdownExit(),
    exits.InternalErrorExit(1, (5, 6)),
]


@pytest.mark.parametrize("left", EXITS, ids=lambda left: type(left).__name__)
def test_an_exit_comes_as_it_was_told(script: Script, vcpu: Vcpu, left: exits.Exit) -> None:
    script.runs.append(left)
    assert vcpu.run() == left
    assert vcpu.exit == left


def test_an_interrupt_is_an_exit_whatever_the_last_reason_was(script: Script, vcpu: Vcpu) -> None:
    script.runs += [exits.HltExit(), -errno.EINTR]
    vcpu.run()
    assert vcpu.run() == exits.InterruptedExit()


def test_an_old_memory_fault_explains_no_later_error(script: Script, vcpu: Vcpu) -> None:
    script.runs += [exits.MemoryFaultExit(0x5000, 4096, True, errno.EFAULT), -errno.EFAULT]
    vcpu.run()
    assert vcpu.run() == exits.BadHvaExit(0)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOEXEC, errno.EINVAL])
def test_another_failure_is_an_error(script: Script, vcpu: Vcpu, number: int) -> None:
    script.runs.append(-number)
    with pytest.raises(IoctlError, match="KVM_RUN") as caught:
        vcpu.run()
    assert caught.value.errno == number
    assert vcpu.exit is None


def test_v7_answers_conversions_with_0() -> None:
    left = exits.MemoryFaultExit(0x5000, 4096, True, None)
    script = Script("v7")
    script.runs.append(left)
    with Kvm(script) as kvm:
        assert kvm.create_vm().create_vcpu().run() == left


# --- answers ------------------------------------------------------------------------------------


def test_a_read_of_a_port_is_answered(script: Script, vcpu: Vcpu) -> None:
    script.runs.append(exits.IoExit(0x3F8, 2, False, count=2))
    vcpu.run()
    vcpu.complete(b"wxyz")
    assert script.page[KVM_PIO_DATA_OFFSET : KVM_PIO_DATA_OFFSET + 4] == b"wxyz"


def test_a_read_of_a_device_is_answered(script: Script, vcpu: Vcpu) -> None:
    script.runs.append(exits.MmioExit(0x1000, 4, False))
    vcpu.run()
    vcpu.complete(b"wxyz")
    _, data, length, _ = RUN_MMIO.unpack_from(script.page, KVM_RUN_UNION_OFFSET)
    assert data[:length] == b"wxyz"


def test_a_hypercall_is_answered(script: Script, vcpu: Vcpu) -> None:
    script.runs.append(exits.HypercallExit(12, (1, 2, 3)))
    vcpu.run()
    vcpu.complete(0xFFFF_FFFF_FFFF_FFEA)
    assert RUN_HYPERCALL.unpack_from(script.page, KVM_RUN_UNION_OFFSET)[-2] == (1 << 64) - 22


@pytest.mark.parametrize(
    ("left", "data"),
    [
        (exits.HltExit(), b""),
        (exits.IoExit(0x80, 1, True, b"x"), b"y"),
        (exits.IoExit(0x80, 1, False), b"yy"),
        (exits.IoExit(0x80, 1, False), 1),
        (exits.MmioExit(0, 4, False), b"yyy"),
        (exits.MmioExit(0, 4, True, b"yyyy"), b"yyyy"),
        (exits.HypercallExit(12, ()), b"y"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_wrong_answer_is_refused(
    script: Script, vcpu: Vcpu, left: exits.Exit, data: bytes | int
) -> None:
    script.runs.append(left)
    vcpu.run()
    before = bytes(script.page)
    with pytest.raises(ValueError, match="answer"):
        vcpu.complete(data)
    assert script.page == before


@pytest.mark.parametrize(
    ("left", "times"),
    [(exits.IoExit(0x80, 1, True, b"x"), 1), (exits.MmioExit(0, 4, False), 1),
     (exits.HypercallExit(12, ()), 1), (exits.HltExit(), 0),
     (exits.MemoryFaultExit(0, 4096, True, errno.EFAULT), 0)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_pending_is_completed_without_the_guest(
    script: Script, vcpu: Vcpu, left: exits.Exit, times: int
) -> None:
    script.runs.append(left)
    vcpu.run()
    vcpu.settle()
    vcpu.settle()
    assert script.immediate == [False] + [True] * times
    assert not vcpu.immediate_exit


# --- what is passed on ---------------------------------------------------------------------------


def test_registers_go_through(script: Script, vcpu: Vcpu) -> None:
    vcpu.regs = Regs(rip=5)
    assert vcpu.regs == Regs(rip=5)
    vcpu.sregs = vcpu.sregs.long_mode(0x3000, ring=3)
    assert vcpu.sregs.cr3 == 0x3000


def test_pre_fault_tells_what_is_left(vcpu: Vcpu) -> None:
    assert vcpu.pre_fault(0, 3 * PAGE_SIZE) == 2 * PAGE_SIZE


def test_slots_take_the_lowest_free_id_and_the_ioctl_that_they_need(
    script: Script, kvm: Kvm
) -> None:
    vm = kvm.create_vm()
    memory = kvm.allocate(2 * PAGE_SIZE)
    plain = vm.add_slot(0, memory)
    with vm.create_guest_memfd(4 * PAGE_SIZE) as file:
        private = vm.add_slot(0x10000, memory, guest_memfd=file, offset=PAGE_SIZE)
        assert (plain.id, private.id, private.size) == (0, 1, 3 * PAGE_SIZE)
        plain.delete()
        assert vm.add_slot(0x20000, size=PAGE_SIZE).id == 0
        private.delete()
        private.delete()
    slots = {KVM_SET_USER_MEMORY_REGION: 1, KVM_SET_USER_MEMORY_REGION2: 2}
    assert [slots[call[1]] for call in script.calls if call[1] in slots] == [1, 2, 1, 1, 2]
    with pytest.raises(ValueError, match="size"):
        vm.add_slot(0)


def test_a_slot_that_was_refused_is_none(script: Script, kvm: Kvm) -> None:
    vm = kvm.create_vm()
    script.refuse[KVM_SET_USER_MEMORY_REGION] = errno.EEXIST
    with pytest.raises(IoctlError, match=r"KVM_SET_USER_MEMORY_REGION: EEXIST"):
        vm.add_slot(0, size=PAGE_SIZE)
    assert vm.slots == []


def test_the_shared_side_is_read_and_written_by_gpa(kvm: Kvm) -> None:
    memory = kvm.allocate(4 * PAGE_SIZE)
    slot = kvm.create_vm().add_slot(0x10000, memory, memory_offset=PAGE_SIZE, size=2 * PAGE_SIZE)
    slot.write(0x11000, b"abc")
    assert memory.read(2 * PAGE_SIZE, 3) == b"abc" == slot.read(0x11000, 3)
    for gpa in (0xFFFF, 0x12000 - 2):
        with pytest.raises(ValueError, match="slot 0"):
            slot.read(gpa, 3)
    with pytest.raises(ValueError, match="private"):
        slot.discard(0x10000, PAGE_SIZE, private=True)


# --- life ---------------------------------------------------------------------------------------


def test_everything_is_closed_with_its_kvm(script: Script) -> None:
    with Kvm(script) as kvm:
        vm = kvm.create_vm()
        vm.create_vcpu()
        vm.create_guest_memfd(PAGE_SIZE)
        kvm.allocate(PAGE_SIZE)
        assert len(script.handles) == 4
        vm.close()
        vm.close()
        assert len(script.handles) == 2  # a guest_memfd outlives its VM
    assert script.closed
    assert all(memory.closed for memory in script.memories)
    kvm.close()
    with pytest.raises(ValueError, match="closed"):
        kvm.check_extension(3)


def test_a_device_that_refuses_at_first_is_closed(script: Script) -> None:
    script.refuse[KVM_GET_API_VERSION] = errno.ENOTTY
    with pytest.raises(IoctlError, match="KVM_GET_API_VERSION"):
        Kvm(script)
    assert script.closed


def test_one_that_was_forgotten_says_so(script: Script) -> None:
    kvm = Kvm(script)
    with pytest.warns(ResourceWarning, match="unclosed Kvm"):
        kvm.__del__()
    assert script.closed


def test_requests_have_names() -> None:
    assert request_name(KVM_RUN) == "KVM_RUN"
    assert request_name(0x4080AEBF) == "KVM_SET_NESTED_STATE"
    assert request_name(0xAEFF) == "ioctl 0xaeff"
    assert request_name(0xBF) == "ioctl 0xbf"


# --- the kit ------------------------------------------------------------------------------------


def translate(memory: Memory, cr3: int, address: int, mask: int) -> tuple[int, int]:
    """Walk four levels in the boot memory: gpa, and the AND of all flags."""
    table, flags = cr3, 7
    for shift in (39, 30, 21):
        assert table & mask == mask, "page tables are in shared memory"
        index = (address >> shift & 0x1FF) * 8
        entry = int.from_bytes(memory.read((table & ~mask & ~0xFFF) + index, 8), "little")
        flags &= entry
        table = entry & ~0xFFF
    return table | address & 0x1FFFFF, flags


@pytest.mark.parametrize("bit", [0, 39])
def test_two_views_of_memory(script: Script, kvm: Kvm, bit: int) -> None:
    mask = 1 << bit if bit else 0
    script.bit = bit
    vm = kvm.create_vm()
    guest = Guest(kvm, vm, BootPage(Hypercall.VMMCALL, ram_gpa=0x400000, ram_size=0x1000))
    vcpu = vm.create_vcpu()
    guest.load(b"\xf4")
    guest.enter(vcpu)
    assert vcpu.sregs.cr3 == PML4 | mask
    for gpa in (0, 0x12345, 0x3FFF_F000):
        assert translate(guest.memory, PML4 | mask, gpa, mask) == (gpa, 7)
        assert translate(guest.memory, PML4 | mask, SHARED_VIEW + gpa, mask) == (gpa | mask, 7)
    regs = vcpu.regs
    assert guest.memory.read(regs.rip - SHARED_VIEW, 1) == b"\xf4"
    assert regs.rdi == SHARED_VIEW + BOOT_PAGE
    assert regs.rflags == 0x3002
    page = guest.memory.read(BOOT_PAGE, 40)
    assert page[:8] == b"KVMGUEST"
    words = [int.from_bytes(page[at : at + 8], "little") for at in (16, 24, 32)]
    assert (int.from_bytes(page[12:16], "little"), *words) == (2, bit, 0x400000, 0x1000)


def test_a_program_must_fit(kvm: Kvm) -> None:
    guest = Guest(kvm, kvm.create_vm())
    with pytest.raises(ValueError, match="28 KiB"):
        guest.load(bytes(BOOT_SIZE))
    with pytest.raises(ValueError, match="ring 1"):
        Guest(kvm, kvm.create_vm(), ring=1)
