# SPDX-License-Identifier: GPL-2.0-or-later
"""Conversion in place: the ioctl's grid, its references and modes, and faults on both sides."""

from __future__ import annotations

from dataclasses import replace
from errno import EACCES, EAGAIN, EFAULT, EINVAL, EIO, ENOTTY, EOPNOTSUPP

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwemu.stage2 import Stage2, WalkError
from kvmsim.effect import RetryReason
from kvmsim.exits import MemoryFaultExit
from kvmsim.fault import Effect, Fault, Installed, LeaveGuest, NeedPage, PageGrant, Retry
from kvmsim.hostaccess import HostAccess, HostEffect, HostRefused, Opened, Place
from kvmsim.inplace import Attributes2, ConversionError, ConvertFile, Fill, InPlaceFile
from kvmsim.kind import KINDS
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import (
    EHWPOISON,
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    PAGE_SIZE,
    KvmError,
)
from kvmsim.vm import Invalidation, Vm

P = PAGE_SIZE
PRIVATE, ZERO, PRESERVE = 8, 1, 2
BASE, NPAGES = 0x200, 1024
ARENA, SHARED = 1 << 39, 1 << 39
SHARED_FILE = PrivateFile(7, NPAGES, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)
PRIVATE_FILE = PrivateFile(7, NPAGES, GUEST_MEMFD_FLAG_MMAP)
SLOT = Region(0, KVM_MEM_GUEST_MEMFD, BASE * P, NPAGES * P)


class Pages:
    def __init__(self) -> None:
        self.gone: set[int] = set()
        self.split = -1

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return (page, page) if page in self.gone else (start, end)

    def hpa(self, instance: int, page: int) -> int | None:
        return None if instance != 1 else ARENA + (page + (page == self.split) * 9) * P


class World:
    def __init__(self, kind: str = "sw-protected", file: PrivateFile = SHARED_FILE) -> None:
        self.table = Stage2(bytearray(64 * P), 1 << 28)
        self.pages = Pages()
        self.file = file
        self.vm = Vm(self.table, self.pages, kind=KINDS[kind], max_level=2, in_place=True)
        self.vm.set_user_memory_region2(SLOT, file=file)

    @property
    def types(self) -> InPlaceFile:
        known = self.vm.know(self.file)
        assert known is not None
        return known

    def begin(self, first: int, last: int, attributes: int, flags: int = PRESERVE) -> Invalidation:
        request = Attributes2(first * P, (last - first) * P, attributes, flags)
        return self.vm.begin_set_memory_attributes2(self.file, request)

    def convert(self, first: int, last: int, attributes: int, flags: int = PRESERVE) -> Fill:
        begun = self.begin(first, last, attributes, flags)
        assert isinstance(begun.then, ConvertFile)
        self.vm.end(begun)
        return begun.then.fill

    def touch(self, page: int, *, private: bool = False, npages: int = 1) -> Effect:
        fault = Fault(0, (BASE + page) * P | self.vm.kind.half(private=private))
        effect = self.vm.begin_fault(fault)
        if isinstance(effect, NeedPage):
            start, end = max(effect.start, page), min(effect.end, page + npages)
            effect = self.vm.page_arrived(fault, PageGrant(7, start, end, 0, 1))
        return effect

    def walk(self, page: int, half: int = 0) -> int | None:
        try:
            return self.table.walk((BASE + page) * P | half).hpa
        except WalkError:
            return None

    def open(self, first: int, last: int, **fields: bool) -> tuple[HostAccess, HostEffect]:
        access = HostAccess(7, first, last, **fields)
        return access, self.go(access)

    def go(self, access: HostAccess, **fields: object) -> HostEffect:
        effect = access.step(self.vm.mmu)
        while isinstance(effect, NeedPage):
            given = {"start": effect.page, "end": effect.end, "seq": 0, "instance": 1} | fields
            effect = access.page_arrived(self.vm.mmu, PageGrant(effect.file, **given))  # type: ignore[arg-type]
        return effect


# --- the ioctl ----------------------------------------------------------------------------------

GOOD = Attributes2(0, P, PRIVATE)
REFUSED = [
    ("unknown flag", replace(GOOD, flags=4), EINVAL),
    ("two modes", replace(GOOD, flags=ZERO | PRESERVE), EINVAL),
    ("reserved", replace(GOOD, reserved=(0,) * 10 + (1,)), EINVAL),
    ("another attribute", replace(GOOD, attributes=PRIVATE | 1), EINVAL),
    ("size 0", replace(GOOD, size=0), EINVAL),
    ("wraps", replace(GOOD, offset=(1 << 64) - P, size=2 * P), EINVAL),
    ("offset unaligned", replace(GOOD, offset=1), EINVAL),
    ("size unaligned", replace(GOOD, size=P + 1), EINVAL),
    ("at the end of the file", replace(GOOD, offset=NPAGES * P), EINVAL),
    ("over the end of the file", replace(GOOD, offset=(NPAGES - 1) * P, size=2 * P), EINVAL),
    ("zero to private", replace(GOOD, flags=ZERO), EOPNOTSUPP),
]


@pytest.mark.parametrize(("asked", "number"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(asked: Attributes2, number: int) -> None:
    world = World()
    before = world.vm.key()
    with pytest.raises(ConversionError, match="KVM_SET_MEMORY_ATTRIBUTES2") as caught:
        world.vm.begin_set_memory_attributes2(world.file, asked)
    assert (caught.value.errno, caught.value.error_offset) == (number, asked.offset)
    assert world.vm.key() == before


def test_one_place_keeps_the_types() -> None:
    with pytest.raises(KvmError) as caught:
        World().vm.set_memory_attributes(0, P, PRIVATE)
    assert caught.value.errno == ENOTTY
    vm = Vm(Stage2(bytearray(64 * P), 1 << 28), Pages(), kind=KINDS["sw-protected"])
    with pytest.raises(KvmError) as caught:
        vm.begin_set_memory_attributes2(SHARED_FILE, GOOD)
    assert caught.value.errno == ENOTTY
    with pytest.raises(ValueError, match="v7"):
        Vm(Stage2(bytearray(64 * P), 1 << 28), Pages(), abi="v7", in_place=True)


def test_a_vm_without_private_memory_converts_nothing() -> None:
    with pytest.raises(ConversionError, match="not supported"):
        World("default").begin(0, 1, PRIVATE)


def test_bytes() -> None:
    asked = Attributes2(P, 2 * P, PRIVATE, ZERO, tuple(range(11)))
    data = asked.to_bytes(error_offset=5)
    assert len(data) == 128
    assert data[32:40] == (5).to_bytes(8, "little")
    assert Attributes2.from_bytes(data) == asked


# Who can keep what: kind, to private, launched → (ZERO, PRESERVE) supported.
MODES = [
    ("sw-protected", True, True, (False, True)),
    ("sw-protected", False, True, (True, True)),
    ("shared-bit", True, True, (False, True)),
    ("tdx", True, False, (False, True)),
    ("tdx", True, True, (False, False)),
    ("tdx", False, True, (True, False)),
    ("snp", True, False, (False, True)),
    ("snp", False, False, (True, False)),
    ("pkvm", True, True, (False, True)),
    ("pkvm", False, True, (False, True)),
]


@pytest.mark.parametrize(("kind", "private", "launched", "supported"), MODES)
def test_modes(kind: str, private: bool, launched: bool, supported: tuple[bool, bool]) -> None:
    for flag, good, fill in zip((ZERO, PRESERVE), supported, (Fill.ZERO, Fill.KEEP), strict=True):
        world = World(kind, SHARED_FILE if private else PRIVATE_FILE)
        world.vm.pre_fault_allowed = launched
        if good:
            assert world.convert(0, 1, PRIVATE * private, flag) is fill
            assert world.types.is_private(0) == private
        else:
            with pytest.raises(ConversionError) as caught:
                world.begin(0, 1, PRIVATE * private, flag)
            assert caught.value.errno == EOPNOTSUPP


def test_without_a_mode_a_software_protected_vm_scrambles() -> None:
    """So that nobody relies on what was not promised; hardware makes its own noise."""
    assert World().convert(0, 1, PRIVATE, 0) is Fill.SCRAMBLE
    assert World("tdx").convert(0, 1, PRIVATE, 0) is Fill.KEEP
    assert World("pkvm").convert(0, 1, PRIVATE, 0) is Fill.KEEP


def test_a_mode_applies_where_the_type_is_the_same() -> None:
    world = World()
    world.touch(3)
    begun = world.begin(0, 8, 0, ZERO)
    assert isinstance(begun.then, ConvertFile)
    assert begun.then.fill is Fill.ZERO
    assert begun.zapped.leaves == 1
    world.vm.end(begun)
    world.touch(3)
    begun = world.begin(0, 8, 0, PRESERVE)
    assert begun.zapped.leaves == 0
    world.vm.end(begun)
    assert world.walk(3) is not None


def test_types_are_the_files_allocated_or_not_and_outlive_slots_and_punches() -> None:
    world = World()
    world.convert(5, 8, PRIVATE)
    world.vm.invalidate_file(7, 0, NPAGES)
    world.vm.freed(7, 0, NPAGES)
    world.vm.set_user_memory_region2(replace(SLOT, memory_size=0))
    world.vm.set_user_memory_region2(
        replace(SLOT, guest_phys_addr=0, memory_size=16 * P), file=world.file
    )
    assert [world.types.is_private(page) for page in (4, 5, 7, 8)] == [False, True, True, False]
    assert world.vm.mmu.is_private(5, world.vm.mmu.slots.find(5))


def test_a_file_begins_as_its_flags_say() -> None:
    assert not World().types.is_private(0)
    types = World(file=PRIVATE_FILE).types
    assert types.is_private(0)
    assert types.is_private(NPAGES - 1)
    assert not types.is_private(NPAGES)


# --- faults -------------------------------------------------------------------------------------


def test_both_types_are_one_page_for_a_guest_whose_attribute_says_the_type() -> None:
    world = World()
    assert world.touch(3) == Installed((BASE + 3) * P, 1)
    shared = world.walk(3)
    world.convert(3, 4, PRIVATE)
    assert world.walk(3) is None
    assert world.touch(3) == Installed((BASE + 3) * P, 1)
    assert world.walk(3) == shared == ARENA + 3 * P


def test_both_halves_lead_to_one_page_for_a_guest_with_a_shared_bit() -> None:
    world = World("shared-bit")
    assert isinstance(world.touch(3, private=False), Installed)
    effect = world.touch(3, private=True)
    assert isinstance(effect, LeaveGuest)
    assert isinstance(effect.exit, MemoryFaultExit)
    assert (effect.exit.private, effect.exit.errno) == (True, EFAULT)
    world.convert(3, 4, PRIVATE)
    assert world.walk(3, SHARED) is None
    assert isinstance(world.touch(3, private=True), Installed)
    assert isinstance(world.touch(3, private=False), LeaveGuest)
    assert world.walk(3) == ARENA + 3 * P


def test_what_is_mapped_around_a_fault_is_of_one_type() -> None:
    world = World(file=PRIVATE_FILE)
    world.convert(10, 11, 0)
    assert world.touch(5, npages=512) == Installed((BASE + 5) * P, 5)
    assert world.touch(11, npages=512) == Installed((BASE + 11) * P, 512 - 11)
    assert world.touch(600, npages=512).__class__ is Installed


def test_a_large_leaf_goes_whole_with_one_index() -> None:
    world = World(file=PRIVATE_FILE)
    world.touch(0, npages=512)
    assert world.table.statistics().large_leaves == 1
    begun = world.begin(17, 18, 0)
    assert begun.zapped.leaves == 512
    world.vm.end(begun)
    world.touch(0, npages=512)
    assert world.table.statistics().large_leaves == 0


def test_faults_wait_while_a_conversion_is_under_way() -> None:
    world = World()
    begun = world.begin(3, 4, PRIVATE)
    assert isinstance(world.touch(3), Retry)
    assert isinstance(world.touch(4), Installed)
    with pytest.raises(RuntimeError, match="slots_lock"):
        world.begin(5, 6, PRIVATE)
    world.vm.end(begun)
    assert isinstance(world.touch(3), Installed)


def test_a_gfn_without_a_file_is_shared() -> None:
    world = World()
    assert not world.vm.mmu.is_private(0, None)
    world.convert(0, NPAGES, PRIVATE)
    world.vm.release_file(7)
    slot = world.vm.mmu.slots.find(BASE)
    assert not world.vm.mmu.is_private(BASE, slot)
    effect = world.touch(0)
    assert isinstance(effect, LeaveGuest)
    assert isinstance(effect.exit, MemoryFaultExit)
    assert (effect.exit.private, effect.exit.errno) == (False, EFAULT)


# --- the host -----------------------------------------------------------------------------------


def test_the_host_reaches_shared_indices_and_keeps_them_shared() -> None:
    # selftest guest_memfd_conversions_test, elevated_refcount
    world = World()
    access, effect = world.open(2, 3)
    assert effect == Opened((Place(2, 1, ARENA + 2 * P),))
    with pytest.raises(ConversionError, match="reference") as caught:
        world.begin(0, 4, PRIVATE)
    assert (caught.value.errno, caught.value.error_offset) == (EAGAIN, 2 * P)
    assert not any(world.types.is_private(page) for page in range(4))
    world.convert(0, 2, PRIVATE)
    world.convert(3, 4, PRIVATE)
    access.close(world.vm.mmu)
    world.convert(0, 4, PRIVATE)
    assert all(world.types.is_private(page) for page in range(4))


def test_error_offset_is_never_before_the_range() -> None:
    """A reference may begin before it: a caller that resumed there would step back."""
    world = World()
    world.open(0, 8)
    with pytest.raises(ConversionError) as caught:
        world.begin(5, 6, PRIVATE)
    assert caught.value.error_offset == 5 * P


def test_the_lowest_reference_is_told() -> None:
    world = World()
    world.open(6, 7)
    world.open(4, 5)
    with pytest.raises(ConversionError) as caught:
        world.begin(0, 8, PRIVATE)
    assert caught.value.error_offset == 4 * P


def test_references_do_not_keep_memory_from_becoming_shared_or_staying_private() -> None:
    world = World()
    world.convert(0, 2, PRIVATE)
    world.open(4, 5)
    world.convert(0, 8, 0)
    world.convert(0, 2, PRIVATE)
    world.convert(0, 2, PRIVATE)


@pytest.mark.parametrize("first", [0, 3])
def test_the_host_does_not_reach_private_indices(first: int) -> None:
    world = World()
    world.convert(3, 4, PRIVATE)
    access, effect = world.open(first, 6)
    assert effect == HostRefused(EFAULT, 3, "the index is private")
    assert world.types.first_reference(0, NPAGES) is None
    assert access.places == ()


def test_a_conversion_during_the_hosts_wait_refuses_it() -> None:
    world = World()
    access = HostAccess(7, 0, 2)
    assert isinstance(access.step(world.vm.mmu), NeedPage)
    world.convert(0, 2, PRIVATE)
    effect = access.page_arrived(world.vm.mmu, PageGrant(7, 0, 2, 0, 1))
    assert effect == HostRefused(EFAULT, 0, "the index is private")


def test_the_host_waits_while_a_conversion_is_under_way() -> None:
    world = World()
    waiting = HostAccess(7, 0, 2)
    assert isinstance(waiting.step(world.vm.mmu), NeedPage)
    begun = world.begin(1, 2, 0, ZERO)
    assert isinstance(waiting.page_arrived(world.vm.mmu, PageGrant(7, 0, 2, 0, 1)), Retry)
    access, effect = world.open(0, 2)
    assert isinstance(effect, Retry)
    world.vm.end(begun)
    for late in (waiting, access):
        assert isinstance(world.go(late), Opened)


def test_an_access_over_several_grants() -> None:
    world = World()
    world.pages.split = 5
    access = HostAccess(7, 2, 8)
    effect = access.step(world.vm.mmu)
    assert effect == NeedPage(7, 2, 2, 8, False)
    effect = access.page_arrived(world.vm.mmu, PageGrant(7, 2, 4, 0, 1))
    assert effect == NeedPage(7, 4, 4, 8, False)
    # the instance is not linear up to the end of this one: one page at a time
    effect = access.page_arrived(world.vm.mmu, PageGrant(7, 4, 6, 0, 1))
    assert effect == NeedPage(7, 5, 5, 8, False)
    with pytest.raises(ConversionError):
        world.begin(2, 3, PRIVATE)
    effect = access.page_arrived(world.vm.mmu, PageGrant(7, 5, 8, 0, 1))
    assert effect == NeedPage(7, 6, 6, 8, False)
    effect = access.page_arrived(world.vm.mmu, PageGrant(7, 6, 8, 0, 1))
    assert isinstance(effect, Opened)
    assert [(place.page, place.npages) for place in effect.places] == [
        (2, 2), (4, 1), (5, 1), (6, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grant", "number"),
    [({"status": EIO}, EIO), ({"file": 8}, EIO), ({"writable": False}, EACCES)],
)
def test_what_the_owner_refuses(grant: dict[str, int], number: int) -> None:
    world = World()
    access = HostAccess(7, 0, 1, write=True)
    access.step(world.vm.mmu)
    answer = replace(PageGrant(7, 0, 1, 0, 1), **grant)  # type: ignore[arg-type]
    effect = access.page_arrived(world.vm.mmu, answer)
    assert isinstance(effect, HostRefused)
    assert effect.errno == number


def test_stale_grants_are_asked_for_again() -> None:
    world = World()
    access = HostAccess(7, 0, 1)
    access.step(world.vm.mmu)
    world.pages.gone = {0}
    assert isinstance(access.page_arrived(world.vm.mmu, PageGrant(7, 0, 1, 0, 1)), Retry)
    world.pages.gone = set()
    access.step(world.vm.mmu)
    assert isinstance(access.page_arrived(world.vm.mmu, PageGrant(7, 0, 1, 0, 2)), Retry)
    assert isinstance(world.go(access), Opened)


def test_poison_is_met_by_the_host_as_well() -> None:
    world = World()
    world.vm.inject_memory_error(7, 3)
    _, effect = world.open(0, 8)
    assert isinstance(effect, HostRefused)
    assert (effect.errno, effect.page) == (EHWPOISON, 3)
    waiting = HostAccess(7, 4, 5)
    waiting.step(world.vm.mmu)
    world.vm.inject_memory_error(7, 4)
    effect = waiting.page_arrived(world.vm.mmu, PageGrant(7, 4, 5, 0, 1))
    assert isinstance(effect, HostRefused)
    assert effect.errno == EHWPOISON


@pytest.mark.parametrize(("first", "last"), [(-1, 1), (4, 4), (0, NPAGES + 1)])
def test_an_access_outside_the_file(first: int, last: int) -> None:
    _, effect = World().open(first, last)
    assert isinstance(effect, HostRefused)
    assert effect.errno == EINVAL


def test_what_is_punched_is_severed_from_the_host() -> None:
    world = World()
    access, _ = world.open(0, 4)
    other, _ = world.open(6, 7)
    world.vm.invalidate_file(7, 3, 6)
    assert not access.held(world.vm.mmu)
    assert other.held(world.vm.mmu)
    assert world.types.first_reference(0, NPAGES) == 6
    world.convert(0, 6, PRIVATE)
    access.close(world.vm.mmu)
    assert not access.held(world.vm.mmu)


def test_an_access_whose_first_pages_are_punched_begins_anew() -> None:
    world = World()
    access = HostAccess(7, 0, 4)
    assert isinstance(access.step(world.vm.mmu), NeedPage)
    assert access.page_arrived(world.vm.mmu, PageGrant(7, 0, 2, 0, 1)) == NeedPage(
        7, 2, 2, 4, False
    )
    world.vm.invalidate_file(7, 1, 2)
    grant = PageGrant(7, 2, 4, 0, 1)
    assert access.page_arrived(world.vm.mmu, grant) == Retry(RetryReason.INVALIDATED)
    assert access.step(world.vm.mmu) == NeedPage(7, 0, 0, 4, False)
    assert isinstance(access.page_arrived(world.vm.mmu, PageGrant(7, 0, 4, 0, 1)), Opened)


def test_an_abandoned_conversion_changes_nothing() -> None:
    world = World()
    begun = world.begin(0, 4, PRIVATE)
    world.vm.abandon(begun)
    assert not world.types.is_private(0)
    assert isinstance(world.touch(0), Installed)
    world.convert(0, 4, PRIVATE)
    assert world.types.is_private(0)


def test_every_file_of_a_vm_that_converts_in_place_serves_both_types() -> None:
    world = World(file=PrivateFile(7, NPAGES, GUEST_MEMFD_FLAG_INIT_SHARED))
    slot = world.vm.mmu.slots.find(BASE)
    assert slot is not None
    assert slot.whole
    assert isinstance(world.touch(0), Installed)


def test_steps_out_of_order_are_a_defect_of_the_caller() -> None:
    world = World()
    access, _ = world.open(0, 1)
    with pytest.raises(RuntimeError, match="it is 'open'"):
        access.step(world.vm.mmu)
    with pytest.raises(RuntimeError, match="needs 'waits for a page'"):
        access.page_arrived(world.vm.mmu, PageGrant(7, 0, 1, 0, 1))
    access.close(world.vm.mmu)
    access.close(world.vm.mmu)
    with pytest.raises(RuntimeError, match="does not convert in place"):
        HostAccess(8, 0, 1).step(world.vm.mmu)


def test_copies_go_apart() -> None:
    world = World()
    access, _ = world.open(0, 1)
    twin = world.vm.copy(world.table, world.pages)
    assert twin.key() == world.vm.key()
    twin_access = access.copy()
    assert twin_access.key() == access.key()
    twin_access.close(twin.mmu)
    assert twin.key() != world.vm.key()
    twin.end(twin.begin_set_memory_attributes2(world.file, replace(GOOD, flags=PRESERVE)))
    assert not world.types.is_private(0)


spans = st.tuples(st.integers(0, 15), st.integers(1, 8)).map(lambda p: (p[0], min(16, sum(p))))
scripts = st.lists(
    st.one_of(
        st.tuples(st.just("convert"), spans, st.booleans()),
        st.tuples(st.just("touch"), spans, st.booleans()),
        st.tuples(st.just("open"), spans, st.just(False)),
        st.tuples(st.just("close"), spans, st.just(False)),
        st.tuples(st.just("punch"), spans, st.just(False)),
    ),
    max_size=40,
)


@given(scripts, st.sampled_from(["shared-bit", "sw-protected"]))
@settings(deadline=None)
def test_the_host_never_holds_what_is_private(script: list[tuple], kind: str) -> None:  # type: ignore[type-arg]
    """And no leaf is of another type than its index; a list of bools is the model."""
    world, private, held = World(kind), [False] * 16, list[HostAccess]()
    for what, (first, last), flag in script:
        hosts = {page for access in held for page in range(access.start, access.end)}
        match what:
            case "convert":
                blocked = sorted(hosts & set(range(first, last)))
                if flag and blocked:  # held, so it is shared: the type would change
                    with pytest.raises(ConversionError) as caught:
                        world.convert(first, last, PRIVATE)
                    assert caught.value.error_offset == blocked[0] * P
                else:
                    world.convert(first, last, PRIVATE * flag)
                    private[first:last] = [flag] * (last - first)
            case "touch":
                world.touch(first, private=flag, npages=last - first)
            case "open":
                access, effect = world.open(first, last)
                assert isinstance(effect, Opened) == (not any(private[first:last]))
                if isinstance(effect, Opened):
                    held.append(access)
            case "close" if held:
                held.pop(first % len(held)).close(world.vm.mmu)
            case "punch":
                world.vm.invalidate_file(7, first, last)
                kept = [a for a in held if a.end <= first or last <= a.start]
                assert [a for a in held if a.held(world.vm.mmu)] == kept
                held = kept
        assert [world.types.is_private(page) for page in range(16)] == private
        for access in held:
            assert not any(private[access.start : access.end])
        if kind == "shared-bit":
            for page in range(16):
                assert world.walk(page, 0 if not private[page] else SHARED) is None
