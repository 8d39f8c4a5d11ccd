# SPDX-License-Identifier: GPL-2.0-or-later
"""What a confidential guest is loaded with: a function of image and parameters."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from hwemu.snp import cpuidpage
from kvmsim.vmm import launch, loader
from kvmsim.vmm.bootparams import BOOT_PARAMS_SIZE, BootParams, RamRange, Technology
from kvmsim.vmm.elf import Image, ImageError, Segment
from kvmsim.vmm.launch import CpuidLeaf, LaunchPage, PageType
from kvmsim.vmm.loader import LAYOUT, PARAMETERS_GPA, LoadPlan
from kvmsim.vmm.vmsa import VMSA_GPA, WORDS

BASE = 0x20000
PAGE = 4096
MIB = 1 << 20
CONFIDENTIAL = [t for t in Technology if t.confidential]
IMAGE = Image(BASE, (Segment(BASE, b"\xf4" * 5000, 3 * PAGE),))


def params(technology: Technology, vcpus: int = 2) -> BootParams:
    return loader.boot_params(technology, (RamRange(0, 8 * MIB),), vcpus)


def plan(
    technology: Technology,
    payload: Sequence[tuple[int, bytes]] = (),
    vcpus: int = 2,
    **more: object,
) -> LoadPlan:
    return loader.plan(IMAGE, params(technology, vcpus), payload, **more)  # type: ignore[arg-type]


def by_gpa(made: LoadPlan) -> dict[int, LaunchPage]:
    return {page.gpa: page for page in made.pages if page.type is not PageType.VMSA}


@pytest.mark.parametrize("technology", CONFIDENTIAL, ids=lambda t: t.kind)
def test_pages_are_whole_ascending_and_the_same_again(technology: Technology) -> None:
    made = plan(technology, [(4 * MIB, b"payload")])
    assert made == plan(technology, [(4 * MIB, b"payload")])
    assert (made.writes, made.payload) == ((), ())
    gpas = [page.gpa for page in made.pages if page.type is not PageType.VMSA]
    assert gpas == sorted(set(gpas))
    assert all(page.gpa % PAGE == 0 and len(page.data) == PAGE for page in made.pages)
    assert {page.type for page in made.pages} <= launch.TYPES[technology]
    content = by_gpa(made)
    assert content[BASE].data == b"\xf4" * PAGE
    assert content[BASE + PAGE].data == (b"\xf4" * 904).ljust(PAGE, b"\0")
    assert content[4 * MIB].data == b"payload".ljust(PAGE, b"\0")
    assert content[PARAMETERS_GPA].data[:8] == b"KVMSIMBP"
    stacks, _ = LAYOUT["stacks"]
    assert [gpa for gpa in gpas if stacks <= gpa < BASE] == [stacks, stacks + PAGE]
    shared = [LAYOUT["stamp log"], LAYOUT["ghcb"], LAYOUT["bounce buffers"]]
    assert not any(start <= gpa < start + size for gpa in gpas for start, size in shared)


def test_zero_pages_are_told_apart_where_there_are_such() -> None:
    zero = BASE + 2 * PAGE
    types = {technology: by_gpa(plan(technology))[zero].type for technology in CONFIDENTIAL}
    assert types == {
        Technology.TDX: PageType.NORMAL,
        Technology.SNP: PageType.ZERO,
        Technology.PKVM: PageType.NORMAL,
    }


def test_what_is_loaded_is_told_to_the_guest() -> None:
    made = plan(Technology.TDX, [(4 * MIB, bytes(PAGE)), (4 * MIB + PAGE, b"x"), (6 * MIB, b"y")])
    raw = by_gpa(made)[PARAMETERS_GPA].data[:BOOT_PARAMS_SIZE]
    at = raw.index(struct.pack("<QQQQ", 4 * MIB, 2 * PAGE, 6 * MIB, PAGE))
    assert struct.unpack_from("<I", raw, at - 8) == (2,)


def test_snp_has_its_own_pages_and_a_vmsa_for_each_vcpu() -> None:
    leaf = CpuidLeaf(0x8000001F, 0, 2, 39, 0, 0)
    made = plan(Technology.SNP, vcpus=3, cpuid=[leaf])
    content = by_gpa(made)
    assert content[LAYOUT["secrets"][0]].type is PageType.SECRETS
    page = content[LAYOUT["cpuid"][0]]
    assert page.type is PageType.CPUID
    assert page.data == cpuidpage.pack({(0x8000001F, 0): (2, 39, 0, 0)})
    vmsas = made.pages[-3:]
    assert [(p.type, p.gpa, p.vcpu) for p in vmsas] == [
        (PageType.VMSA, VMSA_GPA, vcpu) for vcpu in range(3)
    ]
    for p, entry in zip(vmsas, made.entries, strict=True):
        for name in ("rip", "rsp", "rdi", "rsi", "cr3", "rflags"):
            assert struct.unpack_from("<Q", p.data, WORDS[name]) == (getattr(entry, name),)
        assert struct.unpack_from("<Q", p.data, WORDS["sev_features"]) == (1,)
        assert struct.unpack_from("<HHIQ", p.data, 0x10) == (0x08, 0xA9B, 0xFFFFFFFF, 0)
    assert len({p.data for p in vmsas}) == 3


@pytest.mark.parametrize(
    ("technology", "mask"),
    [
        (Technology.SHARED_BIT, 1 << 39),
        (Technology.SW_PROTECTED, 0),
        (Technology.TDX, 0),
        (Technology.SNP, 1 << 39),
        (Technology.PKVM, 0),
    ],
)
def test_boot_tables_carry_the_mark_of_low_memory(technology: Technology, mask: int) -> None:
    made = plan(technology)
    tables = LAYOUT["page tables"][0]
    if technology.confidential:
        data = b"".join(by_gpa(made)[tables + i * PAGE].data for i in range(3))
    else:
        data = dict(made.writes)[tables]
    entries = [entry for entry in struct.unpack("<1536Q", data) if entry]
    assert len(entries) == 514
    assert {entry & 1 << 39 for entry in entries} == {mask}
    assert {entry.cr3 for entry in made.entries} == {tables | mask}


def test_unmeasured_pages_are_told_apart() -> None:
    made = plan(Technology.TDX, [(4 * MIB, b"a")], unmeasured=[(5 * MIB, b"b")])
    assert by_gpa(made)[4 * MIB].type is PageType.NORMAL
    assert by_gpa(made)[5 * MIB].type is PageType.UNMEASURED


@pytest.mark.parametrize(
    ("technology", "more", "why"),
    [
        (Technology.PKVM, {"unmeasured": [(4 * MIB, b"x")]}, "pkvm has no unmeasured pages"),
        (Technology.SW_PROTECTED, {"unmeasured": [(4 * MIB, b"x")]}, "is measured"),
        (Technology.TDX, {"cpuid": [CpuidLeaf(0, 0, 0, 0, 0, 0)]}, "a tdx guest has none"),
        (Technology.SNP, {"cpuid": [CpuidLeaf(0, 0, 0, 0, 0, 0)] * 65}, "65 leaves"),
        (Technology.TDX, {"payload": [(MIB, b"x")]}, "low memory"),
        (Technology.TDX, {"payload": [(8 * MIB, b"x")]}, "not in one range"),
        (
            Technology.TDX,
            {"payload": [(4 * MIB + 2 * i * PAGE, b"x") for i in range(9)]},
            "9 measured ranges",
        ),
    ],
)
def test_impossible_launches_are_refused(
    technology: Technology, more: dict[str, object], why: str
) -> None:
    with pytest.raises(ImageError, match=why):
        plan(technology, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("technology", CONFIDENTIAL, ids=lambda t: t.kind)
def test_low_memory_must_be_able_to_be_private(technology: Technology) -> None:
    made = loader.boot_params(
        technology, (RamRange(0, 2 * MIB, private=False), RamRange(2 * MIB, 6 * MIB)), 1
    )
    with pytest.raises(ImageError, match="starts in private memory"):
        loader.plan(IMAGE, made)


@pytest.mark.parametrize("technology", [Technology.TDX, Technology.SNP])
@pytest.mark.parametrize("ram", [RamRange(0, 3 * MIB), RamRange(0, 8 * MIB - PAGE)])
def test_unaccepted_memory_is_in_units_of_2_mib(technology: Technology, ram: RamRange) -> None:
    with pytest.raises(ValueError, match="accepts memory by 2 MiB"):
        loader.boot_params(technology, (ram,), 1)


def test_a_page_of_two_types_is_refused() -> None:
    made = params(Technology.TDX)
    pieces = [(0, b"a", PageType.NORMAL), (5, b"b", PageType.UNMEASURED)]
    with pytest.raises(ImageError, match="both normal and unmeasured"):
        launch.launch_pages(made, pieces, ())
