# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import struct
from dataclasses import dataclass, field

import pytest

from kvmsim import rangelist
from kvmsim.exits import (
    BadHvaExit,
    HltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    ShutdownExit,
    map_gpa_ranges,
)
from kvmsim.rangelist import MapGpaRange
from kvmsim.uapi import KVMSIM_HC_MAP_GPA_RANGES
from kvmsim.vmm.bootparams import RamRange, Technology
from kvmsim.vmm.convert import Discard
from kvmsim.vmm.launch import LaunchPage
from kvmsim.vmm.machine import (
    FAULT_REPEATS,
    Machine,
    MachineConfig,
    Resume,
    Stop,
    StopReason,
    Wait,
)

PAGE = 4096
MIB = 1 << 20
BASE = 0x20000
COM1 = 0x3F8
ENCRYPTED = 1 << 4
ENABLE_INPUT = IoExit(COM1 + 1, 1, True, b"\x01")


@dataclass
class Memory:
    """Attributes as a set of private pages."""

    private: set[int] = field(default_factory=set)
    discarded: list[tuple[str, int, int]] = field(default_factory=list)
    populated: list[tuple[int, bytes, bool]] = field(default_factory=list)
    fail: Exception | None = None
    shared: dict[int, bytes] = field(default_factory=dict)

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> bool:
        if self.fail:
            raise self.fail
        pages = set(range(gpa // PAGE, (gpa + size) // PAGE))
        before = self.private.copy()
        self.private = self.private | pages if private else self.private - pages
        return self.private != before

    def discard_shared(self, gpa: int, size: int) -> None:
        self.discarded.append(("shared", gpa, size))

    def discard_private(self, gpa: int, size: int) -> None:
        self.discarded.append(("private", gpa, size))

    def read_shared(self, gpa: int, length: int) -> bytes:
        return self.shared.get(gpa, b"")[:length].ljust(length, b"\0")

    def write_shared(self, gpa: int, data: bytes) -> None:
        pass

    def populate(self, gpa: int, source: bytes) -> None:
        self.populated.append((gpa, source, gpa // PAGE in self.private))


def elf(*segments: int) -> bytes:
    """An executable with a byte of code at each address; it starts at the first."""
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 2, 62, 1, segments[0], 64, 0, 0, 64, 56, len(segments), 0, 0, 0
    )
    at = 64 + 56 * len(segments)
    loads = [struct.pack("<IIQQQQQQ", 1, 7, at, 0, gpa, 1, 16, PAGE) for gpa in segments]
    return head + b"".join(loads) + b"\xf4"


def machine(
    vcpus: int = 1, discard: Discard = Discard.BOTH, *, batches: bool = False
) -> tuple[Machine, Memory]:
    memory = Memory()
    ram = (RamRange(0, 8 * MIB),)
    config = MachineConfig(ram, vcpus=vcpus, discard=discard, batches=batches)
    return Machine(config, memory), memory


def u64(value: int) -> int:
    return value & (1 << 64) - 1


# --- ports -----------------------------------------------------------------------------------


def test_console_output_is_taken_once() -> None:
    m, _ = machine()
    for byte in b"hi":
        assert m.handle_exit(0, IoExit(COM1, 1, True, bytes([byte]))) == Resume()
    assert m.take_output() == b"hi"
    assert m.take_output() == b""


def test_string_output_of_several_units() -> None:
    m, _ = machine()
    m.handle_exit(0, IoExit(COM1, 1, True, b"abc", count=3))
    assert m.take_output() == b"abc"


def test_console_input_is_read_by_the_guest() -> None:
    m, _ = machine()
    m.feed(b"xy")
    assert m.handle_exit(0, IoExit(COM1 + 5, 1, False)) == Resume(b"\x61")
    assert m.handle_exit(0, IoExit(COM1, 1, False, count=2)) == Resume(b"xy")
    assert m.handle_exit(0, IoExit(COM1 + 5, 1, False)) == Resume(b"\x60")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_unknown_ports_float_high_and_are_counted(size: int) -> None:
    m, _ = machine()
    assert m.handle_exit(0, IoExit(0x80, size, False)) == Resume(b"\xff" * size)
    assert m.handle_exit(0, IoExit(0x80, size, True, bytes(size))) == Resume()
    assert m.statistics.unknown_port_accesses == 2 * size


@pytest.mark.parametrize(("data", "status"), [(b"\0", 0), (b"\x03\0\0\0", 3), (b"\x01\x01", 1)])
def test_exit_port_stops_with_the_guests_status(data: bytes, status: int) -> None:
    m, _ = machine()
    action = m.handle_exit(0, IoExit(0xF4, len(data), True, data))
    assert isinstance(action, Stop)
    assert (action.reason, action.status) == (StopReason.GUEST_EXIT, status)


# --- other exits -----------------------------------------------------------------------------


def test_mmio_holes_float_high() -> None:
    m, _ = machine()
    assert m.handle_exit(0, MmioExit(1 << 32, 8, False)) == Resume(b"\xff" * 8)
    assert m.handle_exit(0, MmioExit(1 << 32, 4, True, bytes(4))) == Resume()
    assert m.statistics.mmio_accesses == 2


@pytest.mark.parametrize(
    ("exit", "reason"),
    [
        (ShutdownExit(), StopReason.SHUTDOWN),
        (BadHvaExit(0x5000), StopReason.MEMORY),
        (InternalErrorExit(1, (2, 3)), StopReason.ENGINE),
    ],
)
def test_ends(exit: ShutdownExit | BadHvaExit | InternalErrorExit, reason: StopReason) -> None:
    m, _ = machine()
    action = m.handle_exit(0, exit)
    assert isinstance(action, Stop)
    assert (action.reason, action.status) == (reason, 1)
    assert "vcpu 0" in action.message


def test_interrupted_goes_on() -> None:
    m, _ = machine()
    assert m.handle_exit(0, InterruptedExit()) == Resume()


# --- halting and waking ----------------------------------------------------------------------


def test_halted_for_ever_is_an_end_only_when_nothing_can_wake() -> None:
    m, _ = machine(vcpus=2)
    assert m.handle_exit(1, HltExit()) == Wait()
    action = m.handle_exit(0, HltExit())
    assert isinstance(action, Stop)
    assert action.reason is StopReason.ALL_HALTED


def test_input_wakes_the_boot_vcpu_and_no_other() -> None:
    m, _ = machine(vcpus=2)
    m.handle_exit(0, ENABLE_INPUT)
    assert m.handle_exit(1, HltExit()) == Wait()
    assert m.handle_exit(0, HltExit()) == Wait()
    assert m.is_halted(0)
    assert m.feed(b"x") == (0,)
    assert not m.is_halted(0)
    assert m.is_halted(1)
    assert m.feed(b"y") == ()


def test_input_that_came_before_the_halt_is_not_slept_through() -> None:
    m, _ = machine()
    m.handle_exit(0, ENABLE_INPUT)
    assert m.feed(b"x") == ()
    assert m.handle_exit(0, HltExit()) == Resume()
    m.handle_exit(0, IoExit(COM1, 1, False))
    assert m.handle_exit(0, HltExit()) == Wait()


def test_kick_wakes_a_halted_vcpu() -> None:
    m, _ = machine(vcpus=3)
    assert m.handle_exit(2, HltExit()) == Wait()
    assert m.handle_exit(0, HypercallExit(5, (0, 2, 0, 0))) == Resume(0, wake=(2,))
    assert m.handle_exit(2, HltExit()) == Wait(), "one kick ends one HLT"


def test_kick_before_the_halt_ends_it_at_once() -> None:
    m, _ = machine(vcpus=2)
    assert m.handle_exit(0, HypercallExit(5, (0, 1, 0, 0))) == Resume(0)
    assert m.handle_exit(1, HltExit()) == Resume()
    assert m.handle_exit(1, HltExit()) == Wait()


def test_kick_of_nobody_is_no_error() -> None:
    m, _ = machine()
    assert m.handle_exit(0, HypercallExit(5, (0, 9, 0, 0))) == Resume(0)


# --- hypercalls ------------------------------------------------------------------------------


def test_unknown_hypercall_answers_kvm_enosys() -> None:
    m, _ = machine()
    assert m.handle_exit(0, HypercallExit(99, (0, 0, 0, 0))) == Resume(u64(-1000))
    assert m.statistics.unknown_hypercalls == 1


def test_map_gpa_range_converts_and_discards() -> None:
    m, memory = machine()
    call = HypercallExit(12, (4 * MIB, 3, ENCRYPTED | 1, 0))
    assert m.handle_exit(0, call) == Resume(0)
    assert memory.private == {1024, 1025, 1026}
    assert memory.discarded == [("shared", 4 * MIB, 3 * PAGE)]
    assert m.handle_exit(0, HypercallExit(12, (4 * MIB, 1, 0, 0))) == Resume(0)
    assert memory.private == {1025, 1026}
    assert memory.discarded[1:] == [("private", 4 * MIB, PAGE)]
    assert m.statistics.conversions_explicit == 2
    assert m.statistics.discarded_bytes == 4 * PAGE


def test_discard_none_frees_nothing() -> None:
    m, memory = machine(discard=Discard.NONE)
    m.handle_exit(0, HypercallExit(12, (4 * MIB, 3, ENCRYPTED, 0)))
    assert memory.private
    assert memory.discarded == []


@pytest.mark.parametrize(
    "args",
    [
        (4 * MIB + 1, 1, ENCRYPTED),
        (4 * MIB, 0, ENCRYPTED),
        (4 * MIB, 1 << 60, ENCRYPTED),
        (8 * MIB, 1, ENCRYPTED),
        (4 * MIB, 1, ENCRYPTED | 1 << 5),
    ],
)
def test_impossible_map_gpa_range_answers_einval(args: tuple[int, int, int]) -> None:
    m, memory = machine()
    assert m.handle_exit(0, HypercallExit(12, (*args, 0))) == Resume(u64(-errno.EINVAL))
    assert memory.private == set()
    assert m.statistics.conversions_refused == 1


def test_failing_memory_is_the_hypercalls_errno() -> None:
    m, memory = machine()
    memory.fail = OSError(errno.ENOMEM, "no memory")
    call = HypercallExit(12, (4 * MIB, 1, ENCRYPTED, 0))
    assert m.handle_exit(0, call) == Resume(u64(-errno.ENOMEM))


# --- many ranges by one call -----------------------------------------------------------------

BATCH = KVMSIM_HC_MAP_GPA_RANGES


def listing(*ranges: tuple[int, int, int], at: int = 0x5000) -> tuple[Machine, Memory]:
    """A machine that takes batches, with a list in shared memory."""
    m, memory = machine(batches=True)
    memory.shared[at] = rangelist.pack([MapGpaRange(*entry) for entry in ranges])
    return m, memory


def test_a_list_is_converted_with_its_neighbours_joined() -> None:
    m, memory = listing(
        (4 * MIB, 2, ENCRYPTED), (4 * MIB + 2 * PAGE, 1, ENCRYPTED), (5 * MIB, 1, ENCRYPTED),
        (5 * MIB + PAGE, 1, 0), (4 * MIB, 1, 0),
    )  # fmt: skip
    assert m.handle_exit(0, HypercallExit(BATCH, (0x5000, 5, 0, 0))) == Resume(5)
    assert memory.discarded == [
        ("shared", 4 * MIB, 3 * PAGE), ("shared", 5 * MIB, PAGE),
        ("private", 5 * MIB + PAGE, PAGE), ("private", 4 * MIB, PAGE),
    ]  # fmt: skip
    assert memory.private == {1025, 1026, 1280}
    assert m.statistics.batches == 1
    assert m.statistics.conversions_explicit == 4
    assert m.statistics.hypercalls == 1


def test_a_list_that_comes_with_the_exit_needs_no_leave_to_be_read() -> None:
    m, memory = machine()
    ranges = [MapGpaRange(4 * MIB, 1, ENCRYPTED), MapGpaRange(6 * MIB, 1, ENCRYPTED)]
    assert m.handle_exit(0, map_gpa_ranges(ranges)) == Resume(2)
    assert memory.private == {1024, 1536}


@pytest.mark.parametrize(
    ("ranges", "answer", "pages"),
    [
        # the second of a run is outside of RAM: the first is done all the same
        (((8 * MIB - PAGE, 1, ENCRYPTED), (8 * MIB, 1, ENCRYPTED)), 1, {2047}),
        (((4 * MIB, 1, ENCRYPTED), (9 * MIB, 1, ENCRYPTED), (5 * MIB, 1, ENCRYPTED)), 1, {1024}),
        (((9 * MIB, 1, ENCRYPTED), (4 * MIB, 1, ENCRYPTED)), -errno.EINVAL, set()),
        # KVM refuses these as a whole
        (((4 * MIB, 1, ENCRYPTED), (5 * MIB + 1, 1, ENCRYPTED)), -errno.EINVAL, set()),
        (((4 * MIB, 1, ENCRYPTED), (5 * MIB, 0, ENCRYPTED)), -errno.EINVAL, set()),
    ],
)
def test_how_far_a_list_was_converted(
    ranges: tuple[tuple[int, int, int], ...], answer: int, pages: set[int]
) -> None:
    m, memory = listing(*ranges)
    call = HypercallExit(BATCH, (0x5000, len(ranges), 0, 0))
    assert m.handle_exit(0, call) == Resume(u64(answer))
    assert memory.private == pages


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        ((0x5000, 0), errno.EINVAL),
        ((0x5000, 171), errno.EINVAL),
        ((0x5004, 1), errno.EINVAL),
        ((0x5FF0, 1), errno.EINVAL),  # two pages
        ((64 * MIB, 1), errno.EFAULT),  # no RAM
        ((4 * MIB, 1), errno.EFAULT),  # private
    ],
)
def test_lists_that_cannot_be_read(args: tuple[int, int], answer: int) -> None:
    m, memory = listing((6 * MIB, 1, ENCRYPTED))
    m.handle_exit(0, HypercallExit(12, (4 * MIB, 1, ENCRYPTED, 0)))
    assert m.handle_exit(0, HypercallExit(BATCH, (*args, 0, 0))) == Resume(u64(-answer))
    assert memory.private == {1024}


def test_a_list_is_nothing_where_nobody_asked_for_it() -> None:
    m, _ = machine()
    assert m.handle_exit(0, HypercallExit(BATCH, (0x5000, 1, 0, 0))) == Resume(u64(-1000))


# --- implicit conversions --------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EFAULT, None])
def test_memory_fault_converts_to_what_was_accessed(number: int | None) -> None:
    m, memory = machine()
    assert m.handle_exit(0, MemoryFaultExit(4 * MIB, PAGE, True, number)) == Resume()
    assert memory.private == {1024}
    assert m.handle_exit(0, MemoryFaultExit(4 * MIB, PAGE, False, number)) == Resume()
    assert memory.private == set()
    assert m.statistics.conversions_implicit == 2


def test_bouncing_between_the_sides_never_stops_the_machine() -> None:
    m, _ = machine(vcpus=2)
    for turn in range(10 * FAULT_REPEATS):
        fault = MemoryFaultExit(4 * MIB, PAGE, bool(turn % 2 == 0), errno.EFAULT)
        assert m.handle_exit(turn % 2, fault) == Resume()


def test_a_fault_that_no_conversion_cures_ends_the_machine() -> None:
    m, memory = machine()
    memory.private = {1024}
    fault = MemoryFaultExit(4 * MIB, PAGE, True, errno.EFAULT, "no private file")
    actions = [m.handle_exit(0, fault) for _ in range(FAULT_REPEATS)]
    assert actions[:-1] == [Resume()] * (FAULT_REPEATS - 1)
    last = actions[-1]
    assert isinstance(last, Stop)
    assert last.reason is StopReason.MEMORY
    assert "no private file" in last.message


def test_progress_between_faults_starts_the_count_again() -> None:
    m, memory = machine()
    memory.private = {1024}
    fault = MemoryFaultExit(4 * MIB, PAGE, True, errno.EFAULT)
    for _ in range(3 * FAULT_REPEATS):
        assert m.handle_exit(0, fault) == Resume()
        m.handle_exit(0, IoExit(0x80, 1, False))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, 133])
def test_other_errors_are_not_conversions(number: int) -> None:
    m, memory = machine()
    action = m.handle_exit(0, MemoryFaultExit(4 * MIB, PAGE, True, number, "why"))
    assert isinstance(action, Stop)
    assert action.reason is StopReason.MEMORY
    assert "why" in action.message
    assert memory.private == set()


def test_private_access_to_a_hole_ends_the_machine() -> None:
    m, _ = machine()
    action = m.handle_exit(0, MemoryFaultExit(64 * MIB, PAGE, True, errno.EFAULT))
    assert isinstance(action, Stop)
    assert action.reason is StopReason.MEMORY


def test_impossible_machines_are_refused_when_they_are_made() -> None:
    with pytest.raises(ValueError, match="vCPUs"):
        machine(vcpus=0)


def test_payload_is_made_private_page_by_page_before_it_is_filled() -> None:
    made, memory = machine()
    image = elf(BASE, 4 * MIB)
    entries = made.boot(image, [(3 * MIB, b"xyz"), (2 * MIB, bytes(PAGE))])
    assert [e.rip for e in entries] == [BASE]
    assert memory.populated == [
        (2 * MIB, bytes(PAGE), True),
        (3 * MIB, b"xyz".ljust(PAGE, b"\0"), True),
        (4 * MIB, b"\xf4".ljust(PAGE, b"\0"), True),
    ]
    assert memory.private == {gpa // PAGE for gpa, _, _ in memory.populated}
    assert memory.discarded == []


# --- guests that start in private memory -------------------------------------------------------


def confidential(technology: Technology) -> tuple[Machine, Memory]:
    memory = Memory()
    ram = (RamRange(0, 8 * MIB), RamRange(8 * MIB, MIB, private=False))
    return Machine(MachineConfig(ram, technology=technology), memory), memory


def test_all_ram_is_private_before_the_first_page_is_added() -> None:
    made, memory = confidential(Technology.SNP)
    load = made.load_plan(elf(BASE))
    private_at_first: list[int] = []
    added: list[LaunchPage] = []

    def add(page: LaunchPage) -> None:
        private_at_first.append(len(memory.private))
        added.append(page)

    assert made.launch(load, add) == load.entries
    assert set(private_at_first) == {8 * MIB // PAGE}
    assert tuple(added) == load.pages
    assert memory.populated == []
    assert not made.is_shared(0, PAGE)
    assert made.is_shared(8 * MIB, MIB)


def test_without_a_processor_pages_are_populated() -> None:
    made, memory = confidential(Technology.PKVM)
    load = made.load_plan(elf(BASE))
    made.launch(load)
    assert memory.populated == [(page.gpa, page.data, True) for page in load.pages]


@pytest.mark.parametrize("technology", [Technology.TDX, Technology.SNP, Technology.PKVM])
def test_a_confidential_guest_is_not_booted_in_shared_memory(technology: Technology) -> None:
    made, memory = confidential(technology)
    with pytest.raises(ValueError, match="launch it"):
        made.boot(elf(BASE))
    assert memory.private == set()


def test_half_a_conversion_leaves_no_page_to_devices() -> None:
    class Torn(Memory):
        def discard_private(self, gpa: int, size: int) -> None:
            raise OSError(errno.EIO, "not freed")

    memory = Torn()
    made = Machine(MachineConfig((RamRange(0, 8 * MIB),)), memory)
    made.handle_exit(0, HypercallExit(12, (4 * MIB, 2, ENCRYPTED, 0)))
    assert made.handle_exit(0, HypercallExit(12, (4 * MIB, 1, 0, 0))) == Resume(u64(-errno.EIO))
    assert not made.is_shared(4 * MIB, PAGE)


def test_a_guest_may_give_up_by_other_means() -> None:
    made, _ = confidential(Technology.TDX)
    stop = made.guest_fatal(1, "memory not accepted")
    assert (stop.reason, stop.status) == (StopReason.GUEST_FATAL, 1)
    assert "vcpu 1" in stop.message
    assert "memory not accepted" in stop.message
