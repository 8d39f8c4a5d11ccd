# SPDX-License-Identifier: GPL-2.0-or-later
"""Place a guest in shared low memory: boot page tables, GDT, parameters, stacks, kernel image.

What is to lie in private memory from the beginning, the payload, is told apart from it.

A confidential guest starts with everything shared, so all of it, the page tables too, is reached
with the shared bit set in CR3 and in every entry. :func:`plan` computes what to write and how
each vCPU starts; nothing is written by it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from kvmsim.vmm.bootparams import MAX_VCPUS, PAGE_SIZE, BootParams
from kvmsim.vmm.elf import Image, ImageError, Segment

LOW_SIZE: Final = 2 << 20
"""[0, LOW_SIZE) stays shared for ever: boot data, boot stage, stamp log."""

LAYOUT: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        "parameters": (0x7000, PAGE_SIZE),
        "page tables": (0x8000, 3 * PAGE_SIZE),
        "gdt": (0xC000, PAGE_SIZE),
        "stacks": (0x10000, MAX_VCPUS * PAGE_SIZE),
        "image": (0x20000, 0xE0000),
        "stamp log": (0x100000, 0x80000),
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
class EntryState:
    """How one vCPU starts: 64-bit mode, paging on, interrupts off, flat segments.

    CS is selector 0x08, the data segments 0x10, both from the GDT at ``gdt_base``; CR0 has
    PE MP ET NE WP PG, CR4 PAE, EFER LME LMA NXE; registers not named here are 0.
    """

    rip: int
    rsp: int
    rdi: int
    """The vCPU's index; 0 is the boot vCPU."""
    rsi: int
    """The gpa of the boot-parameter page."""
    cr3: int
    gdt_base: int
    gdt_limit: int
    rflags: int = 0x2


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to write into the shared side (gpa, bytes), and how each vCPU starts.

    ``payload`` is for private pages: whole pages, each of which is first made private.
    """

    writes: tuple[tuple[int, bytes], ...]
    entries: tuple[EntryState, ...]
    payload: tuple[tuple[int, bytes], ...] = ()


def page_tables(shared_bit: int) -> bytes:
    """Three tables for LAYOUT's place: the first GiB at its own address, all of it shared."""
    base = LAYOUT["page tables"][0]
    shared = 1 << shared_bit
    pml4 = [(base + PAGE_SIZE) | shared | _TABLE] + [0] * 511
    pdpt = [(base + 2 * PAGE_SIZE) | shared | _TABLE] + [0] * 511
    directory = [(index << 21) | shared | _LARGE for index in range(512)]
    return struct.pack("<1536Q", *pml4, *pdpt, *directory)


def plan(image: Image, params: BootParams, payload: Sequence[tuple[int, bytes]] = ()) -> LoadPlan:
    """Lay out a guest; ImageError if the image or the RAM does not fit the boot protocol.

    ``payload`` (gpa, bytes) goes into private memory, as does a segment of the image that lies in
    private-capable RAM above low memory.
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
    tables = LAYOUT["page tables"][0]
    gdt = LAYOUT["gdt"][0]
    writes = [
        (PARAMETERS_GPA, params.pack()),
        (tables, page_tables(params.shared_bit)),
        (gdt, struct.pack(f"<{len(_GDT)}Q", *_GDT)),
        (params.log_gpa, bytes(params.log_size)),
    ]
    for segment in low:
        writes.append((segment.gpa, segment.data.ljust(segment.size, b"\0")))
    return LoadPlan(
        tuple(writes), tuple(_entries(image.entry, params)), _private_pages(private, params)
    )


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
            cr3=LAYOUT["page tables"][0] | 1 << params.shared_bit,
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
