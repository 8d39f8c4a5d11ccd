# SPDX-License-Identifier: GPL-2.0-or-later
"""Double allocation, counted from what both sides say they hold."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from hwemu.stage2 import Stage2
from kvmsim.kind import KINDS
from kvmsim.memoryuse import Allocated, MemoryUse, allocated, allocated_by_slot, memory_use
from kvmsim.memslot import Memslot
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import GUEST_MEMFD_FLAG_MMAP, KVM_MEM_GUEST_MEMFD, PAGE_SIZE
from kvmsim.vm import Vm

P = PAGE_SIZE
BASE, NPAGES, FILE_PAGE, HVA_PAGE = 0x100, 64, 32, 0x1000


class Ram:
    def hpa(self, page: int) -> int | None:
        return page * P


class Pages:
    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return start, end

    def hpa(self, instance: int, page: int) -> int | None:
        return page * P


class Held:
    """Sets of pages, told as runs."""

    def __init__(self) -> None:
        self.private: dict[int, set[int]] = {7: set(), 8: set()}
        self.shared: set[int] = set()

    def private_runs(self, file: int, start: int, end: int) -> Iterable[tuple[int, int]]:
        return runs(self.private[file], start, end)

    def shared_runs(self, slot: Memslot, start: int, end: int) -> Iterable[tuple[int, int]]:
        return runs(self.shared, start, end)


def runs(pages: set[int], start: int, end: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for page in sorted(page for page in pages if start <= page < end):
        if found and found[-1][1] == page:
            found[-1] = (found[-1][0], page + 1)
        else:
            found.append((page, page + 1))
    return found


def make(kind: str = "shared-bit", flags: int = 0, slots: int = 1) -> Vm:
    vm = Vm(Stage2(bytearray(8 * P), 1 << 28), Pages(), kind=KINDS[kind])
    ram, cut = Ram(), NPAGES // slots
    for i in range(slots):
        at = i * cut
        region = Region(
            i, KVM_MEM_GUEST_MEMFD, (BASE + at) * P, cut * P, (HVA_PAGE + at) * P,
            (FILE_PAGE + at) * P,
        )  # fmt: skip
        vm.set_user_memory_region2(region, shared=ram, file=PrivateFile(7, 1024, flags))
    return vm


def slot_of(vm: Vm) -> Memslot:
    slot = vm.mmu.slots.get(0)
    assert slot is not None
    return slot


def test_conversion_without_discard_doubles_and_discard_halves() -> None:
    vm, held = make(), Held()
    held.shared = set(range(HVA_PAGE, HVA_PAGE + 16))
    assert allocated(vm.mmu, slot_of(vm), held) == Allocated(shared=16)
    vm.set_memory_attributes(BASE * P, 16 * P, 8)
    assert allocated(vm.mmu, slot_of(vm), held) == Allocated(shared=16, stale=16)
    held.private[7] = set(range(FILE_PAGE, FILE_PAGE + 16))
    assert allocated(vm.mmu, slot_of(vm), held) == Allocated(16, 16, both=16, stale=16)
    held.shared.clear()
    assert allocated(vm.mmu, slot_of(vm), held) == Allocated(private=16)


def test_preallocated_file_of_a_shared_slot_is_stale() -> None:
    vm, held = make(), Held()
    held.private[7] = set(range(1024))
    assert allocated(vm.mmu, slot_of(vm), held) == Allocated(private=NPAGES, stale=NPAGES)


def test_a_slot_that_its_file_serves_has_nothing_twice() -> None:
    vm, held = make("default", GUEST_MEMFD_FLAG_MMAP), Held()
    held.private[7] = set(range(1024))
    held.shared = set(range(HVA_PAGE, HVA_PAGE + 64))
    assert allocated(vm.mmu, slot_of(vm), held) == Allocated(private=NPAGES)


def test_a_file_that_is_gone_holds_nothing() -> None:
    vm, held = make(), Held()
    held.private[7] = set(range(1024))
    vm.release_file(7)
    assert allocated(vm.mmu, slot_of(vm), held) == Allocated()
    vm.set_memory_attributes(BASE * P, P, 8)
    assert memory_use(vm.mmu, 0, 1 << 20) == MemoryUse(private=1, shared=NPAGES - 1)


@pytest.mark.parametrize("seed", range(4))
def test_against_one_cell_per_gfn(seed: int) -> None:
    rng = random.Random(seed)
    vm, held = make(slots=1 << seed), Held()
    private = [False] * NPAGES
    for _ in range(200):
        at = rng.randrange(NPAGES)
        end = min(NPAGES, at + rng.randrange(1, 20))
        match rng.randrange(5):
            case 0:
                value = rng.random() < 0.5
                vm.set_memory_attributes((BASE + at) * P, (end - at) * P, 8 * value)
                private[at:end] = [value] * (end - at)
            case 1:
                held.private[7].update(range(FILE_PAGE + at, FILE_PAGE + end))
            case 2:
                held.private[7].difference_update(range(FILE_PAGE + at, FILE_PAGE + end))
            case 3:
                held.shared.update(range(HVA_PAGE + at, HVA_PAGE + end))
            case 4:
                held.shared.difference_update(range(HVA_PAGE + at, HVA_PAGE + end))
        in_file = [FILE_PAGE + i in held.private[7] for i in range(NPAGES)]
        in_ram = [HVA_PAGE + i in held.shared for i in range(NPAGES)]
        told = allocated_by_slot(vm.mmu, held)
        assert sum(told.values(), Allocated()) == Allocated(
            sum(in_file),
            sum(in_ram),
            sum(a and b for a, b in zip(in_file, in_ram, strict=True)),
            sum(in_ram[i] if private[i] else in_file[i] for i in range(NPAGES)),
        )
        assert vm.memory() == MemoryUse(sum(private), NPAGES - sum(private))


def test_a_terabyte_costs_what_its_runs_do() -> None:
    vm, held = Vm(Stage2(bytearray(8 * P), 1 << 28), Pages(), kind=KINDS["sw-protected"]), Held()
    pages = 1 << 27
    region = Region(0, KVM_MEM_GUEST_MEMFD, 0, pages * P)
    vm.set_user_memory_region2(region, shared=Ram(), file=PrivateFile(7, pages))
    vm.set_memory_attributes(0, pages * P, 8)
    held.private[7] = {0, 1, pages - 1}
    assert vm.memory() == MemoryUse(private=pages)
    assert allocated(vm.mmu, slot_of(vm), held) == Allocated(private=3)
