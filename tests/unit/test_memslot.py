# SPDX-License-Identifier: GPL-2.0-or-later
"""The errno grid of KVM_SET_USER_MEMORY_REGION(2), and the algebra behind it."""

from __future__ import annotations

from dataclasses import replace
from errno import EBADF, EEXIST, EINVAL
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsim.kind import MAX_GFN
from kvmsim.memslot import Change, Memslot, Memslots
from kvmsim.region import BadFd, PrivateFile, Region
from kvmsim.uapi import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_MAX_NR_PAGES,
    KVM_MEM_READONLY,
    PAGE_SIZE,
    Abi,
    KvmError,
)

GM = KVM_MEM_GUEST_MEMFD
DIRTY = KVM_MEM_LOG_DIRTY_PAGES
RO = KVM_MEM_READONLY
P = PAGE_SIZE
TOP = 1 << 64
OK = None

FILE = PrivateFile(7, 64)
OTHER = PrivateFile(8, 64)

# Slot 1: plain, gfns 0x100-0x1ff. Slot 2: private, gfns 0x400-0x40f, pages 0-15 of file 7.
PLAIN = Region(1, 0, 0x100 * P, 0x100 * P, 0x7000_0000)
PRIVATE = Region(2, GM, 0x400 * P, 16 * P, 0x8000_0000, 0, 20)
NEW = Region(5, 0, 0x800 * P, 16 * P, 0x9000_0000)
NEW_GM = Region(5, GM, 0x800 * P, 16 * P, 0x9000_0000, 16 * P, 20)


def slots_of(abi: Abi) -> Memslots:
    slots = Memslots(abi)
    slots.set(PLAIN)
    slots.set(PRIVATE, file=FILE)
    return slots


class Row(NamedTuple):
    name: str
    region: Region
    upstream: int | None
    v7: int | None
    file: PrivateFile | BadFd = FILE
    v1: bool = False


GRID = [
    Row("create", NEW, OK, OK),
    Row("create private", NEW_GM, OK, OK),
    Row("create read-only", replace(NEW, flags=RO), OK, OK),
    Row("create with dirty log", replace(NEW, flags=DIRTY | RO), OK, OK),
    Row("highest slot id", replace(NEW, slot=32763), OK, OK),
    # identity
    Row("slot id 32764", replace(NEW, slot=32764), EINVAL, EINVAL),
    Row("slot id 65535", replace(NEW, slot=0xFFFF), EINVAL, EINVAL),
    Row("address space 1", replace(NEW, slot=1 << 16 | 5), EINVAL, EINVAL),
    # flags
    Row("unknown flag", replace(NEW, flags=1 << 3), EINVAL, EINVAL),
    Row("internal flag", replace(NEW, flags=1 << 16), EINVAL, EINVAL),
    Row("private and dirty log", replace(NEW_GM, flags=GM | DIRTY), EINVAL, OK),
    Row("private and read-only", replace(NEW_GM, flags=GM | RO), EINVAL, OK),
    Row("private by the old ioctl", NEW_GM, EINVAL, OK, v1=True),
    Row("plain by the old ioctl", NEW, OK, OK, v1=True),
    # alignment and limits, bytes
    Row("size unaligned", replace(NEW, memory_size=16 * P + 1), EINVAL, EINVAL),
    Row("size below a page", replace(NEW, memory_size=P - 1), EINVAL, EINVAL),
    Row("gpa unaligned", replace(NEW, guest_phys_addr=0x800 * P + 0x800), EINVAL, EINVAL),
    Row("hva unaligned", replace(NEW, userspace_addr=0x9000_0001), EINVAL, EINVAL),
    Row("hva not canonical", replace(NEW, userspace_addr=1 << 47), EINVAL, EINVAL),
    Row("hva in the kernel", replace(NEW, userspace_addr=TOP - (1 << 30)), EINVAL, EINVAL),
    Row(
        "hva range leaves user space",
        replace(NEW, userspace_addr=(1 << 47) - 16 * P),
        EINVAL,
        EINVAL,
    ),
    Row("hva range ends with user space", replace(NEW, userspace_addr=(1 << 47) - 17 * P), OK, OK),
    Row("gpa wraps", replace(NEW, guest_phys_addr=TOP - 8 * P), EINVAL, EINVAL),
    Row("gpa ends at 2^64", replace(NEW, guest_phys_addr=TOP - 16 * P), EINVAL, EINVAL),
    Row(
        "too many pages",
        replace(NEW, userspace_addr=0, memory_size=(KVM_MEM_MAX_NR_PAGES + 1) * P),
        EINVAL,
        EINVAL,
    ),
    Row("last gfn", replace(NEW, guest_phys_addr=(MAX_GFN - 16) * P), OK, OK),
    Row("beyond the last gfn", replace(NEW, guest_phys_addr=(MAX_GFN - 15) * P), EINVAL, EINVAL),
    # gfn overlap
    Row("same gfns", replace(NEW, guest_phys_addr=0x100 * P), EEXIST, EEXIST),
    Row("front overlaps", replace(NEW, guest_phys_addr=0x1FF * P), EEXIST, EEXIST),
    Row("back overlaps", replace(NEW, guest_phys_addr=(0x100 - 15) * P), EEXIST, EEXIST),
    Row("inside", replace(NEW, guest_phys_addr=0x140 * P), EEXIST, EEXIST),
    Row("around", replace(NEW, guest_phys_addr=0, memory_size=0x300 * P), EEXIST, EEXIST),
    Row("adjacent below", replace(NEW, guest_phys_addr=(0x100 - 16) * P), OK, OK),
    Row("adjacent above", replace(NEW, guest_phys_addr=0x200 * P), OK, OK),
    # binding
    Row("fd closed", NEW_GM, EBADF, EINVAL, BadFd.CLOSED),
    Row("fd is a memfd", NEW_GM, EINVAL, EINVAL, BadFd.NOT_PRIVATE),
    Row("fd of another VM", NEW_GM, EINVAL, EINVAL, BadFd.OTHER_VM),
    Row("fd closed, but no flag", replace(NEW_GM, flags=0), OK, OK, BadFd.CLOSED),
    Row("offset unaligned, but no flag", replace(NEW, guest_memfd_offset=1), OK, OK),
    Row("offset unaligned", replace(NEW_GM, guest_memfd_offset=16 * P + 1), EINVAL, EINVAL),
    Row("offset negative", replace(NEW_GM, guest_memfd_offset=1 << 63), EINVAL, OK),
    Row("offset wraps", replace(NEW_GM, guest_memfd_offset=TOP - 8 * P), EINVAL, EINVAL),
    Row("last pages of the file", replace(NEW_GM, guest_memfd_offset=48 * P), OK, OK),
    Row("one page past the file", replace(NEW_GM, guest_memfd_offset=49 * P), EINVAL, OK),
    Row("offset at the end of the file", replace(NEW_GM, guest_memfd_offset=64 * P), EINVAL, OK),
    Row("pages bound already", replace(NEW_GM, guest_memfd_offset=0), EINVAL, OK),
    Row("last bound page", replace(NEW_GM, guest_memfd_offset=15 * P), EINVAL, OK),
    Row("same pages of another file", replace(NEW_GM, guest_memfd_offset=0), OK, OK, OTHER),
    # which refusal wins
    Row(
        "overlap before bad fd",
        replace(NEW_GM, guest_phys_addr=0x100 * P),
        EEXIST,
        EEXIST,
        BadFd.CLOSED,
    ),
    Row(
        "overlap before file range",
        replace(NEW_GM, guest_phys_addr=0x100 * P, guest_memfd_offset=64 * P),
        EEXIST,
        EEXIST,
    ),
    Row(
        "alignment before overlap",
        replace(NEW, guest_phys_addr=0x100 * P, memory_size=P + 1),
        EINVAL,
        EINVAL,
    ),
    Row(
        "bad fd before the last gfn",
        replace(NEW_GM, guest_phys_addr=MAX_GFN * P),
        EBADF,
        EINVAL,
        BadFd.CLOSED,
    ),
    # existing slots
    Row("set again, nothing changes", PLAIN, OK, OK),
    Row("set private again", PRIVATE, EINVAL, EINVAL),
    Row("move private", replace(PRIVATE, guest_phys_addr=0x900 * P), EINVAL, EINVAL),
    Row("take private from a slot", replace(PRIVATE, flags=0), EINVAL, EINVAL),
    Row("take private and log", replace(PRIVATE, flags=DIRTY), EINVAL, EINVAL),
    Row(
        "make a plain slot private",
        replace(PLAIN, flags=GM, guest_memfd_offset=16 * P),
        EINVAL,
        EINVAL,
    ),
    Row("turn dirty log on", replace(PLAIN, flags=DIRTY), OK, OK),
    Row("turn read-only on", replace(PLAIN, flags=RO), EINVAL, EINVAL),
    Row("grow", replace(PLAIN, memory_size=0x101 * P), EINVAL, EINVAL),
    Row("shrink", replace(PLAIN, memory_size=0xFF * P), EINVAL, EINVAL),
    Row("another hva", replace(PLAIN, userspace_addr=0x6000_0000), EINVAL, EINVAL),
    Row("move", replace(PLAIN, guest_phys_addr=0x900 * P), OK, OK),
    Row("move onto itself", replace(PLAIN, guest_phys_addr=0x180 * P), OK, OK),
    Row("move onto another", replace(PLAIN, guest_phys_addr=0x380 * P), EEXIST, EEXIST),
    Row("move beyond the last gfn", replace(PLAIN, guest_phys_addr=MAX_GFN * P), EINVAL, EINVAL),
    # deletion
    Row("delete", replace(PLAIN, memory_size=0), OK, OK),
    Row("delete private", replace(PRIVATE, memory_size=0), OK, OK),
    Row(
        "delete private by the old ioctl", replace(PRIVATE, memory_size=0, flags=0), OK, OK, v1=True
    ),
    Row("delete with the fd closed", replace(PRIVATE, memory_size=0), OK, OK, BadFd.CLOSED),
    Row("delete what is not", replace(NEW, memory_size=0), EINVAL, EINVAL),
    Row(
        "delete with gpa unaligned",
        replace(PLAIN, memory_size=0, guest_phys_addr=1),
        EINVAL,
        EINVAL,
    ),
]


@pytest.mark.parametrize("abi", ["upstream", "v7"])
@pytest.mark.parametrize("row", GRID, ids=lambda row: row.name)
def test_errno_grid(row: Row, abi: Abi) -> None:
    slots = slots_of(abi)
    before = slots.key()
    expected = row.upstream if abi == "upstream" else row.v7
    refused = None
    try:
        slots.set(row.region, file=row.file, v1=row.v1)
    except KvmError as error:
        refused = error
    assert (refused and refused.errno) == expected, refused
    if refused:
        region = row.region
        assert refused.slot == region.slot
        assert (refused.start, refused.size) == (region.guest_phys_addr, region.memory_size)
        assert slots.key() == before


def test_grid_names_are_unique() -> None:
    assert len({row.name for row in GRID}) == len(GRID)


def test_second_delete_is_refused_and_the_pages_can_be_bound_again_elsewhere() -> None:
    slots = slots_of("upstream")
    gone = replace(PRIVATE, memory_size=0)
    assert slots.set(gone).change is Change.DELETE
    with pytest.raises(KvmError, match="no such slot"):
        slots.set(gone)
    moved = replace(PRIVATE, slot=3, guest_phys_addr=0x900 * P)
    assert slots.set(moved, file=FILE).change is Change.CREATE
    assert slots.find(0x400) is None
    assert [hit[1:] for hit in slots.find_file(7, 0, 64)] == [(0x900, 0x910)]


def test_all_slot_ids_and_not_one_more() -> None:
    slots = Memslots()
    whole = PrivateFile(7, 32764)
    for slot in range(32764):
        slots.set(Region(slot, GM, slot * P, P, 0x10000 + slot * P, slot * P), file=whole)
    assert [(slot.id, first) for slot, first, _ in slots.find_file(7, 99, 101)] == [
        (99, 99),
        (100, 100),
    ]
    assert len(slots) == 32764
    with pytest.raises(KvmError) as caught:
        slots.set(Region(32764, 0, 32764 * P, P))
    assert caught.value.errno == EINVAL
    found = slots.find(12345)
    assert found is not None
    assert found.id == 12345


@pytest.mark.parametrize(
    ("region", "change", "taken"),
    [
        (NEW, Change.CREATE, None),
        (replace(PLAIN, memory_size=0), Change.DELETE, 1),
        (replace(PLAIN, guest_phys_addr=0x900 * P), Change.MOVE, 1),
        (replace(PLAIN, flags=DIRTY), Change.FLAGS_ONLY, None),
        (PLAIN, Change.NONE, None),
    ],
)
def test_kinds_of_change(region: Region, change: Change, taken: int | None) -> None:
    slots = slots_of("upstream")
    before = slots.key()
    plan = slots.plan(region)
    assert slots.key() == before
    assert plan.change is change
    assert (plan.taken and plan.taken.id) == taken
    slots.apply(plan)
    assert slots.get(region.slot) == plan.new
    assert (slots.key() == before) == (change is Change.NONE)


class _Side:
    def hpa(self, page: int) -> int | None:
        return page * P


def test_another_shared_side_is_another_userspace_address() -> None:
    slots, side = Memslots(), _Side()
    slots.set(PLAIN, shared=side)
    with pytest.raises(KvmError, match="userspace side"):
        slots.set(replace(PLAIN, flags=DIRTY), shared=_Side())
    assert slots.set(replace(PLAIN, flags=DIRTY), shared=side).change is Change.FLAGS_ONLY


def test_lookup_by_file_is_clipped_to_the_slot() -> None:
    slots = Memslots()
    slots.set(Region(0, GM, 0x100 * P, 8 * P, 0, 4 * P), file=FILE)  # file pages 4-11
    slots.set(Region(1, GM, 0x300 * P, 8 * P, 0, 20 * P), file=FILE)  # file pages 20-27
    slots.set(Region(2, GM, 0x500 * P, 8 * P, 0, 4 * P), file=OTHER)

    def hits(start: int, end: int) -> list[tuple[int, int, int]]:
        return [(slot.id, first, last) for slot, first, last in slots.find_file(7, start, end)]

    assert hits(0, 64) == [(0, 0x100, 0x108), (1, 0x300, 0x308)]
    assert hits(6, 7) == [(0, 0x102, 0x103)]
    assert hits(11, 21) == [(0, 0x107, 0x108), (1, 0x300, 0x301)]
    assert hits(12, 20) == hits(0, 4) == hits(28, 1 << 40) == []
    assert list(slots.find_file(99, 0, 64)) == []


def test_v7_lets_a_page_be_in_two_slots_and_finds_both() -> None:
    slots = Memslots("v7")
    slots.set(Region(0, GM, 0x100 * P, 16 * P), file=FILE)
    slots.set(Region(1, GM, 0x300 * P, 4 * P, 0, 8 * P), file=FILE)
    hits = [(slot.id, first, last) for slot, first, last in slots.find_file(7, 9, 10)]
    assert hits == [(0, 0x109, 0x10A), (1, 0x301, 0x302)]


def test_lookup_by_shared_side() -> None:
    slots, one, two = Memslots(), _Side(), _Side()
    slots.set(Region(0, 0, 0x100 * P, 8 * P, 0x40 * P), shared=one)
    slots.set(Region(1, 0, 0x200 * P, 8 * P, 0x40 * P), shared=two)
    hits = [(slot.id, first, last) for slot, first, last in slots.find_shared(one, 0x42, 0x80)]
    assert hits == [(0, 0x102, 0x108)]


def test_offset_binding() -> None:
    slot = Memslot(0, 0x100, 16, GM, 0x5000, None, 7, 32)
    assert slot.private_page(0x103) == 35
    assert slot.private_gfn(35) == 0x103
    assert slot.shared_page(0x103) == 8


def test_region_bytes_of_both_sizes() -> None:
    region = Region(1, 4, 0x1000, 0x2000, 0x3000, 0x4000, 5)
    data = region.to_bytes()
    assert len(data) == 160
    assert Region.from_bytes(data) == region
    assert Region.from_bytes(data[:32]) == replace(region, guest_memfd_offset=0, guest_memfd=0)
    assert Region.from_bytes(data[:48] + b"\xff" * 112) == region  # pads are not looked at


small_regions = st.builds(
    lambda slot, private, base, npages, offset, log: Region(
        slot, GM if private else log, base * P, npages * P, 0, offset * P
    ),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 12),
    st.integers(0, 5),
    st.integers(0, 8),
    st.sampled_from([0, DIRTY]),
)


@given(st.lists(st.tuples(small_regions, st.sampled_from([1, 2])), max_size=40))
def test_any_script_keeps_gfns_and_file_pages_in_one_slot_each(
    script: list[tuple[Region, int]],
) -> None:
    slots = Memslots()
    model: dict[int, Memslot] = {}
    for region, file in script:
        twin, before = slots.copy(), slots.key()
        try:
            change = slots.set(region, file=PrivateFile(file, 10))
        except KvmError:
            assert slots.key() == before
            continue
        assert twin.key() == before
        if change.new is None:
            del model[region.slot]
        else:
            model[region.slot] = change.new
        assert {slot.id: slot for slot in slots} == model
        for gfn in range(18):
            holders = [s for s in model.values() if s.base_gfn <= gfn < s.end_gfn]
            assert len(holders) <= 1
            assert slots.find(gfn) == (holders[0] if holders else None)
        for which in (1, 2):
            for page in range(10):
                bound = [
                    (s, s.private_gfn(page))
                    for s in model.values()
                    if s.file == which and s.file_page <= page < s.file_page + s.npages
                ]
                assert len(bound) <= 1
                hits = [(s, first) for s, first, _ in slots.find_file(which, page, page + 1)]
                assert hits == bound
