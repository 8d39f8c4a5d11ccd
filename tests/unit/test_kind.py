# SPDX-License-Identifier: GPL-2.0-or-later
"""Kinds of VMs: kind × slot × attribute × access → which side serves it, or which exit."""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOTTY

import pytest

from hwemu.stage2 import Stage2, WalkError
from kvmsim.exits import BadHvaExit, MemoryFaultExit, MmioExit
from kvmsim.fault import Effect, Fault, Installed, LeaveGuest, NeedPage, PageGrant, Retry
from kvmsim.kind import KINDS, MAX_GFN, SHARED_BIT, PrivateRule, VmKind, shared_bit_kind
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_READONLY,
    PAGE_SIZE,
    KvmError,
)
from kvmsim.vm import Vm, Zapped

P = PAGE_SIZE
GM = KVM_MEM_GUEST_MEMFD
BASE, GFN = 0x100, 0x115
ARENA, RAM = 1 << 39, 1 << 38
PLAIN_FILE = PrivateFile(7, 1024)
WHOLE_FILE = PrivateFile(7, 1024, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)


class Ram:
    def hpa(self, page: int) -> int | None:
        return RAM + page * P


class Pages:
    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return start, end

    def hpa(self, instance: int, page: int) -> int | None:
        return ARENA + page * P


class World:
    """One VM with slot 0 at BASE, 64 pages: 'none', 'plain', 'file' or 'whole'."""

    def __init__(self, kind: VmKind, slot: str = "file") -> None:
        self.table = Stage2(bytearray(64 * P), 1 << 28)
        self.ram = Ram()
        self.vm = Vm(self.table, Pages(), kind=kind, around=1, window=1)
        if slot != "none":
            region = Region(0, 0 if slot == "plain" else GM, BASE * P, 64 * P, 0x1000 * P)
            file = WHOLE_FILE if slot == "whole" else PLAIN_FILE
            self.vm.set_user_memory_region2(region, shared=self.ram, file=file)

    def make_private(self, gfn: int = GFN, npages: int = 1) -> Zapped:
        return self.vm.set_memory_attributes(gfn * P, npages * P, 8)

    def touch(self, *, private: bool = False, gfn: int = GFN) -> Effect:
        kind = self.vm.kind
        fault = Fault(0, gfn * P | kind.half(private=private))
        effect = self.vm.begin_fault(fault)
        if isinstance(effect, NeedPage):
            grant = PageGrant(effect.file, effect.page, effect.page + 1, 0, 1)
            effect = self.vm.page_arrived(fault, grant)
        return effect

    def walk(self, gpa: int) -> int | None:
        try:
            return self.table.walk(gpa).hpa
        except WalkError:
            return None


def told(effect: Effect) -> str:
    """An effect in a word: the side that was mapped, or the exit."""
    match effect:
        case LeaveGuest(MemoryFaultExit(gpa, size, private, number)):
            assert (gpa, size, number) == (GFN * P, P, EFAULT)
            return "fault-private" if private else "fault-shared"
        case LeaveGuest(exit):
            return {MmioExit: "mmio", BadHvaExit: "bad-hva"}[type(exit)]  # type: ignore[index]
    assert isinstance(effect, Installed)
    return "mapped"


# kind, slot, attribute, access → mapped hpa base, or the exit. Where the attribute is the type,
# or nothing is private, the guest has no way to say otherwise: one row for both accesses.
GRID = [
    ("sw-protected", "none", "shared", "any", "mmio"),
    ("sw-protected", "none", "private", "any", "fault-private"),
    ("sw-protected", "plain", "shared", "any", RAM + 0x1000 * P),
    ("sw-protected", "plain", "private", "any", "fault-private"),
    ("sw-protected", "file", "shared", "any", RAM + 0x1000 * P),
    ("sw-protected", "file", "private", "any", ARENA),
    ("sw-protected", "whole", "shared", "any", ARENA),
    ("sw-protected", "whole", "private", "any", ARENA),
    ("default", "none", "shared", "any", "mmio"),
    ("default", "plain", "shared", "any", RAM + 0x1000 * P),
    ("default", "file", "shared", "any", RAM + 0x1000 * P),
    ("default", "whole", "shared", "any", ARENA),
    ("snp", "none", "shared", "shared", "mmio"),
    ("snp", "none", "shared", "private", "fault-private"),
    ("snp", "file", "shared", "shared", RAM + 0x1000 * P),
    ("snp", "file", "shared", "private", "fault-private"),
    ("snp", "file", "private", "shared", "fault-shared"),
    ("snp", "file", "private", "private", ARENA),
    ("tdx", "file", "shared", "shared", RAM + 0x1000 * P),
    ("tdx", "file", "private", "private", ARENA),
    ("shared-bit", "whole", "shared", "shared", ARENA),
    ("shared-bit", "whole", "shared", "private", "fault-private"),
    ("shared-bit", "whole", "private", "shared", "fault-shared"),
    ("shared-bit", "whole", "private", "private", ARENA),
]


@pytest.mark.parametrize(("kind", "slot", "attribute", "access", "expected"), GRID)
def test_grid(kind: str, slot: str, attribute: str, access: str, expected: str | int) -> None:
    for private in (False, True) if access == "any" else (access == "private",):
        world = World(KINDS[kind], slot)
        if attribute == "private":
            world.make_private()
        effect = world.touch(private=private)
        if isinstance(expected, str):
            assert told(effect) == expected
            continue
        assert isinstance(effect, Installed)
        assert world.walk(effect.gpa) == expected + (GFN - BASE) * P
        assert effect.gpa & ~world.vm.kind.side_bit == GFN * P


def test_default_vm_has_no_private_attribute() -> None:
    world = World(KINDS["default"])
    with pytest.raises(KvmError, match="not supported") as caught:
        world.make_private()
    assert caught.value.errno == EINVAL
    assert world.vm.set_memory_attributes(0, P, 0) == Zapped()  # a no-op, and legal


def test_v7_without_private_memory_knows_neither_slot_nor_conversion() -> None:
    vm = Vm(Stage2(bytearray(64 * P), 1 << 28), Pages(), abi="v7", kind=KINDS["default"])
    with pytest.raises(KvmError) as caught:
        vm.set_user_memory_region2(Region(0, GM, 0, P), shared=Ram(), file=PLAIN_FILE)
    assert caught.value.errno == EINVAL
    with pytest.raises(KvmError) as caught:
        vm.encrypt_region(0, P, private=True)
    assert caught.value.errno == ENOTTY


@pytest.mark.parametrize(("kind", "legal"), [(k, not v.protected_state) for k, v in KINDS.items()])
def test_read_only_slots_need_an_emulator(kind: str, legal: bool) -> None:
    world = World(KINDS[kind], "none")
    region = Region(0, KVM_MEM_READONLY, 0, P, 0x1000 * P)
    if legal:
        world.vm.set_user_memory_region2(region, shared=world.ram)
    else:
        with pytest.raises(KvmError) as caught:
            world.vm.set_user_memory_region2(region, shared=world.ram)
        assert caught.value.errno == EINVAL


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("shared-bit", MAX_GFN), ("sw-protected", 1 << 28), ("default", 1 << 28), ("snp", MAX_GFN)],
)
def test_last_gfn_of_each_kind(kind: str, limit: int) -> None:
    world = World(KINDS[kind], "none")
    with pytest.raises(KvmError):
        world.vm.set_user_memory_region2(Region(0, 0, limit * P, P), shared=world.ram)
    last = Region(0, 0, (limit - 1) * P, P, 0x1000 * P)
    world.vm.set_user_memory_region2(last, shared=world.ram)
    assert isinstance(world.touch(gfn=limit - 1), Installed)


@pytest.mark.parametrize("bit", [13, 30, 36, 39])
def test_the_shared_bit_may_be_elsewhere(bit: int) -> None:
    kind = shared_bit_kind(bit)
    table = Stage2(bytearray(64 * P), 1 << 28)
    vm = Vm(table, Pages(), kind=kind, around=1, window=1)
    vm.set_user_memory_region2(Region(0, 0, 0, P, 0x1000 * P), shared=Ram())
    assert vm.begin_fault(Fault(0, 1 << bit)) == Installed(1 << bit, 1)
    assert vm.set_memory_attributes(0, P, 8).ranges == ((0, 1), (1 << bit, 1))


@pytest.mark.parametrize("bit", [11, 12, 40, 51])
def test_where_no_shared_bit_can_be(bit: int) -> None:
    with pytest.raises(ValueError, match="bits 13 to 39"):
        shared_bit_kind(bit)


@pytest.mark.parametrize(
    ("rule", "bit"),
    [
        (PrivateRule.NEVER, SHARED_BIT),
        (PrivateRule.SHARED_BIT, 0),
        (PrivateRule.C_BIT, 0),
        (PrivateRule.ATTRIBUTE, SHARED_BIT),
        (PrivateRule.SHARED_BIT, 3 << 38),
    ],
)
def test_a_kind_that_contradicts_itself_is_refused(rule: PrivateRule, bit: int) -> None:
    with pytest.raises(ValueError, match="with rule"):
        VmKind("odd", 0, rule, bit)


def test_attribute_kind_has_one_side_and_conversion_takes_it() -> None:
    world = World(KINDS["sw-protected"])
    assert told(world.touch()) == "mapped"
    assert world.make_private() == Zapped(((GFN * P, 1),), 1)
    assert world.walk(GFN * P) is None
    assert told(world.touch()) == "mapped"
    assert world.walk(GFN * P) == ARENA + (GFN - BASE) * P


def test_attribute_kind_takes_the_new_type_when_it_changes_during_the_wait() -> None:
    world = World(KINDS["sw-protected"])
    world.make_private()
    fault = Fault(0, GFN * P)
    needed = world.vm.begin_fault(fault)
    assert isinstance(needed, NeedPage)
    world.vm.set_memory_attributes(GFN * P, P, 0)
    grant = PageGrant(needed.file, needed.page, needed.page + 1, 0, 1)
    assert world.vm.page_arrived(fault, grant) == Installed(GFN * P, 1)
    assert world.walk(GFN * P) == RAM + (0x1000 + GFN - BASE) * P


def test_attribute_kind_retries_inside_a_conversion() -> None:
    world = World(KINDS["sw-protected"])
    change = world.vm.begin_set_memory_attributes(GFN * P, P, 8)
    assert isinstance(world.touch(), Retry)
    world.vm.end(change)
    assert told(world.touch()) == "mapped"


def test_whole_slot_loses_both_sides_with_its_file_and_none_with_its_hva() -> None:
    world = World(KINDS["shared-bit"], "whole")
    world.make_private()
    assert told(world.touch(private=True)) == "mapped"
    assert isinstance(world.touch(gfn=GFN + 1), Installed)
    assert world.vm.invalidate_shared(world.ram, 0, 1 << 40) == Zapped()
    zapped = world.vm.invalidate_file(7, 0, 1024)
    assert zapped == Zapped(((BASE * P, 64), (BASE * P | SHARED_BIT, 64)), 2)


def test_whole_slot_needs_no_userspace_memory() -> None:
    world = World(KINDS["default"], "none")
    world.vm.set_user_memory_region2(Region(0, GM, BASE * P, 64 * P), file=WHOLE_FILE)
    assert told(world.touch()) == "mapped"


def test_slot_with_a_file_that_no_access_reaches_needs_userspace_memory() -> None:
    # As measured on a type 0 VM of Linux 6.18: -1 EFAULT, exit_reason 0.
    world = World(KINDS["default"], "none")
    world.vm.set_user_memory_region2(Region(0, GM, BASE * P, 64 * P), file=PLAIN_FILE)
    assert told(world.touch()) == "bad-hva"


def test_copy_keeps_the_kind() -> None:
    world = World(KINDS["sw-protected"])
    twin = world.vm.copy(world.table, Pages())
    assert twin.kind is KINDS["sw-protected"]
    assert twin.mmu.slots.kind is twin.kind
