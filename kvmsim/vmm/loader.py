# SPDX-License-Identifier: GPL-2.0-or-later
"""Place a guest in low memory: boot page tables, GDT, parameters, stacks, kernel image.

Where nothing is measured a guest starts with everything shared: all of it, the page tables too, is
reached with the shared bit set in CR3 and in every entry, if there is such a bit, and what is to
lie in private memory from the beginning, the payload, is told apart. Under TDX, SNP and pKVM it
starts in private memory: what lies there is a list of pages (:mod:`kvmsim.vmm.launch`), in the
order in which they are loaded and measured. :func:`plan` computes what to write and how each vCPU
starts; nothing is written by it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from kvmsim.vmm.bootparams import (
    MAX_VCPUS,
    PAGE_SIZE,
    BootFlag,
    BootParams,
    RamRange,
    Technology,
)
from kvmsim.vmm.elf import Image, ImageError, Segment
from kvmsim.vmm.launch import CpuidLeaf, LaunchPage, PageType, launch_pages, ranges
from kvmsim.vmm.vmsa import EntryState as EntryState

LOW_SIZE: Final = 2 << 20
"""[0, LOW_SIZE) holds boot data, the boot stage, and what is shared for ever."""

LAYOUT: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        "parameters": (0x7000, PAGE_SIZE),
        "page tables": (0x8000, 3 * PAGE_SIZE),
        "gdt": (0xC000, PAGE_SIZE),
        "secrets": (0xD000, PAGE_SIZE),
        "cpuid": (0xE000, PAGE_SIZE),
        "stacks": (0x10000, MAX_VCPUS * PAGE_SIZE),
        "image": (0x20000, 0xE0000),
        "stamp log": (0x100000, 0x80000),
        "ghcb": (0x180000, (MAX_VCPUS + 2) * PAGE_SIZE),
        "bounce buffers": (0x1A0000, 0x40000),
    }
)
"""What lies where in low memory: gpa and size in bytes. The image's place is boot.ld's."""

PARAMETERS_GPA: Final = LAYOUT["parameters"][0]
LOG_GPA, LOG_SIZE = LAYOUT["stamp log"]
STACK_SIZE: Final = PAGE_SIZE

# Page-table entries (AMD APM vol. 2, 5.4): P|RW|A for tables, P|RW|A|D|PS for 2 MiB leaves.
_TABLE: Final = 0x23
_LARGE: Final = 0xE3
# Null, 64-bit code, data (APM vol. 2, 4.8).
_GDT: Final = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)


class PayloadError(ImageError):
    """A payload that cannot lie in private memory where it was to; the text says why."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to write into the shared side (gpa, bytes), and how each vCPU starts.

    ``payload`` is for private pages: whole pages, each of which is first made private. ``pages``
    is all that a confidential guest starts with, and ``writes`` and ``payload`` are empty then.
    """

    writes: tuple[tuple[int, bytes], ...]
    entries: tuple[EntryState, ...]
    payload: tuple[tuple[int, bytes], ...] = ()
    pages: tuple[LaunchPage, ...] = ()


def boot_params(
    technology: Technology, ram: tuple[RamRange, ...], vcpus: int, flags: BootFlag = BootFlag.NONE
) -> BootParams:
    """The parameters of a guest whose low memory is laid out as here; ValueError: impossible."""
    snp = technology is Technology.SNP
    return BootParams(
        ram=ram,
        vcpus=vcpus,
        low_size=LOW_SIZE,
        log_gpa=LOG_GPA,
        log_size=LOG_SIZE,
        flags=flags,
        hypercall=technology.hypercall,
        shared_bit=technology.shared_bit,
        private_bit=technology.private_bit,
        technology=technology,
        ghcb_gpa=LAYOUT["ghcb"][0] if snp else 0,
        bounce_gpa=LAYOUT["bounce buffers"][0],
        bounce_size=LAYOUT["bounce buffers"][1],
        secrets_gpa=LAYOUT["secrets"][0] if snp else 0,
        cpuid_gpa=LAYOUT["cpuid"][0] if snp else 0,
    )


def low_mask(params: BootParams) -> int:
    """What page-table entries of low memory carry: the mark of the side on which it lies."""
    bit = params.private_bit if params.technology.confidential else params.shared_bit
    return 1 << bit if bit else 0


def page_tables(mask: int) -> bytes:
    """Three tables for LAYOUT's place: the first GiB at its own address; entries carry ``mask``."""
    base = LAYOUT["page tables"][0]
    pml4 = [(base + PAGE_SIZE) | mask | _TABLE] + [0] * 511
    pdpt = [(base + 2 * PAGE_SIZE) | mask | _TABLE] + [0] * 511
    directory = [(index << 21) | mask | _LARGE for index in range(512)]
    return struct.pack("<1536Q", *pml4, *pdpt, *directory)


def plan(
    image: Image,
    params: BootParams,
    payload: Sequence[tuple[int, bytes]] = (),
    *,
    unmeasured: Sequence[tuple[int, bytes]] = (),
    cpuid: Sequence[CpuidLeaf] = (),
) -> LoadPlan:
    """Lay out a guest; ImageError if the image or the RAM does not fit the boot protocol.

    ``payload`` (gpa, bytes) goes into private memory, as does a segment of the image that lies in
    private-capable RAM above low memory. ``unmeasured`` too, under a technology that loads pages
    without measuring them. ``cpuid`` fills SNP's CPUID page.
    """
    lowest = params.ram[0]
    if lowest.gpa != 0 or lowest.size < LOW_SIZE or params.low_size != LOW_SIZE:
        raise ImageError(
            f"boot memory: the first RAM range is {lowest.gpa:#x}+{lowest.size:#x}, low memory "
            f"{params.low_size:#x}; need [0, {LOW_SIZE:#x}) in the first range"
        )
    private = [
        *((s.gpa, s.data.ljust(s.size, b"\0")) for s in image.segments if s.gpa >= LOW_SIZE),
        *payload,
    ]
    low = [segment for segment in image.segments if segment.gpa < LOW_SIZE]
    for segment in low:
        _check_place(segment)
    above = _private_pages([*private, *unmeasured], params)
    if params.technology.confidential:
        if not lowest.private:
            raise ImageError(
                f"boot memory: the first RAM range must be private-capable, as a "
                f"{params.technology.kind} guest starts in private memory"
            )
        params = _with_measured(params, above)
    elif unmeasured:
        raise PayloadError(
            f"private payload without a measurement: nothing of a {params.technology.kind} guest "
            "is measured"
        )
    data = [
        (PARAMETERS_GPA, params.pack()),
        (LAYOUT["page tables"][0], page_tables(low_mask(params))),
        (LAYOUT["gdt"][0], struct.pack(f"<{len(_GDT)}Q", *_GDT)),
        *((segment.gpa, segment.data.ljust(segment.size, b"\0")) for segment in low),
    ]
    entries = tuple(_entries(image.entry, params))
    if not params.technology.confidential:
        return LoadPlan((*data, (params.log_gpa, bytes(params.log_size))), entries, above)
    data.append((LAYOUT["stacks"][0], bytes(params.vcpus * STACK_SIZE)))
    bare = {gpa for gpa, _ in unmeasured}
    pieces = [(gpa, piece, PageType.NORMAL) for gpa, piece in data]
    pieces += [
        (gpa, piece, PageType.UNMEASURED if gpa in bare else PageType.NORMAL)
        for gpa, piece in above
    ]
    return LoadPlan((), entries, pages=launch_pages(params, pieces, entries, cpuid))


def _with_measured(params: BootParams, above: Sequence[tuple[int, bytes]]) -> BootParams:
    """Tell the guest what is loaded above low memory: it is not to accept that again."""
    try:
        return replace(params, measured=ranges(above))
    except ValueError as error:
        raise PayloadError(f"private payload: {error}") from None


def _private_pages(
    pieces: Sequence[tuple[int, bytes]], params: BootParams
) -> tuple[tuple[int, bytes], ...]:
    """Whole pages of pieces in private-capable RAM, in order; PayloadError for any other."""
    found = []
    before = LOW_SIZE
    for gpa, data in sorted(pieces):
        end = gpa + len(data)
        where = f"private payload {gpa:#x}–{end:#x}"
        if gpa % PAGE_SIZE or not data:
            raise PayloadError(f"{where}: it must begin at a page and have bytes")
        if gpa < before:
            raise PayloadError(f"{where}: below {before:#x} is low memory, or another payload")
        if not any(r.private and r.gpa <= gpa and end <= r.end for r in params.ram):
            raise PayloadError(f"{where}: not in one range of RAM that can be private")
        pages = -(-len(data) // PAGE_SIZE) * PAGE_SIZE
        found.append((gpa, data.ljust(pages, b"\0")))
        before = gpa + pages
    return tuple(found)


def _entries(rip: int, params: BootParams) -> Iterator[EntryState]:
    for vcpu in range(params.vcpus):
        yield EntryState(
            rip=rip,
            rsp=LAYOUT["stacks"][0] + (vcpu + 1) * STACK_SIZE,
            rdi=vcpu,
            rsi=PARAMETERS_GPA,
            cr3=LAYOUT["page tables"][0] | low_mask(params),
            gdt_base=LAYOUT["gdt"][0],
            gdt_limit=len(_GDT) * 8 - 1,
        )


def _check_place(segment: Segment) -> None:
    start, size = LAYOUT["image"]
    if segment.gpa < start or segment.end > start + size:
        raise ImageError(
            f"guest image: segment {segment.gpa:#x}–{segment.end:#x} is outside "
            f"{start:#x}–{start + size:#x}, where the boot stage may lie"
        )
