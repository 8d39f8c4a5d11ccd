# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import itertools
import struct

import pytest

from kvmsim.vmm import loader
from kvmsim.vmm.bootparams import BootParams, RamRange
from kvmsim.vmm.elf import Image, ImageError, Segment, parse_elf

BASE = 0x20000


def elf(
    *,
    kind: int = 2,
    machine: int = 62,
    entry: int = BASE,
    data: bytes = b"\xf4",
    memsz: int = 16,
    filesz: int | None = None,
) -> bytes:
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, kind, machine, 1, entry, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    size = len(data) if filesz is None else filesz
    note = struct.pack("<IIQQQQQQ", 4, 4, 0, 0, 0, 0, 0, 1)
    load = struct.pack("<IIQQQQQQ", 1, 7, 176, 0xDEAD000, BASE, size, memsz, 4096)
    return header + note + load + data


def params(vcpus: int = 1, **changes: object) -> BootParams:
    given: dict[str, object] = {
        "ram": (RamRange(0, 4 << 20),),
        "vcpus": vcpus,
        "low_size": loader.LOW_SIZE,
        "log_gpa": loader.LOG_GPA,
        "log_size": loader.LOG_SIZE,
    }
    return BootParams(**(given | changes))  # type: ignore[arg-type]


def test_elf_gives_loadable_segments_at_their_physical_address() -> None:
    image = parse_elf(elf())
    assert image == Image(BASE, (Segment(BASE, b"\xf4", 16),))


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (b"", "not a 64-bit"),
        (b"MZ" + bytes(100), "not a 64-bit"),
        (elf(kind=3), "type 3"),
        (elf(machine=40), "machine 40"),
        (elf()[:100], "program headers"),
        (elf(filesz=2), "cut short"),
        (elf(filesz=1, memsz=0), "larger than its memory"),
        (elf(entry=BASE + 16), "in no loaded segment"),
    ],
)
def test_damaged_images_are_refused(image: bytes, complaint: str) -> None:
    with pytest.raises(ImageError, match=complaint):
        parse_elf(image)


def test_nothing_that_is_written_overlaps() -> None:
    plan = loader.plan(parse_elf(elf(memsz=0xE0000)), params())
    spans = sorted((gpa, gpa + len(data)) for gpa, data in plan.writes)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert spans[-1][1] <= loader.LOW_SIZE
    stacks, size = loader.LAYOUT["stacks"]
    assert not any(a < stacks + size and b > stacks for a, b in spans)


def test_zero_tail_of_a_segment_is_written() -> None:
    plan = loader.plan(parse_elf(elf()), params())
    assert (BASE, b"\xf4" + bytes(15)) in plan.writes


def test_every_vcpu_has_its_stack_and_index() -> None:
    plan = loader.plan(parse_elf(elf()), params(vcpus=3))
    assert [e.rdi for e in plan.entries] == [0, 1, 2]
    assert len({e.rsp for e in plan.entries}) == 3
    assert all(e.rip == BASE and e.rsi == loader.PARAMETERS_GPA for e in plan.entries)
    stacks, size = loader.LAYOUT["stacks"]
    assert all(stacks < e.rsp <= stacks + size for e in plan.entries)


def walk(tables: bytes, cr3: int, va: int, shared: int) -> int:
    base = loader.LAYOUT["page tables"][0]
    assert cr3 & shared
    at = cr3 & ~shared
    for shift in (39, 30, 21):
        index = va >> shift & 511
        (entry,) = struct.unpack_from("<Q", tables, at - base + 8 * index)
        assert entry & 1
        assert entry & shared, "an entry without the shared bit"
        at = entry & ~shared & ~0xFFF
        if entry & 0x80:
            return at | va & 0x1FFFFF
    raise AssertionError("no large leaf")


@pytest.mark.parametrize("bit", [39, 38])
@pytest.mark.parametrize("va", [0, BASE, 0x1FF000, 0x3FFFF123])
def test_boot_tables_map_the_first_gib_shared_at_its_own_address(bit: int, va: int) -> None:
    plan = loader.plan(parse_elf(elf()), params(shared_bit=bit))
    tables = dict(plan.writes)[loader.LAYOUT["page tables"][0]]
    assert walk(tables, plan.entries[0].cr3, va, 1 << bit) == va


@pytest.mark.parametrize(
    "changes",
    [
        {"ram": (RamRange(0, 1 << 20),)},
        {"ram": (RamRange(4096, 4 << 20),)},
        {"low_size": 1 << 20},
    ],
)
def test_ram_without_low_memory_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ImageError, match="boot memory"):
        loader.plan(parse_elf(elf()), params(**changes))


@pytest.mark.parametrize("gpa", [0x1F000, 0xFFFFF])
def test_image_outside_its_place_is_refused(gpa: int) -> None:
    image = Image(gpa, (Segment(gpa, b"\xf4", 4096),))
    with pytest.raises(ImageError, match="outside"):
        loader.plan(image, params())


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        ([(0x200001, b"x")], "begin at a page"),
        ([(0x200000, b"")], "have bytes"),
        ([(0x1FF000, b"x")], "low memory"),
        ([(0x200000, bytes(4097)), (0x201000, b"x")], "or another payload"),
        ([(0x3FF000, bytes(4097))], "not in one range"),
        ([(0x400000, b"x")], "not in one range"),
        ([(0x800000, b"x")], "not in one range"),
    ],
)
def test_payload_that_cannot_be_private_is_refused(
    payload: list[tuple[int, bytes]], why: str
) -> None:
    ram = (RamRange(0, 4 << 20), RamRange(8 << 20, 4 << 20, private=False))
    with pytest.raises(ImageError, match=why):
        loader.plan(parse_elf(elf()), params(ram=ram), payload)
