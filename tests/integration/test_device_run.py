# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_RUN of the simulated device: exits, their completion, interruption, other vCPUs, the end."""

from __future__ import annotations

import ctypes
import errno
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from device_program import HEAP, HIGH, IDT, PAGE, TEXT, Program

from kvmsim import exits, rangelist
from kvmsim.device.results import Begun, Failure, Value
from kvmsim.rangelist import MapGpaRange
from kvmsim.uapi import (
    KVM_CAP_EXIT_HYPERCALL,
    KVM_CREATE_VCPU,
    KVM_EXIT_INTR,
    KVM_EXIT_IO,
    KVM_EXIT_IRQ_WINDOW_OPEN,
    KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_RUN,
    KVMSIM_CAP_MAP_GPA_RANGES,
    KVMSIM_HC_MAP_GPA_RANGES,
    requests,
    structs,
)

# mov al, 0x42; out 0xe9, al; mov ax, 0x1234; mov dx, 0x3f8; out dx, ax;
# mov eax, 0x55667788; out dx, eax; in ax, dx; in eax, dx; hlt
PIO = bytes.fromhex("b042e6e966b8341266baf80366efb888776655ef66ededf4")
# mov rbx, [rdi]; mov [rdi + 8], rbx; mov dword ptr [rdi + 16], 0x11223344; hlt
MMIO = bytes.fromhex("488b1f48895f08c7471044332211f4")
# mov eax, 12; vmcall; mov rdi, rax; in al, 4; hlt
HYPERCALL = bytes.fromhex("b80c0000000f01c14889c7e404f4")
# 1: inc qword ptr [rdi]; jmp 1b
SPIN = bytes.fromhex("48ff07ebfb")
# 1: mov rax, [rdi]; jmp 1b
SPIN_READ = bytes.fromhex("488b07ebfb")
# lock xadd [rdi], rax; hlt
XADD = bytes.fromhex("f0480fc107f4")
# mov byte ptr [rdi], 1; 1: cmp byte ptr [rsi], 0; je 1b; hlt
RENDEZVOUS = bytes.fromhex("c60701803e0074fbf4")
# cpuid; mov rdi, rcx; in al, 4; mov ecx, 0x10; rdmsr; mov ecx, 0x277; rdmsr; mov rdi, rax;
# in al, 4; mov ecx, 0x12345; rdmsr; hlt
REGISTERS = bytes.fromhex("0fa24889cfe404b9100000000f32b9770200000f324889c7e404b9452301000f32f4")
# sti; 1: pause; jmp 1b
STI = bytes.fromhex("fbf390ebfc")
# mov rdi, [rsp]; in al, 4; iretq
HANDLER = bytes.fromhex("488b3c24e40448cf")

Boot = Callable[..., Program]


@pytest.fixture
def boot() -> Iterator[Boot]:
    made: list[Program] = []

    def start(*codes: bytes, type: int = 0, **regs: int) -> Program:
        program = Program(type=type)
        made.append(program)
        program.boot(*codes)
        for vcpu in program.vcpus:
            program.set_regs(vcpu, **regs)
        return program

    yield start
    for program in made:
        program.close()


def begin(program: Program, vcpu: int) -> Begun:
    """KVM_RUN without waiting."""
    process = program.process
    result = process.caller.objects[vcpu].ioctl(KVM_RUN, 0, process.caller)
    assert isinstance(result, Begun)
    return result


def until(condition: Callable[[], bool]) -> None:
    """Wait for what a guest does."""
    event = threading.Event()
    for _ in range(20000):
        if condition():
            return
        event.wait(0.001)
    raise AssertionError("it did not happen in 20 s")


# --- exits and their completion -----------------------------------------------------------------


def test_ports(boot: Boot) -> None:
    program = boot(PIO)
    vcpu = program.vcpus[0]
    assert program.run(vcpu) == exits.IoExit(0xE9, 1, True, b"\x42")
    assert program.run(vcpu) == exits.IoExit(0x3F8, 2, True, b"\x34\x12")
    assert program.run(vcpu) == exits.IoExit(0x3F8, 4, True, b"\x88\x77\x66\x55")
    assert program.run(vcpu) == exits.IoExit(0x3F8, 2, False)
    program.run_buffer(vcpu)[PAGE : PAGE + 2] = b"\xcd\xab"
    assert program.run(vcpu) == exits.IoExit(0x3F8, 4, False)
    assert program.regs(vcpu)["rax"] == 0x5566ABCD, "the upper half of EAX stays"
    program.run_buffer(vcpu)[PAGE : PAGE + 4] = b"\x44\x33\x22\x11"
    assert program.run(vcpu) == exits.HltExit()
    assert program.regs(vcpu)["rax"] == 0x11223344
    assert program.regs(vcpu)["rip"] == TEXT + len(PIO)


def test_devices(boot: Boot) -> None:
    program = boot(MMIO, rdi=HIGH)
    vcpu = program.vcpus[0]
    assert program.run(vcpu) == exits.MmioExit(HIGH, 8, False)
    at = 32 + 8
    program.run_buffer(vcpu)[at : at + 8] = struct.pack("<Q", 0x1122334455667788)
    stored = struct.pack("<Q", 0x1122334455667788)
    assert program.run(vcpu) == exits.MmioExit(HIGH + 8, 8, True, stored)
    assert program.run(vcpu) == exits.MmioExit(HIGH + 16, 4, True, b"\x44\x33\x22\x11")
    assert program.run(vcpu) == exits.HltExit()


def test_misaligned_devices(boot: Boot) -> None:
    """Each access with its own gpa and length, as emulator_read_write() has it."""
    program = boot(MMIO, rdi=HIGH + PAGE - 3)
    vcpu = program.vcpus[0]
    at = 32 + 8
    for gpa, data in ((HIGH + PAGE - 3, b"abc"), (HIGH + PAGE, b"defgh")):
        assert program.run(vcpu) == exits.MmioExit(gpa, len(data), False)
        program.run_buffer(vcpu)[at : at + len(data)] = data
    assert program.run(vcpu) == exits.MmioExit(HIGH + PAGE + 5, 8, True, b"abcdefgh")
    assert program.run(vcpu) == exits.MmioExit(HIGH + PAGE + 13, 4, True, b"\x44\x33\x22\x11")
    assert program.run(vcpu) == exits.HltExit()


@pytest.mark.logs("no event can be delivered to it")
def test_an_event_whose_stack_is_a_device(boot: Boot) -> None:
    """KVM_INTERNAL_ERROR_DELIVERY_EV with five words, the gpa the fourth."""
    program = boot(bytes.fromhex("0f0b"), rsp=HIGH + 0x800)  # ud2
    write_gate(program, 6, TEXT)
    left = program.run(program.vcpus[0])
    gpa = HIGH + 0x800 - 40
    assert left == exits.InternalErrorExit(
        KVM_INTERNAL_ERROR_DELIVERY_EV, (gpa, 0x400, 1 << 32 | 6, gpa, 0)
    )


def test_a_hypercall_is_answered_in_the_kernel_or_forwarded(boot: Boot) -> None:
    regs = {"rbx": HIGH, "rcx": 2, "rdx": 1 << 4}
    program = boot(HYPERCALL, **regs)
    vcpu = program.vcpus[0]
    assert program.ucall(vcpu) == -1000 & (1 << 64) - 1, "KVM_ENOSYS: not enabled"
    program.ioctl(
        program.vm, requests.KVM_ENABLE_CAP, structs.ENABLE_CAP, KVM_CAP_EXIT_HYPERCALL, 0,
        1 << 12, 0, 0, 0,
    )  # fmt: skip
    program.set_regs(vcpu, rip=TEXT, **regs)
    left = program.run(vcpu)
    assert left == exits.HypercallExit(12, (HIGH, 2, 1 << 4, 0, 0, 0))
    long_mode = program.run_buffer(vcpu)[32 + 64]
    assert long_mode == 1, "KVM_EXIT_HYPERCALL_LONG_MODE"
    at = 32 + 56
    program.run_buffer(vcpu)[at : at + 8] = struct.pack("<Q", 0x99)
    assert program.ucall(vcpu) == 0x99
    program.set_regs(vcpu, rip=TEXT, **{**regs, "rbx": HIGH + 1})
    assert program.ucall(vcpu) == -22 & (1 << 64) - 1, "KVM_EINVAL: not aligned"


def test_many_ranges_leave_the_guest_together(boot: Boot) -> None:
    """KVMSIM_CAP_MAP_GPA_RANGES: off, the hypercall is unknown; on, its list is in the exit."""
    program = boot(b"\xb8" + struct.pack("<I", KVMSIM_HC_MAP_GPA_RANGES) + HYPERCALL[5:])
    vcpu, ram = program.vcpus[0], program.ram
    assert ram is not None
    ranges = [MapGpaRange(HIGH + n * 2 * PAGE, 1, 1 << 4) for n in range(64)]
    ram.write(HEAP, rangelist.pack(ranges))

    def call(gpa: int, count: int) -> None:
        program.set_regs(vcpu, rip=TEXT, rbx=gpa, rcx=count)

    def enable(value: int) -> None:
        program.ioctl(
            program.vm, requests.KVM_ENABLE_CAP, structs.ENABLE_CAP, KVMSIM_CAP_MAP_GPA_RANGES, 0,
            value, 0, 0, 0,
        )  # fmt: skip

    call(HEAP, 64)
    assert program.ucall(vcpu) == -1000 & (1 << 64) - 1, "KVM_ENOSYS: not enabled"
    with pytest.raises(OSError, match="1 for on, 0 for off"):
        enable(2)
    enable(1)
    call(HEAP, 64)
    assert program.run(vcpu) == exits.map_gpa_ranges(ranges)
    at = 32 + 56
    program.run_buffer(vcpu)[at : at + 8] = struct.pack("<Q", 64)
    assert program.ucall(vcpu) == 64
    for gpa, count, number in (
        (HIGH, 1, errno.EFAULT),  # no slot
        (HEAP, 0, errno.EINVAL),
        (HEAP + PAGE - 24, 2, errno.EINVAL),
        (HEAP + PAGE, 1, errno.EINVAL),  # an empty entry
    ):
        call(gpa, count)
        assert program.ucall(vcpu) == -number & (1 << 64) - 1
    enable(0)
    call(HEAP, 64)
    assert program.ucall(vcpu) == -1000 & (1 << 64) - 1


def test_registers_that_the_guest_asks_for(boot: Boot) -> None:
    program = boot(REGISTERS)
    vcpu = program.vcpus[0]
    assert program.ucall(vcpu) == int.from_bytes(b"cAMD", "little"), "AuthenticAMD"
    assert program.ucall(vcpu) == 0x0007_0406, "MSR_IA32_CR_PAT"
    assert program.run(vcpu) == exits.ShutdownExit(), "#GP without an IDT"


def test_without_memory_the_guest_cannot_even_start() -> None:
    with Program() as program:
        program.ioctl(program.vm, requests.KVM_SET_NR_MMU_PAGES, None, 64)
        vcpu = program.add_vcpu(0)
        assert program.regs(vcpu)["rip"] == 0xFFF0
        left = program.run(vcpu)
        assert left == exits.InternalErrorExit(KVM_INTERNAL_ERROR_EMULATION)


def test_stores_to_a_read_only_slot_are_a_devices(boot: Boot) -> None:
    program = boot(MMIO, rdi=HIGH)
    vcpu = program.vcpus[0]
    memory = program.process.ranges.allocate(PAGE)
    memory.write(0, b"rom")
    program.slot(1, HIGH, PAGE, memory.address, flags=2)
    stored = b"rom".ljust(8, b"\0")
    assert program.run(vcpu) == exits.MmioExit(HIGH + 8, 8, True, stored), "the load was memory's"
    assert program.run(vcpu) == exits.MmioExit(HIGH + 16, 4, True, b"\x44\x33\x22\x11")
    assert program.run(vcpu) == exits.HltExit()
    assert memory.read(0, PAGE) == b"rom".ljust(PAGE, b"\0")


def test_a_hole_of_the_caller_is_efault(boot: Boot) -> None:
    program = boot(MMIO, rdi=HIGH)
    vcpu = program.vcpus[0]
    where = program.process.ranges.allocate(PAGE)
    program.process.ranges.free(where)
    program.slot(1, HIGH, PAGE, where.address)
    with pytest.raises(OSError, match="no memory of the caller") as caught:
        program.process.ioctl(vcpu, KVM_RUN)
    assert caught.value.errno == errno.EFAULT
    assert program.regs(vcpu)["rip"] == TEXT, "the instruction was not executed"


def test_memory_that_comes_later_is_found(boot: Boot) -> None:
    program = boot(MMIO, rdi=HIGH)
    vcpu = program.vcpus[0]
    ranges = program.process.ranges
    where = ranges.allocate(PAGE)
    ranges._ranges.remove(where)  # mapped after the slot was made
    program.slot(1, HIGH, PAGE, where.address)
    ranges._ranges.append(where)
    ranges._ranges.sort()
    where.write(0, b"\x77")
    assert program.run(vcpu) == exits.HltExit()
    assert where.read(0, 20) == b"\x77" + bytes(7) + b"\x77" + bytes(7) + b"\x44\x33\x22\x11"


def test_memory_that_is_mapped_anew_is_looked_up_anew(boot: Boot) -> None:
    program = boot(MMIO, rdi=HIGH)
    vcpu = program.vcpus[0]
    first = program.process.ranges.allocate(2 * PAGE)
    second = program.process.ranges.allocate(2 * PAGE)
    first.write(0, b"one")
    second.write(0, b"two")
    program.slot(1, HIGH, PAGE, first.address)
    assert program.run(vcpu) == exits.HltExit()
    assert first.read(8, 3) == b"one"
    # As if the second were mapped over the first: what the provider says changes.
    first.address, second.address = second.address, first.address
    program.process.ranges._ranges.sort()
    vm = program.process.caller.objects[program.vm]
    vm.memory.host_range_changed(second.address, 2 * PAGE)  # type: ignore[attr-defined]
    program.set_regs(vcpu, rip=TEXT, rdi=HIGH)
    assert program.run(vcpu) == exits.HltExit()
    assert second.read(8, 3) == b"two"


def test_code_that_the_host_wrote_is_run_after_rip_was_set(boot: Boot) -> None:
    program = boot(bytes.fromhex("bf01000000e404f4"))  # mov edi, 1; in al, 4; hlt
    vcpu = program.vcpus[0]
    assert program.ucall(vcpu) == 1
    assert program.run(vcpu) == exits.HltExit()
    assert program.ram is not None
    program.ram.write(TEXT, bytes.fromhex("bf02000000e404f4"))
    program.set_regs(vcpu, rip=TEXT)
    assert program.ucall(vcpu) == 2


def test_code_that_the_host_wrote_while_the_guest_was_out_is_run(boot: Boot) -> None:
    # 1: mov edi, 1; in al, 4; jmp 1b
    program = boot(bytes.fromhex("bf01000000e404ebf7"))
    vcpu = program.vcpus[0]
    assert program.ram is not None
    for value in (1, 2, 2, 3):
        program.ram.write(TEXT + 1, bytes([value]))
        assert program.ucall(vcpu) == value
    # and on a page that is translated piece by piece: jmp over; over: mov edi, 9; in al, 4
    program.ram.write(TEXT + 7, bytes.fromhex("eb77"))
    program.ram.write(TEXT + 0x80, bytes.fromhex("bf09000000e404e974ffffff"))
    assert program.ucall(vcpu) == 9
    program.ram.write(TEXT + 1, b"\x05")
    assert program.ucall(vcpu) == 5


# --- interruption -------------------------------------------------------------------------------


def test_immediate_exit_completes_what_waits_and_runs_nothing(boot: Boot) -> None:
    program = boot(bytes.fromhex("e404480fb6f8e404f4"))  # in al, 4; movzx rdi, al; in al, 4; hlt
    vcpu = program.vcpus[0]
    program.ucall(vcpu)
    run = program.run_buffer(vcpu)
    run[PAGE] = 0x5A
    run[1] = 1
    before = bytes(run[8:12])
    with pytest.raises(OSError, match="immediate_exit") as caught:
        program.process.ioctl(vcpu, KVM_RUN)
    assert caught.value.errno == errno.EINTR
    assert bytes(run[8:12]) == before, "exit_reason is not touched"
    assert program.regs(vcpu)["rip"] == TEXT + 2, "the IN is complete"
    run[PAGE] = 0
    run[1] = 0
    assert program.ucall(vcpu) == 0x5A


def test_a_signal_ends_a_run_and_loses_nothing(boot: Boot) -> None:
    program = boot(SPIN, rdi=HEAP)
    vcpu = program.vcpus[0]
    assert program.ram is not None
    counted = 0
    for _ in range(5):
        begun = begin(program, vcpu)
        until(lambda: program.ram.read(HEAP, 8) != counted.to_bytes(8, "little"))  # type: ignore[union-attr]  # noqa: B023
        begun.pending.cancel()
        begun.pending.cancel()
        outcome = begun.pending.wait(20)
        assert isinstance(outcome, Failure)
        assert outcome.errno == errno.EINTR
        assert exits.decode(bytes(program.run_buffer(vcpu)), -errno.EINTR) == (
            exits.InterruptedExit()
        )
        counted = int.from_bytes(program.ram.read(HEAP, 8), "little")
        assert program.regs(vcpu)["rip"] in (TEXT, TEXT + 3)


def test_a_pending_signal_keeps_the_guest_from_running(boot: Boot) -> None:
    program = boot(PIO)
    vcpu = program.vcpus[0]
    seen = []

    def pending(mask: int | None) -> bool:
        seen.append(mask)
        return len(seen) == 1

    program.process.caller.signal_pending = pending  # type: ignore[method-assign]
    data = struct.pack("<IQ", 8, 0x1234)
    program.put(vcpu, requests.KVM_SET_SIGNAL_MASK, data)
    assert program.run(vcpu) == exits.InterruptedExit()
    assert program.regs(vcpu)["rip"] == TEXT
    assert isinstance(program.run(vcpu), exits.IoExit)
    assert seen == [0x1234, 0x1234]


def test_what_a_port_said_is_in_the_guest_before_a_signal_ends_the_run(boot: Boot) -> None:
    program = boot(bytes.fromhex("66f36df4"), rdx=0x60, rdi=HEAP, rcx=40)  # rep insw; hlt
    vcpu = program.vcpus[0]
    assert program.run(vcpu) == exits.IoExit(0x60, 2, False, count=40)
    program.run_buffer(vcpu)[PAGE : PAGE + 80] = bytes(range(80))
    caller = program.process.caller
    caller.signal_pending = lambda mask: True  # type: ignore[method-assign]
    assert program.run(vcpu) == exits.InterruptedExit()
    regs = program.regs(vcpu)
    assert (regs["rcx"], regs["rdi"]) == (0, HEAP + 80)
    assert program.ram is not None
    assert program.ram.read(HEAP, 81) == bytes(range(80)) + b"\0"
    caller.signal_pending = lambda mask: False  # type: ignore[method-assign]
    assert program.run(vcpu) == exits.HltExit()


def test_an_interrupt_in_the_middle_of_an_answer_waits_for_its_end(boot: Boot) -> None:
    """Of 1024 elements: the kick comes after the first of them."""
    program = boot(bytes.fromhex("f36cf4"), rdx=0x60, rdi=HEAP, rcx=2000)  # rep insb; hlt
    vcpu = program.vcpus[0]
    assert program.run(vcpu) == exits.IoExit(0x60, 1, False, count=1024)
    program.run_buffer(vcpu)[PAGE : PAGE + 1024] = b"\x55" * 1024
    begun = begin(program, vcpu)
    until(lambda: program.ram.read(HEAP, 1) == b"\x55")  # type: ignore[union-attr]
    begun.pending.cancel()
    outcome = begun.pending.wait(20)
    assert program.regs(vcpu)["rcx"] == 2000 - 1024
    if isinstance(outcome, Value):  # the next question came first
        assert program.run_buffer(vcpu)[8:12] == KVM_EXIT_IO.to_bytes(4, "little")


def test_other_ioctls_wait_for_the_run_and_can_be_given_up(boot: Boot) -> None:
    program = boot(SPIN, rdi=HEAP)
    vcpu = program.vcpus[0]
    caller = program.process.caller
    device = caller.objects[vcpu]
    begun = begin(program, vcpu)
    space = ctypes.create_string_buffer(structs.REGS.size)
    waits = [device.ioctl(requests.KVM_GET_REGS, ctypes.addressof(space), caller) for _ in range(2)]
    again = device.ioctl(KVM_RUN, 0, caller)
    assert all(isinstance(result, Begun) for result in (*waits, again))
    assert isinstance(waits[0], Begun)
    assert isinstance(waits[1], Begun)
    assert isinstance(again, Begun)
    waits[1].pending.cancel()
    assert waits[1].pending.wait(20) == Failure(errno.EINTR, "interrupted while the vCPU was busy")
    assert waits[0].pending.wait(0) is None
    begun.pending.cancel()
    assert waits[0].pending.wait(20) == Value(0)
    assert structs.REGS.unpack(space.raw)[5] == HEAP
    assert again.pending.wait(0) is None, "the next run goes on by itself"
    again.pending.cancel()
    outcome = again.pending.wait(20)
    assert isinstance(outcome, Failure)
    assert outcome.errno == errno.EINTR


def test_a_thread_that_waits_in_kvm_run_is_interrupted(boot: Boot) -> None:
    program = boot(SPIN, rdi=HEAP)
    vcpu = program.vcpus[0]
    left: list[exits.Exit] = []
    thread = threading.Thread(target=lambda: left.append(program.run(vcpu)))
    thread.start()
    until(lambda: bool(program.process._waiting.get(vcpu)))
    program.process.interrupt(vcpu)
    thread.join(20)
    assert left == [exits.InterruptedExit()]
    program.process.interrupt(vcpu)  # nobody


# --- events -------------------------------------------------------------------------------------


def write_gate(program: Program, vector: int, handler: int) -> None:
    assert program.ram is not None
    low = handler & 0xFFFF | 0x08 << 16 | 0x8E << 40 | (handler >> 16 & 0xFFFF) << 48
    program.ram.write(IDT + 16 * vector, struct.pack("<QQ", low, handler >> 32))


def test_interrupts_wait_for_their_window(boot: Boot) -> None:
    handler = TEXT + 0x800
    program = boot(bytes.fromhex("e404") + STI)
    vcpu = program.vcpus[0]
    write_gate(program, 0x40, handler)
    assert program.ram is not None
    program.ram.write(handler, HANDLER)
    program.ucall(vcpu)
    run = program.run_buffer(vcpu)
    assert run[12] == 0, "not ready: IF is clear"
    run[0] = 1  # request_interrupt_window
    program.process.ioctl(vcpu, KVM_RUN)
    assert int.from_bytes(run[8:12], "little") == KVM_EXIT_IRQ_WINDOW_OPEN
    assert run[12:14] == b"\1\1", "ready, and IF is set"
    program.put(vcpu, requests.KVM_INTERRUPT, structs.INTERRUPT.pack(0x40))
    run[0] = 0
    assert program.ucall(vcpu) >= TEXT + 3, "the handler found where STI's loop was left"
    begun = begin(program, vcpu)
    begun.pending.cancel()
    assert isinstance(begun.pending.wait(20), Failure)


def test_nmi_and_exceptions_are_injected(boot: Boot) -> None:
    handler = TEXT + 0x800
    program = boot(SPIN, rdi=HEAP)
    vcpu = program.vcpus[0]
    write_gate(program, 2, handler)
    write_gate(program, 6, handler)
    assert program.ram is not None
    program.ram.write(handler, HANDLER)
    program.ioctl(vcpu, requests.KVM_NMI)
    assert program.ucall(vcpu) == TEXT
    program.set_regs(vcpu, rip=TEXT)
    events = bytearray(program.get(vcpu, requests.KVM_GET_VCPU_EVENTS, structs.VCPU_EVENTS.size))
    events[0:2] = b"\1\6"
    program.put(vcpu, requests.KVM_SET_VCPU_EVENTS, bytes(events))
    assert program.ucall(vcpu) == TEXT, "#UD at the first instruction"


def test_with_an_irqchip_hlt_waits_inside_kvm_run() -> None:
    with Program() as program:
        program.ioctl(program.vm, requests.KVM_CREATE_IRQCHIP)
        program.boot(bytes.fromhex("f4e404f4"))  # hlt; in al, 4; hlt
        vcpu = program.vcpus[0]
        begun = begin(program, vcpu)
        device = program.process.caller.objects[vcpu]
        until(lambda: device.mp_state == 3)  # type: ignore[attr-defined]
        assert begun.pending.wait(0) is None
        begun.pending.cancel()
        assert isinstance(begun.pending.wait(20), Failure)
        mp_state = program.get(vcpu, requests.KVM_GET_MP_STATE, 4)
        assert mp_state == structs.MP_STATE.pack(3)
        begun = begin(program, vcpu)
        begun.pending.cancel()
        assert isinstance(begun.pending.wait(20), Failure), "still halted"
        program.put(vcpu, requests.KVM_SET_MP_STATE, structs.MP_STATE.pack(0))
        assert isinstance(program.run(vcpu), exits.IoExit)


def test_an_application_processor_waits_for_init() -> None:
    with Program() as program:
        program.ioctl(program.vm, requests.KVM_CREATE_IRQCHIP)
        program.boot(PIO, PIO)
        first, second = program.vcpus
        assert program.get(first, requests.KVM_GET_MP_STATE, 4) == structs.MP_STATE.pack(0)
        assert program.get(second, requests.KVM_GET_MP_STATE, 4) == structs.MP_STATE.pack(1)
        begun = begin(program, second)
        assert isinstance(program.run(first), exits.IoExit)
        assert begun.pending.wait(0) is None
        begun.pending.cancel()
        assert isinstance(begun.pending.wait(20), Failure)
        reason = bytes(program.run_buffer(second)[8:12])
        assert int.from_bytes(reason, "little") == KVM_EXIT_INTR


# --- several vCPUs, and the end -----------------------------------------------------------------


def test_many_vcpus_run_at_once(boot: Boot) -> None:
    codes = [RENDEZVOUS] * 6
    program = boot(*codes)
    for index, vcpu in enumerate(program.vcpus):
        following = (index + 1) % len(codes)
        program.set_regs(vcpu, rdi=HEAP + index, rsi=HEAP + following)
    begun = [begin(program, vcpu) for vcpu in program.vcpus]
    for run, vcpu in zip(begun, program.vcpus, strict=True):
        assert run.pending.wait(20) == Value(0), "each one waits for the next"
        assert exits.decode(bytes(program.run_buffer(vcpu)), 0) == exits.HltExit()


def test_locked_instructions_of_all_vcpus_count(boot: Boot) -> None:
    program = boot(*[XADD] * 4, rdi=HEAP, rax=1)
    for _ in range(5):
        begun = [begin(program, vcpu) for vcpu in program.vcpus]
        assert [run.pending.wait(20) for run in begun] == [Value(0)] * 4
        for index, vcpu in enumerate(program.vcpus):
            program.set_regs(vcpu, rip=TEXT + index * PAGE, rax=1)
    assert program.ram is not None
    assert program.ram.read(HEAP, 8) == (20).to_bytes(8, "little")


def test_threads_may_run_their_vcpus_blocking(boot: Boot) -> None:
    program = boot(*[RENDEZVOUS] * 3)
    for index, vcpu in enumerate(program.vcpus):
        program.set_regs(vcpu, rdi=HEAP + index, rsi=HEAP + (index + 1) % 3)
    left: list[exits.Exit] = []
    threads = [
        threading.Thread(target=lambda vcpu=vcpu: left.append(program.run(vcpu)))  # type: ignore[misc]
        for vcpu in program.vcpus
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert left == [exits.HltExit()] * 3


def test_a_slot_can_be_deleted_under_a_guest_that_uses_it(boot: Boot) -> None:
    program = boot(SPIN_READ, rdi=HIGH)
    vcpu = program.vcpus[0]
    memory = program.process.ranges.allocate(PAGE)
    for _ in range(20):
        program.slot(1, HIGH, PAGE, memory.address)
        begun = begin(program, vcpu)
        assert begun.pending.wait(0.002) is None
        program.slot(1, HIGH, 0, 0)
        assert begun.pending.wait(20) == Value(0)
        left = exits.decode(bytes(program.run_buffer(vcpu)), 0)
        assert left == exits.MmioExit(HIGH, 8, False)


@pytest.mark.logs("no code and no page table")
@pytest.mark.parametrize("device", [False, True])
def test_the_slot_of_code_and_tables_can_be_deleted(boot: Boot, device: bool) -> None:
    """set_memory_region_test of the kernel's selftests: an error, at the guest's instruction."""
    program = boot(SPIN_READ, rdi=HIGH if device else HEAP)
    vcpu = program.vcpus[0]
    if device:
        assert program.run(vcpu) == exits.MmioExit(HIGH, 8, False)
        program.slot(0, 0, 0, 0)
        left = program.run(vcpu)
    else:
        begun = begin(program, vcpu)
        assert begun.pending.wait(0.01) is None
        program.slot(0, 0, 0, 0)
        assert begun.pending.wait(20) == Value(0)
        left = exits.decode(bytes(program.run_buffer(vcpu)), 0)
    assert left == exits.InternalErrorExit(KVM_INTERNAL_ERROR_EMULATION)
    assert program.regs(vcpu)["rip"] in (TEXT, TEXT + 3)


def test_a_slot_can_be_moved_under_a_guest_that_reads_it(boot: Boot) -> None:
    # 1: mov rax, [rdi]; cmp rax, 1; jne 1b; mov rdi, rax; in al, 4
    program = boot(bytes.fromhex("488b074883f80175f74889c7e404"), rdi=HIGH)
    vcpu = program.vcpus[0]
    memory = program.process.ranges.allocate(2 * PAGE)
    program.slot(1, HIGH, 2 * PAGE, memory.address)
    begun = begin(program, vcpu)
    assert begun.pending.wait(0.01) is None
    program.slot(1, HIGH - PAGE, 2 * PAGE, memory.address)
    memory.write(0, b"\2")  # nobody sees it: the guest reads the second page now
    assert begun.pending.wait(0.01) is None
    memory.write(0, b"\1")
    program.slot(1, HIGH, 2 * PAGE, memory.address)
    assert begun.pending.wait(20) == Value(0)
    left = exits.decode(bytes(program.run_buffer(vcpu)), 0)
    assert left == exits.IoExit(4, 1, False)
    assert program.regs(vcpu)["rdi"] == 1


def test_what_was_deleted_is_not_read_any_more(boot: Boot) -> None:
    """Stores by the host after the deletion never reach the guest."""
    program = boot(bytes.fromhex("488b0748890648890ee404ebf4"), rdi=HIGH, rsi=HEAP, rcx=0)
    # 1: mov rax, [rdi]; mov [rsi], rax; mov [rsi], rcx; in al, 4; jmp 1b
    vcpu = program.vcpus[0]
    old, new = (program.process.ranges.allocate(PAGE) for _ in range(2))
    old.write(0, b"old")
    new.write(0, b"new")
    program.slot(1, HIGH, PAGE, old.address)
    program.ucall(vcpu)
    assert program.regs(vcpu)["rax"] & 0xFFFFFF == int.from_bytes(b"old", "little") & 0xFFFF00 | (
        program.regs(vcpu)["rax"] & 0xFF
    )
    program.slot(1, HIGH, 0, 0)
    program.slot(1, HIGH, PAGE, new.address)
    program.run_buffer(vcpu)[PAGE] = ord("x")
    program.ucall(vcpu)
    assert program.regs(vcpu)["rax"] == int.from_bytes(b"new", "little")


def test_a_vcpu_that_runs_can_be_closed(boot: Boot) -> None:
    program = boot(SPIN, SPIN, rdi=HEAP)
    begun = [begin(program, vcpu) for vcpu in program.vcpus]
    program.process.close(program.vcpus[0])
    outcome = begun[0].pending.wait(0)
    assert isinstance(outcome, Failure)
    assert outcome.errno == errno.EINTR
    assert begun[1].pending.wait(0) is None, "the other goes on"
    with pytest.raises(OSError, match="there is a vCPU 0"):
        program.ioctl(program.vm, KVM_CREATE_VCPU, None, 0)


def test_a_vcpu_keeps_its_vm(boot: Boot) -> None:
    program = boot(PIO)
    program.process.close(program.vm)
    assert isinstance(program.run(program.vcpus[0]), exits.IoExit)
    assert len(program.device._vms) == 1
    program.process.close(program.vcpus[0])
    assert not program.device._vms


def test_registers_travel_in_kvm_run(boot: Boot) -> None:
    program = boot(bytes.fromhex("4889c7e404f4"))  # mov rdi, rax; in al, 4; hlt
    vcpu = program.vcpus[0]
    run = program.run_buffer(vcpu)
    at = 304
    run[288:296] = struct.pack("<Q", 7)
    program.ucall(vcpu)
    regs = list(structs.REGS.unpack(run[at : at + structs.REGS.size]))
    assert regs[16] == TEXT + 3
    sregs = bytes(run[at + 144 : at + 144 + structs.SREGS_SIZE])
    assert sregs == program.get(vcpu, requests.KVM_GET_SREGS, structs.SREGS_SIZE)
    regs[0], regs[16] = 0x77, TEXT
    run[at : at + structs.REGS.size] = structs.REGS.pack(*regs)
    run[296:304] = struct.pack("<Q", 1)
    assert program.ucall(vcpu) == 0x77
    assert bytes(run[296:304]) == bytes(8)
    run[296:304] = struct.pack("<Q", 8)
    with pytest.raises(OSError, match="unknown bits"):
        program.process.ioctl(vcpu, KVM_RUN)


# --- the log of writes --------------------------------------------------------------------------


def dirty(program: Program, slot: int, npages: int) -> set[int]:
    """KVM_GET_DIRTY_LOG."""
    bitmap = ctypes.create_string_buffer(-(-npages // 64) * 8)
    program.ioctl(
        program.vm, requests.KVM_GET_DIRTY_LOG, structs.DIRTY_LOG, slot, ctypes.addressof(bitmap)
    )
    return {page for page in range(npages) if bitmap.raw[page // 8] >> page % 8 & 1}


# 1: mov rax, [rdi]; mov [rsi], rdx; in al, 4; jmp 1b
READ_WRITE = bytes.fromhex("488b07488916e404ebf6")


def test_writes_are_logged_and_reads_are_not(boot: Boot) -> None:
    program = boot(READ_WRITE, rdi=HIGH, rsi=HIGH)
    vcpu = program.vcpus[0]
    memory = program.process.ranges.allocate(70 * PAGE)
    program.slot(1, HIGH, 70 * PAGE, memory.address)
    with pytest.raises(OSError, match="does not log") as caught:
        dirty(program, 1, 70)
    assert caught.value.errno == errno.ENOENT

    def touch(read: int, write: int, value: int) -> None:
        regs = {"rdi": HIGH + read * PAGE, "rsi": HIGH + write * PAGE, "rdx": value}
        program.set_regs(vcpu, rip=TEXT, **regs)
        program.ucall(vcpu)
        assert memory.read(write * PAGE, 1)[0] == value

    touch(0, 5, 1)
    program.slot(1, HIGH, 70 * PAGE, memory.address, flags=1)
    assert dirty(program, 1, 70) == set(), "what was written before does not count"
    touch(3, 5, 2)
    touch(3, 69, 3)
    touch(3, 5, 4)
    assert dirty(program, 1, 70) == {5, 69}
    assert dirty(program, 1, 70) == set(), "taken"
    touch(5, 6, 5)
    touch(7, 5, 6)
    assert dirty(program, 1, 70) == {5, 6}
    program.slot(1, HIGH + 128 * PAGE, 70 * PAGE, memory.address)
    with pytest.raises(OSError, match="does not log"):
        dirty(program, 1, 70)


def test_no_write_of_a_running_guest_is_missed(boot: Boot) -> None:
    """What the log does not tell of has not changed."""
    # 1: inc qword ptr [rdi]; add rdi, 0x1000; and rdi, rsi; or rdi, rdx; jmp 1b
    code = bytes.fromhex("48ff074881c7001000004821f74809d7ebee")
    npages = 64
    program = boot(code, rdi=HIGH, rsi=HIGH | (npages - 1) * PAGE, rdx=HIGH)
    vcpu = program.vcpus[0]
    memory = program.process.ranges.allocate(npages * PAGE)
    program.slot(1, HIGH, npages * PAGE, memory.address, flags=1)
    begun = begin(program, vcpu)
    copy = bytearray(npages * PAGE)
    seen = 0

    def look() -> bool:
        nonlocal seen
        for page in dirty(program, 1, npages):
            copy[page * PAGE : page * PAGE + 8] = memory.read(page * PAGE, 8)
            seen += 1
        return seen > 500

    until(look)
    begun.pending.cancel()
    assert isinstance(begun.pending.wait(20), Failure)
    look()
    assert memory.read(0, npages * PAGE) == bytes(copy)
