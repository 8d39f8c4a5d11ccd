# SPDX-License-Identifier: GPL-2.0-or-later
"""What a confidential guest starts with: pages in load order, and the state of each vCPU.

The list is a function of image and parameters alone, so that anybody can measure it again: pages
ascend by gpa; SNP's VMSAs come last, in the order of the vCPUs. A page that all zeroes fill is
loaded as a zero page where the technology has such (SNP); TDX and pKVM know one type of page.

Sources: SNP firmware ABI, SNP_LAUNCH_UPDATE and 8.17 (page types, the CPUID page); TDX module ABI,
TDH.MEM.PAGE.ADD and TDH.MR.EXTEND.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kvmsim.vmm.bootparams import PAGE_SIZE, BootParams, Technology
from kvmsim.vmm.elf import ImageError
from kvmsim.vmm.vmsa import VMSA_GPA, EntryState, pack_vmsa

CPUID_ENTRIES: Final = 64
_CPUID_HEAD: Final = struct.Struct("<IIQ")
_CPUID_ENTRY: Final = struct.Struct("<IIQQIIIIQ")


class PageType(StrEnum):
    """How a page is loaded: SNP's page types; of the others, TDX has the first and the third."""

    NORMAL = "normal"
    """Contents and address are measured."""
    ZERO = "zero"
    """The firmware zeroes it; the address is measured."""
    UNMEASURED = "unmeasured"
    """Contents are loaded, and not measured."""
    SECRETS = "secrets"
    """The firmware writes its secrets page there."""
    CPUID = "cpuid"
    """A table of CPUID answers, which the firmware checks."""
    VMSA = "vmsa"
    """The state of a vCPU."""


TYPES: Final = {
    Technology.TDX: frozenset((PageType.NORMAL, PageType.UNMEASURED)),
    Technology.SNP: frozenset(PageType),
    Technology.PKVM: frozenset((PageType.NORMAL,)),
}
"""The page types of each technology that loads a guest before it runs."""


@dataclass(frozen=True, slots=True)
class LaunchPage:
    """4096 bytes for ``gpa``. Of a VMSA the gpa is what is measured; ``vcpu`` says whose it is."""

    gpa: int
    data: bytes
    type: PageType
    vcpu: int | None = None


@dataclass(frozen=True, slots=True)
class CpuidLeaf:
    """An entry of SNP's CPUID page: what CPUID answers for (leaf, subleaf)."""

    leaf: int
    subleaf: int
    eax: int
    ebx: int
    ecx: int
    edx: int
    xcr0: int = 0
    xss: int = 0


def pack_cpuid(leaves: Sequence[CpuidLeaf]) -> bytes:
    """SNP's CPUID page; ImageError if there are more leaves than it has room for."""
    if len(leaves) > CPUID_ENTRIES:
        raise ImageError(f"CPUID page: {len(leaves)} leaves, {CPUID_ENTRIES} have room")
    page = _CPUID_HEAD.pack(len(leaves), 0, 0)
    for e in leaves:
        page += _CPUID_ENTRY.pack(e.leaf, e.subleaf, e.xcr0, e.xss, e.eax, e.ebx, e.ecx, e.edx, 0)
    return page.ljust(PAGE_SIZE, b"\0")


def ranges(pieces: Sequence[tuple[int, bytes]]) -> tuple[tuple[int, int], ...]:
    """(gpa, size) of pieces of whole pages in ascending order, neighbours joined."""
    found: list[tuple[int, int]] = []
    for gpa, data in pieces:
        if found and sum(found[-1]) == gpa:
            found[-1] = (found[-1][0], found[-1][1] + len(data))
        else:
            found.append((gpa, len(data)))
    return tuple(found)


def launch_pages(
    params: BootParams,
    pieces: Sequence[tuple[int, bytes, PageType]],
    entries: Sequence[EntryState],
    cpuid: Sequence[CpuidLeaf] = (),
) -> tuple[LaunchPage, ...]:
    """The pages of a confidential guest, in load order.

    ``pieces`` begin and end anywhere; no page may be of two types (ImageError). A type that the
    technology lacks is refused, but zero pages, which are loaded as normal ones then.
    """
    technology = params.technology
    contents: dict[int, bytearray] = {}
    types: dict[int, PageType] = {}
    for gpa, data, type in pieces:
        for page, offset, part in _split(gpa, data):
            if types.setdefault(page, type) is not type:
                raise ImageError(f"launch page {page:#x}: both {types[page]} and {type}")
            target = contents.setdefault(page, bytearray(PAGE_SIZE))
            target[offset : offset + len(part)] = part
    if technology is Technology.SNP:
        for page, type, data in (
            (params.secrets_gpa, PageType.SECRETS, bytes(PAGE_SIZE)),
            (params.cpuid_gpa, PageType.CPUID, pack_cpuid(cpuid)),
        ):
            if page in types:
                raise ImageError(f"launch page {page:#x}: both {types[page]} and {type}")
            contents[page], types[page] = bytearray(data), type
    elif cpuid:
        raise ImageError(f"CPUID page: a {technology.kind} guest has none")
    pages = [_page(technology, gpa, bytes(contents[gpa]), types[gpa]) for gpa in sorted(contents)]
    if technology is Technology.SNP:
        pages += [
            LaunchPage(VMSA_GPA, pack_vmsa(entry), PageType.VMSA, vcpu)
            for vcpu, entry in enumerate(entries)
        ]
    return tuple(pages)


def _split(gpa: int, data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(page, offset in it, bytes) of a piece."""
    done = 0
    while done < len(data):
        offset = (gpa + done) % PAGE_SIZE
        part = data[done : done + PAGE_SIZE - offset]
        yield gpa + done - offset, offset, part
        done += len(part)


def _page(technology: Technology, gpa: int, data: bytes, type: PageType) -> LaunchPage:
    known = TYPES[technology]
    if type is PageType.NORMAL and PageType.ZERO in known and not any(data):
        type = PageType.ZERO
    if type not in known:
        raise ImageError(f"launch page {gpa:#x}: {technology.kind} has no {type} pages")
    return LaunchPage(gpa, data, type)
