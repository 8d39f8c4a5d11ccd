# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of the simulated device that compute and nothing else."""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest

from hwemu.cpu.api import Segment, Sregs
from hwemu.cpu.fpu import Fpu
from kvmsim import exits, rangelist
from kvmsim.device import cpuid, registers
from kvmsim.device.caller import Caller, Efault, HostPiece
from kvmsim.device.capabilities import Asked, check_extension
from kvmsim.device.events import Events, Injection
from kvmsim.device.hostside import HostSide
from kvmsim.device.hypercall import Answer, ReadList, hypercall, listed
from kvmsim.device.machinecheck import MachineCheck
from kvmsim.device.msrs import SAVED, TABLE, MsrStore
from kvmsim.device.pending import Call
from kvmsim.device.registers import ControlState, Invalid
from kvmsim.device.results import Begun, Failure, Value
from kvmsim.device.runbuffer import RunBuffer
from kvmsim.device.serial import Serial
from kvmsim.device.table import NAMES, Level, Row, dispatch, table
from kvmsim.device.translate import translate
from kvmsim.kind import KINDS
from kvmsim.rangelist import MapGpaRange
from kvmsim.uapi import (
    KVM_CAP_CLOCKSOURCE,
    KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    KVM_RUN_MMAP_SIZE,
    KVMSIM_CAP_MAP_GPA_RANGES,
    KVMSIM_HC_MAP_GPA_RANGES,
    PAGE_SIZE,
    KvmError,
    structs,
)

U64 = (1 << 64) - 1
P = PAGE_SIZE
BATCH = KVMSIM_HC_MAP_GPA_RANGES

# --- hypercalls ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nr", "args", "more", "expected"),
    [
        (1, (0, 0, 0, 0), {}, Answer(0)),
        (1, (0, 0, 0, 0), {"cpl": 3}, Answer(-1 & U64)),
        (999, (0, 0, 0, 0), {}, Answer(-1000 & U64)),
        (12, (P, 1, 16, 0), {"forwarded": 0}, Answer(-1000 & U64)),
        (12, (P, 1, 16, 7), {}, exits.HypercallExit(12, (P, 1, 16))),
        (12, (P + 1, 1, 16, 0), {}, Answer(-22 & U64)),
        (12, (P, 0, 16, 0), {}, Answer(-22 & U64)),
        (12, (P, U64, 16, 0), {}, Answer(-22 & U64)),
        (12, (P, 1, 16, 0), {"cpl": 3}, Answer(-1 & U64)),
        (1 << 32 | 12, (P, 1, 0, 0), {"long_mode": False}, exits.HypercallExit(12, (P, 1, 0))),
        (1 << 32 | 12, (P, 1, 0, 0), {}, Answer(-1000 & U64)),
        (BATCH, (P, 2, 0, 0), {}, Answer(-1000 & U64)),
        (BATCH, (P, 2, 0, 0), {"batches": True}, ReadList(P, 48)),
        (BATCH, (P, 170, 0, 0), {"batches": True, "forwarded": 0}, ReadList(P, 4080)),
        (BATCH, (P, 2, 0, 0), {"batches": True, "cpl": 3}, Answer(-1 & U64)),
        (BATCH, (P, 0, 0, 0), {"batches": True}, Answer(-22 & U64)),
        (BATCH, (P, 171, 0, 0), {"batches": True}, Answer(-22 & U64)),
        (BATCH, (P + 4, 1, 0, 0), {"batches": True}, Answer(-22 & U64)),
        (BATCH, (P - 8, 1, 0, 0), {"batches": True}, Answer(-22 & U64)),
    ],
)
def test_hypercalls(nr: int, args: tuple[int, ...], more: dict[str, int], expected: object) -> None:
    setting = {"cpl": 0, "long_mode": True, "forwarded": 1 << 12, **more}
    assert hypercall(nr, args, **setting) == expected  # type: ignore[arg-type]


def test_a_list_is_forwarded_whole_or_refused() -> None:
    good = [MapGpaRange(P, 1, 16), MapGpaRange(9 * P, 3, 0)]
    assert listed(rangelist.pack(good)) == exits.map_gpa_ranges(good)
    assert listed(None) == Answer(-14 & U64)
    for wrong in (MapGpaRange(P + 1, 1, 0), MapGpaRange(P, 0, 0), MapGpaRange(P, U64, 0)):
        assert listed(rangelist.pack([*good, wrong])) == Answer(-22 & U64)


# --- registers ----------------------------------------------------------------------------------

LONG = Sregs.long_mode(0x1000)


def test_system_registers_survive_the_structure() -> None:
    state = ControlState(LONG, cr8=5, apic_base=0xFEE0_0900)
    data = registers.pack_sregs(state, interrupt=0x41)
    assert registers.unpack_sregs(data) == (state, 0x41)
    assert registers.unpack_common(registers.pack_sregs2(state)) == state
    unusable = replace(LONG, ldt=Segment(0, 0, 0, 0))
    data = registers.pack_sregs(ControlState(unusable))
    assert data[7 * 24 + 22] == 1, "what is not present is unusable"


@pytest.mark.parametrize(
    "change",
    [
        {"cr0": LONG.cr0 | 1 << 32},
        {"cr0": LONG.cr0 | 1 << 29},  # NW without CD
        {"cr0": 1 << 31},  # paging without protection
        {"cr4": LONG.cr4 | 1 << 18},  # OSXSAVE
        {"cr4": LONG.cr4 & ~(1 << 5)},
        {"efer": LONG.efer & ~(1 << 10)},
        {"efer": LONG.efer | 1 << 12},  # SVME
        {"cr3": 1 << 40},
        {"cr0": 1, "efer": 0},  # CS.L stays
        {"cr0": 1, "cs": Segment()},  # EFER.LMA stays
    ],
)
def test_states_that_no_processor_is_in(change: dict[str, object]) -> None:
    data = registers.pack_sregs(ControlState(replace(LONG, **change)))  # type: ignore[arg-type]
    with pytest.raises(Invalid):
        registers.unpack_sregs(data)


@pytest.mark.parametrize("base", [1 << 9, 1 << 10, 1 << 40, 1])
def test_apic_bases(base: int) -> None:
    with pytest.raises(Invalid, match="apic_base"):
        registers.unpack_common(registers.pack_sregs(ControlState(LONG, 0, base)))


def test_fpu_and_xsave() -> None:
    fpu = Fpu(
        0x27F, 7 << 11, 0x80, 0x1FA0,
        tuple(bytes([i] * 10) + bytes(6) for i in range(8)),
        tuple(bytes([0x40 + i] * 16) for i in range(16)),
    )  # fmt: skip
    assert registers.unpack_fpu(registers.pack_fpu(fpu)) == fpu
    area = registers.pack_xsave(fpu)
    assert len(area) == 4096
    assert registers.unpack_xsave(area) == fpu
    bad = bytearray(area)
    bad[512] |= 4  # AVX
    with pytest.raises(Invalid, match="xstate_bv"):
        registers.unpack_xsave(bytes(bad))
    bad = bytearray(area)
    bad[27] = 1
    with pytest.raises(Invalid, match="mxcsr"):
        registers.unpack_xsave(bytes(bad))


# --- CPUID, MSRs, events ------------------------------------------------------------------------


def test_a_guest_sees_the_cpuid_that_was_set() -> None:
    entries = (
        cpuid.Entry(1, 0, 0, 1, 2, 3, 4),
        cpuid.Entry(7, 0, 1, 5, 6, 7, 8),
        cpuid.Entry(7, 1, 1, 9, 10, 11, 12),
        cpuid.Entry(1, 0, 0, 99, 99, 99, 99),
    )
    seen = cpuid.GuestCpuid(entries)
    assert seen(1, 0) == seen(1, 77) == (1, 2, 3, 4), "the first entry counts"
    assert seen(7, 1) == (9, 10, 11, 12)
    assert seen(7, 2) == (0, 0, 0, 0)
    assert cpuid.GuestCpuid()(0, 0) == (0, 0, 0, 0)
    packed = b"".join(entry.pack() for entry in entries)
    assert cpuid.unpack_entries(packed) == entries


def test_supported_cpuid_names_the_processor_and_kvm() -> None:
    found = {entry.function: entry for entry in cpuid.SUPPORTED}
    vendor = struct.pack("<III", found[0].ebx, found[0].edx, found[0].ecx)
    assert vendor == b"AuthenticAMD"
    assert struct.pack("<III", *found[0x4000_0000].answer[1:]) == b"KVMKVMKVM\0\0\0"
    assert found[0x8000_0008].eax & 0xFF == 40
    assert [entry.function for entry in cpuid.SUPPORTED] == sorted(found)


def test_the_clock_that_cpuid_announces_is_a_capability_and_has_its_registers() -> None:
    (features,) = (entry.eax for entry in cpuid.SUPPORTED if entry.function == 0x4000_0001)
    announced = cpuid.KVM_FEATURE_CLOCKSOURCE | cpuid.KVM_FEATURE_CLOCKSOURCE2
    assert features & announced == announced
    assert check_extension(KVM_CAP_CLOCKSOURCE, Asked("upstream", None, None)) == 1
    assert {0x11, 0x12, 0x4B56_4D00, 0x4B56_4D01} <= set(SAVED)


def test_msrs_refuse_what_the_processor_refuses() -> None:
    store = MsrStore(lambda: 1000, bsp=True)
    assert store.read(0x1B, host=True) == 0xFEE0_0900
    assert store.read(0x12345, host=True) is None
    assert not store.write(0x12345, 0, host=True)
    for index, bad in ((0x277, 2), (0x2FF, 2), (0x250, 7), (0x175, 1 << 50), (0x1B, 1 << 10)):
        before = store.read(index, host=False)
        assert not store.write(index, bad, host=False)
        assert store.read(index, host=False) == before
    assert not store.write(0xCE, 5, host=False)
    assert store.write(0xCE, 5, host=True), "user space may choose MSR_PLATFORM_INFO"
    assert store.write(0x10, 5000, host=False)
    assert store.read(0x10, host=False) == 5000, "the counter goes on from there"
    assert set(TABLE) - set(SAVED) == {0xFE}, "what nobody can write"


def test_events_come_one_by_one() -> None:
    events = Events(exception=Injection(13, 5), interrupt=0x40, nmi=True)
    packed = events.pack(shadow=False)
    assert [events.next() for _ in range(4)] == [
        Injection(13, 5), Injection(2), Injection(0x40), None,
    ]  # fmt: skip
    again = Events()
    again.unpack(packed)
    assert (again.exception, again.interrupt, again.nmi) == (Injection(13, 5), 0x40, True)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(20, 1 << 4), (20, 1 << 5), (20, 1 << 6), (0, 1 | 2 << 8), (0, 1 | 32 << 8), (8, 0x10001)],
)
def test_events_that_cannot_be(offset: int, value: int) -> None:
    data = bytearray(64)
    struct.pack_into("<I", data, offset, value)
    events = Events(interrupt=7)
    with pytest.raises(Invalid):
        events.unpack(bytes(data))
    assert events.interrupt == 7


def test_a_guest_may_do_less_with_machine_check_registers_than_user_space() -> None:
    writable = [False]
    checks = MachineCheck(lambda: writable[0])
    assert checks.read(0x17B, host=True) == 0
    assert checks.read(0x17B, host=False) is None, "no MCG_CTL_P"
    assert not checks.write(0x17B, 0, host=False)
    checks.set_up(1 << 8 | 2)
    assert checks.read(0x17B, host=False) == U64
    assert checks.write(0x17B, 0, host=False)
    assert checks.read(0x280, host=False) is None, "no MCG_CMCI_P"
    assert not checks.write(0x280, 0, host=False)
    assert checks.write(0x401, 7, host=True)
    assert not checks.write(0x401, 8, host=False), "the guest only clears a status"
    assert checks.read(0x401, host=False) == 7
    assert checks.write(0x401, 0, host=False)
    writable[0] = True
    assert checks.write(0x405, 8, host=False)
    assert checks.read(0x405, host=False) == 8
    assert 0x3FF not in checks
    assert 0x480 not in checks


@pytest.mark.parametrize(
    ("vendor", "writable"),
    [(b"AuthenticAMD", True), (b"HygonGenuine", True), (b"GenuineIntel", False), (b"", False)],
)
def test_a_guest_of_amd_may_be_allowed_to_write_a_status(vendor: bytes, writable: bool) -> None:
    ebx, edx, ecx = struct.unpack("<III", vendor.ljust(12, b"\0"))
    guest = cpuid.GuestCpuid([cpuid.Entry(0, 0, 0, 1, ebx, ecx, edx)])
    store = MsrStore(lambda: 0, bsp=True, amd=lambda: guest.amd_compatible)
    assert not store.write(0x401, 1, host=False)
    assert store.write(0xC001_0015, 1 << 18, host=False)
    assert store.write(0x401, 1, host=False) == writable


# --- translation --------------------------------------------------------------------------------


def test_translation_walks_the_guests_tables() -> None:
    words = {
        0x1000: 0x2003, 0x2000: 0x3003, 0x2008: 0x4000_0083,
        0x3000: 0x4003, 0x3008: 0x0060_0083, 0x4008: 0x5003, 0x4010: 0x6002,
    }  # fmt: skip

    def walk(linear: int, sregs: Sregs = LONG) -> int | None:
        return translate(sregs, linear, lambda gpa: words.get(gpa, 0) if gpa < 0x8000 else None)

    assert walk(0x1234) == 0x5234
    assert walk(0x2000) is None, "not present"
    assert walk(0x20_1234) == 0x60_1234
    assert walk(0x4567_89AB) == 0x4567_89AB, "a page of 1 GiB"
    assert walk(1 << 47) is None, "not canonical"
    assert walk(0x1234, replace(LONG, cr0=1)) == 0x1234
    assert walk(0x1234, replace(LONG, efer=0)) is None
    assert walk(0x1234, replace(LONG, cr3=0x10_0000)) is None, "tables outside memory"


# --- the caller's memory ------------------------------------------------------------------------


class Host:
    """An arena that only counts."""

    def __init__(self) -> None:
        self.next = 1 << 39
        self.placed: dict[int, int] = {}

    def place(self, fd: int, offset: int, length: int, *, writable: bool = True) -> int:
        hpa, self.next = self.next, self.next + length
        self.placed[hpa] = length
        return hpa

    def retire(self, hpa: int, length: int) -> None:
        assert self.placed.pop(hpa) == length


class Ranges:
    """A caller with memory at pages 16…31, of which 24…31 are read-only."""

    def host_range(self, start: int, size: int) -> Sequence[HostPiece]:
        pieces = []
        for first, last, writable in ((16, 24, True), (24, 32, False)):
            lower, upper = max(first * P, start), min(last * P, start + size)
            if lower < upper:
                pieces.append(HostPiece(lower, upper - lower, 3, lower, writable))
        return pieces


def side() -> tuple[HostSide, Host, Caller]:
    host = Host()
    return HostSide(host), host, Ranges()  # type: ignore[arg-type, return-value]


def test_slots_share_what_is_mapped() -> None:
    memory, host, caller = side()
    made, missing = memory.place(caller, 8, 20, writable=True)
    assert missing == "8 of 12 pages cannot be shared"
    memory.add(1, 8, 20, made)
    base = memory.hpa(16)
    assert base is not None
    assert (memory.hpa(15), memory.hpa(19), memory.hpa(20)) == (None, base + 3 * P, None)
    made, missing = memory.place(caller, 18, 22, writable=True)
    assert (len(made), missing) == (1, ""), "only the gap"
    memory.add(2, 18, 22, made)
    assert memory.hpa(19) == base + 3 * P
    memory.retire(memory.remove(1, 8, 20))
    assert memory.hpa(18) == base + 2 * P, "the other slot has it still"
    memory.retire(memory.remove(2, 18, 22))
    assert (memory.hpa(18), host.placed) == (None, {})


def test_what_is_read_only_is_not_mapped_for_stores() -> None:
    memory, _, caller = side()
    made, missing = memory.place(caller, 16, 32, writable=True)
    assert missing == "8 of 16 pages cannot be shared"
    memory.discard(made)
    made, missing = memory.place(caller, 16, 32, writable=False)
    assert missing == ""
    memory.add(1, 16, 32, made)
    memory.check("op", 16, 24, writable=True)
    with pytest.raises(KvmError, match="read-only") as caught:
        memory.check("op", 23, 25, writable=True)
    assert caught.value.errno == errno.EFAULT
    memory.check("op", 16, 32, writable=False)


def test_mappings_that_changed_are_forgotten_whole() -> None:
    memory, host, caller = side()
    made, _ = memory.place(caller, 16, 24, writable=True)
    memory.add(1, 16, 24, made)
    assert memory.covered(20, 21) == (16, 24)
    memory.retire(memory.forget(20, 21))
    assert (memory.hpa(16), host.placed) == (None, {})
    assert memory.covered(20, 21) == (20, 21)
    memory.retire(memory.remove(1, 16, 24))
    memory.close()


def test_a_provider_that_fails_leaves_nothing_mapped() -> None:
    memory, host, _ = side()

    class Failing(Ranges):
        def host_range(self, start: int, size: int) -> Sequence[HostPiece]:
            if start >= 20 * P:
                raise Efault(start, size)
            return super().host_range(start, size)

    made, _ = memory.place(Failing(), 18, 20, writable=True)  # type: ignore[arg-type]
    memory.add(1, 18, 20, made)
    with pytest.raises(Efault):
        memory.place(Failing(), 16, 24, writable=True)  # type: ignore[arg-type]
    assert list(host.placed.values()) == [2 * P]


# --- calls that wait ----------------------------------------------------------------------------


def test_an_outcome_is_told_once_to_all() -> None:
    cancelled: list[Call] = []
    call = Call(cancelled.append)
    told: list[object] = []
    call.on_done(told.append)
    call.cancel()
    assert cancelled == [call]
    assert call.wait(0) is None
    call.finish(Value(3))
    call.on_done(told.append)
    call.cancel()
    assert (told, call.wait(0), cancelled) == ([Value(3)] * 2, Value(3), [call])


@pytest.mark.parametrize("early", [True, False])
def test_a_call_that_follows_another(early: bool) -> None:
    cancelled: list[Call] = []
    outer, inner = Call(lambda call: None), Call(cancelled.append)
    if early:
        outer.cancel()
    outer.follow(inner)
    if not early:
        outer.cancel()
    assert cancelled == [inner]
    inner.finish(Failure(errno.EINTR, "x"))
    assert outer.wait(0) == Failure(errno.EINTR, "x")


def test_a_queued_call_that_breaks_is_answered_and_the_next_one_done() -> None:
    serial = Serial("x", lambda call: None)
    first = Call(lambda call: None)
    assert serial.call(lambda: Begun(first)) == Begun(first)

    def breaks() -> Value:
        raise RuntimeError("broken")

    waiting = [serial.call(breaks), serial.call(lambda: Value(7))]
    assert all(isinstance(result, Begun) for result in waiting)
    assert len(serial.queued()) == 2
    said: list[object] = []
    before = threading.excepthook
    threading.excepthook = lambda args: said.append(args.exc_value)
    try:
        serial.unlock()
        assert isinstance(waiting[0], Begun)
        assert isinstance(waiting[1], Begun)
        assert waiting[0].pending.wait(20) == Failure(errno.EIO, "internal error: broken")
        assert waiting[1].pending.wait(20) == Value(7)
        serial.wait_idle()
        for thread in threading.enumerate():
            if thread.name == "x ioctls":
                thread.join(20)
        assert [str(error) for error in said] == ["broken"]
    finally:
        threading.excepthook = before
    with pytest.raises(RuntimeError, match="broken"):
        serial.call(breaks)
    assert serial.call(lambda: Value(1)) == Value(1), "the mutex is free"


# --- struct kvm_run -----------------------------------------------------------------------------


def test_kvm_run_needs_its_pages() -> None:
    for memory in (bytearray(KVM_RUN_MMAP_SIZE - 1), bytes(KVM_RUN_MMAP_SIZE)):
        with pytest.raises(ValueError, match="kvm_run needs"):
            RunBuffer(memoryview(memory), "upstream")


def test_kvm_run_is_read_live() -> None:
    memory = bytearray(KVM_RUN_MMAP_SIZE)
    run = RunBuffer(memoryview(memory), "upstream")
    assert not run.immediate_exit
    memory[1] = 2
    assert run.immediate_exit
    memory[0] = 1
    assert run.request_interrupt_window
    memory[14:16] = b"\xff\xff"
    run.begin()
    assert memory[14:16] == b"\0\0"
    run.save(ready=True, if_flag=False, cr8=3, apic_base=0xFEE0_0000)
    head = structs.RUN_HEAD.unpack_from(memory)
    assert head == (1, 2, 0, 1, 0, 0, 3, 0xFEE0_0000)


# --- tables -------------------------------------------------------------------------------------


def answer(device: object, call: object) -> int:
    raise Efault(8, 8)


ROWS = table((Row(KVM_CREATE_VM, answer, "x"),))


@pytest.mark.parametrize(
    ("level", "number"),
    [(Level.SYSTEM, errno.EINVAL), (Level.VM, errno.ENOTTY), (Level.VCPU, errno.EINVAL)],
)
@pytest.mark.logs("not simulated")
def test_unknown_requests_end_as_the_kernels_switch(
    level: Level, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    caller: Caller = Ranges()  # type: ignore[assignment]
    result = dispatch(object(), level, ROWS, KVM_CHECK_EXTENSION, 0, caller)
    assert isinstance(result, Failure)
    assert result.errno == number
    assert "KVM_CHECK_EXTENSION" in caplog.text
    result = dispatch(object(), level, ROWS, 0x1234_5678, 0, caller)
    assert isinstance(result, Failure)
    assert "0x12345678" in result.reason
    result = dispatch(object(), level, ROWS, KVM_CREATE_VM | 1 << 40, 0, caller)
    assert isinstance(result, Failure)
    assert result.errno == errno.EFAULT, "the upper half of the request does not count"


def test_a_request_comes_once() -> None:
    with pytest.raises(ValueError, match="KVM_CREATE_VM is there twice"):
        table((*ROWS.values(), *ROWS.values()))
    assert NAMES[KVM_CREATE_VM] == "KVM_CREATE_VM"


def test_capabilities_depend_on_the_vm() -> None:
    def attributes(kind: str | None, abi: str = "upstream") -> int:
        asked = Asked(abi, kind and KINDS[kind], 0)  # type: ignore[arg-type]
        return check_extension(KVM_CAP_MEMORY_ATTRIBUTES, asked)

    assert [attributes(kind) for kind in (None, "default", "sw-protected")] == [8, 0, 8]
    assert attributes(None, "v7") == 0
    assert check_extension(9999, Asked("upstream", None, 0)) == 0
    assert check_extension(KVMSIM_CAP_MAP_GPA_RANGES, Asked("upstream", None, None)) == 170
    assert check_extension(KVMSIM_CAP_MAP_GPA_RANGES, Asked("v7", None, None)) == 0
