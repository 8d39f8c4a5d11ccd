# SPDX-License-Identifier: GPL-2.0-or-later
"""The seam between KVM and confidential hardware, part by part, and the fault path through it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from hwemu.arena import new_table_pool
from hwemu.stage2 import Stage2
from kvmsim.attributes import Attributes
from kvmsim.confidential.frames import FrameMap
from kvmsim.confidential.guestview import GuestView, NotShared
from kvmsim.confidential.platform import FrameMemory, HostPages, HpaMemory, Platform
from kvmsim.effect import Installed, LeaveGuest, PageGrant
from kvmsim.exits import MemoryFaultExit
from kvmsim.fault import Fault
from kvmsim.hostmem import HostMemory
from kvmsim.invalidate import MmuInvalidate
from kvmsim.kind import KINDS
from kvmsim.memslot import Memslots
from kvmsim.mmu import GuardRefusal, Leaf, Mmu
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import KVM_MEM_GUEST_MEMFD

PAGE, BASE = 4096, 1 << 39
SHARED = 1 << 39


# --- FrameMap -----------------------------------------------------------------------------------


def test_frames_are_known_by_gfn_over_blocks() -> None:
    frames = FrameMap()
    assert frames.get(5) is None
    frames.set(510, 5, 1000)
    assert [frames.get(gfn) for gfn in range(509, 516)] == [
        None, 1000, 1001, 1002, 1003, 1004, None
    ]  # fmt: skip
    assert frames.columns(508, 8).tolist() == [-1, -1, 1000, 1001, 1002, 1003, 1004, -1]
    frames.forget(511, 2)
    assert frames.columns(510, 5).tolist() == [1000, -1, -1, 1003, 1004]
    frames.set(512, 1, 7)
    assert frames.get(512) == 7
    frames.forget(0, 1 << 27)  # the cost follows what is known
    assert frames.columns(0, 2048).max() == -1
    frames.set(3, 1, 9)
    frames.clear()
    assert frames.get(3) is None


# --- the platform -------------------------------------------------------------------------------


@pytest.fixture
def host() -> Iterator[HostMemory]:
    made = HostMemory("none")
    yield made
    made.close()


def test_pages_of_the_host_are_taken_once_and_given_back(host: HostMemory) -> None:
    pages = HostPages(host, 4 * PAGE)
    taken = [pages.take() for _ in range(4)]
    assert sorted(taken) == [pages.base + n * PAGE for n in range(4)]
    assert pages.used == 4
    with pytest.raises(MemoryError, match="none of 4"):
        pages.take()
    for hpa in (pages.base - PAGE, pages.base + 4 * PAGE, pages.base + 8):
        with pytest.raises(ValueError, match="none of the host pages"):
            pages.give(hpa)
    for hpa in taken:
        pages.give(hpa)
    assert pages.used == 0


def test_memory_by_address_and_by_frame_is_the_same(host: HostMemory) -> None:
    memory = HpaMemory(host)
    frames = FrameMemory(memory)
    pages = HostPages(host, 4 * PAGE)
    one, two = pages.take(), pages.take()
    memory.write(one + 5, b"hello")
    assert frames.read(one // PAGE)[5:10] == b"hello"
    frames.copy(one // PAGE, two // PAGE)
    assert memory.read(two + 5, 5) == b"hello"
    memory.zero(one, 1)
    frames.write(two // PAGE, b"\1" * PAGE)
    assert memory.read(one, PAGE) == bytes(PAGE)
    assert memory.read(two, PAGE) == b"\1" * PAGE


def test_hardware_is_made_once_a_host(host: HostMemory) -> None:
    platform = Platform(host)
    made: list[Platform] = []

    class Chip:
        def __init__(self, where: Platform) -> None:
            made.append(where)

    assert platform.hardware(Chip, Chip) is platform.hardware(Chip, Chip)
    assert made == [platform]
    assert platform.ram[0] == host.arena.hpa_base
    assert platform.pages is platform.pages


# --- shared pages as KVM reads them -------------------------------------------------------------


class Side:
    """A userspace side of 16 pages from BASE on, the last one missing."""

    def hpa(self, page: int) -> int | None:
        return BASE + page * PAGE if page < 15 else None


@dataclass
class World:
    """A machine without vCPUs: gfns 0 to 15, of which 4 to 7 are private."""

    mmu: Mmu
    stage2: Stage2
    memory: dict[int, bytes] = field(default_factory=dict)

    @property
    def vm(self) -> World:
        return self

    @property
    def host(self) -> World:
        return self

    def read(self, hpa: int, size: int) -> bytes:
        return self.memory.get(hpa, b"\xaa" * size)[:size]

    def write(self, hpa: int, data: bytes) -> None:
        self.memory[hpa] = data


class Backing:
    """Instance 1 of file 3 lies at BASE + 1 GiB."""

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return start, end

    def hpa(self, instance: int, page: int) -> int | None:
        return BASE + (1 << 30) + page * PAGE


class Gate:
    """Admits, keeps back or refuses as it is told, and writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.gone: list[tuple[int, int, bool]] = []
        self.answer: Any = None

    def admit(
        self, gfn: int, first: int, last: int, hpa: int, *, private: bool, writable: bool
    ) -> tuple[Leaf, ...]:
        self.asked.append((gfn, first, last, hpa, private, writable))
        if isinstance(self.answer, BaseException):
            raise self.answer
        found: tuple[Leaf, ...] = self.answer(gfn, first, last, hpa)
        return found

    def zapped(self, gfn: int, npages: int, *, private: bool, moving: bool) -> None:
        self.gone.append((gfn, npages, private))


@pytest.fixture
def world() -> World:
    kind = KINDS["tdx"]
    slots = Memslots(kind=kind)
    slots.set(
        Region(0, KVM_MEM_GUEST_MEMFD, 0, 16 * PAGE, 0), shared=Side(), file=PrivateFile(3, 16)
    )
    stage2 = Stage2(new_table_pool(1 << 20), 256 << 20)
    mmu = Mmu(slots, Attributes(), MmuInvalidate(), stage2, Backing())  # type: ignore[arg-type]
    mmu.attributes.set(4, 8, 8)
    return World(mmu, stage2)


def test_kvm_reads_shared_pages_alone(world: World) -> None:
    view = GuestView(world)  # type: ignore[arg-type]
    view.write(0x1010, b"abc")
    assert world.memory == {BASE + 0x1010: b"abc"}
    assert view.read(0x1010, 3) == b"abc"
    for gpa, size in (
        (4 * PAGE, 8),
        (7 * PAGE + 8, 1),
        (0x1FFC, 8),
        (15 * PAGE, 1),
        (16 * PAGE, 1),
    ):
        with pytest.raises(NotShared, match=f"gpa {gpa:#x}"):
            view.read(gpa, size)
        with pytest.raises(NotShared):
            view.write(gpa, bytes(size))
    assert list(world.memory) == [BASE + 0x1010]


def test_a_table_walk_sees_both_sides(world: World) -> None:
    view = GuestView(world)  # type: ignore[arg-type]
    assert view.word(0x4000) is None
    world.stage2.map(0x4000, BASE + 0x9000, 1)
    world.memory[BASE + 0x9008] = (0x1234).to_bytes(8, "little")
    assert view.word(0x4008) == 0x1234


# --- a fault through a gate ---------------------------------------------------------------------


def arrived(world: World, gate: Gate, gpa: int = 5 * PAGE, *, write: bool = True) -> Any:
    """What a fault at a private page comes to when its grant for gfns [4, 8) is here."""
    world.mmu.gate = gate
    fault = Fault(0, gpa)
    fault.snapshot(world.mmu)
    fault.look_up(world.mmu)
    return fault.page_arrived(world.mmu, PageGrant(3, 4, 8, 0, 1, writable=write))


def mapped(world: World, half: int = 0) -> list[tuple[int, int, int]]:
    return [(gpa // PAGE, hpa, npages) for gpa, hpa, npages in world.stage2.mapped(half, 16)]


PRIVATE_HPA = BASE + (1 << 30)


def test_what_is_admitted_is_mapped(world: World) -> None:
    gate = Gate()
    gate.answer = lambda gfn, first, last, hpa: (Leaf(first, last - first, hpa),)
    assert isinstance(arrived(world, gate), Installed)
    assert gate.asked == [(5, 4, 8, PRIVATE_HPA + 4 * PAGE, True, True)]
    assert mapped(world) == [(4, PRIVATE_HPA + 4 * PAGE, 4)]


def test_what_is_admitted_in_part_is_mapped_in_part(world: World) -> None:
    gate = Gate()
    gate.answer = lambda gfn, first, last, hpa: (
        Leaf(gfn, 1, hpa + (gfn - first) * PAGE), Leaf(7, 1, hpa + 3 * PAGE)
    )  # fmt: skip
    assert isinstance(arrived(world, gate), Installed)
    assert mapped(world) == [
        (5, PRIVATE_HPA + 5 * PAGE, 1), (7, PRIVATE_HPA + 7 * PAGE, 1)
    ]  # fmt: skip


def test_what_is_pending_is_taken_and_not_mapped(world: World) -> None:
    gate = Gate()
    gate.answer = lambda gfn, first, last, hpa: ()
    assert isinstance(arrived(world, gate), Installed)
    assert mapped(world) == []


def test_a_refusal_leaves_the_guest_and_maps_nothing(world: World) -> None:
    gate = Gate()
    gate.answer = GuardRefusal(errno.EIO, "it is another's")
    effect = arrived(world, gate)
    assert effect == LeaveGuest(MemoryFaultExit(5 * PAGE, PAGE, True, errno.EIO, "it is another's"))
    assert mapped(world) == []


def test_a_gate_without_memory_is_an_exit(world: World) -> None:
    gate = Gate()
    gate.answer = MemoryError("no page")
    effect = arrived(world, gate)
    assert isinstance(effect, LeaveGuest)
    assert isinstance(effect.exit, MemoryFaultExit)
    assert effect.exit.errno == errno.ENOMEM
    assert mapped(world) == []


def test_a_shared_page_is_asked_about_as_shared(world: World) -> None:
    gate = Gate()
    gate.answer = lambda gfn, first, last, hpa: (Leaf(first, last - first, hpa),)
    world.mmu.gate = gate
    fault = Fault(0, 2 * PAGE | SHARED)
    fault.snapshot(world.mmu)
    fault.look_up(world.mmu)
    assert isinstance(fault.shared_arrived(world.mmu, BASE + 2 * PAGE), Installed)
    (asked,) = gate.asked
    assert (asked[0], asked[4]) == (2, False)
    assert [row[0] for row in mapped(world, SHARED)] == [(0 | SHARED) // PAGE]
    assert mapped(world) == []


def test_a_zap_tells_the_gate_of_exactly_its_side(world: World) -> None:
    gate = Gate()
    gate.answer = lambda gfn, first, last, hpa: (Leaf(first, last - first, hpa),)
    arrived(world, gate)
    world.mmu.begin_zap([(5, 6)], world.mmu.kind.halves)
    world.mmu.invalidate.end()
    assert sorted(gate.gone) == [(5, 1, False), (5, 1, True)]
    assert [row[0] for row in mapped(world)] == [4, 6]
    world.mmu.max_level = 2
    world.mmu.begin_zap([(6, 1 << 40)], (0,))
    world.mmu.invalidate.end()
    assert gate.gone[-1] == (6, world.mmu.kind.max_gfn - 6, True)
    assert [row[0] for row in mapped(world)] == [4]


def test_an_invalidation_while_the_page_came_asks_nothing_of_the_hardware(world: World) -> None:
    gate = Gate()
    world.mmu.gate = gate
    fault = Fault(0, 5 * PAGE)
    fault.snapshot(world.mmu)
    fault.look_up(world.mmu)
    world.mmu.begin_zap([(5, 6)], (0,))
    world.mmu.invalidate.end()
    fault.page_arrived(world.mmu, PageGrant(3, 4, 8, 0, 1, writable=True))
    assert gate.asked == []
    assert mapped(world) == []


def test_no_descriptor_is_left_by_a_platform() -> None:
    before = len(os.listdir("/proc/self/fd"))
    host = HostMemory("none")
    assert Platform(host).pages.take()
    host.close()
    assert len(os.listdir("/proc/self/fd")) == before
