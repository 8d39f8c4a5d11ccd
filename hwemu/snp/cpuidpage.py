# SPDX-License-Identifier: GPL-2.0-or-later
"""The CPUID page of a launch: what the hypervisor claims, and what the AMD-SP lets it claim.

Layout: SEV-SNP firmware ABI (56860), "CPUID page"; ``struct snp_cpuid_table`` in
``arch/x86/include/asm/sev.h``.  The AMD-SP refuses bits that the machine has not, and leaves in the
page what it would have accepted.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, TypeAlias

from hwemu.snp.rmpentry import PAGE_SIZE

MAX_COUNT: Final = 64
#: count, reserved.
_HEAD: Final = struct.Struct("<IIQ")
#: EAX_IN, ECX_IN, XCR0_IN, XSS_IN, EAX, EBX, ECX, EDX, reserved.
_FUNCTION: Final = struct.Struct("<IIQQIIIIQ")

Registers: TypeAlias = tuple[int, int, int, int]
#: (EAX_IN, ECX_IN) → the bits of EAX, EBX, ECX, EDX that a guest may be told of; others: none.
CpuidLimits: TypeAlias = Mapping[tuple[int, int], Registers]


def pack(functions: Mapping[tuple[int, int], Registers]) -> bytes:
    """Return a page with these functions; ValueError for more than 64."""
    if len(functions) > MAX_COUNT:
        raise ValueError(f"CPUID page of {len(functions)} functions: at most {MAX_COUNT}")
    rows = [_FUNCTION.pack(*leaf, 0, 0, *values, 0) for leaf, values in functions.items()]
    return (_HEAD.pack(len(rows), 0, 0) + b"".join(rows)).ljust(PAGE_SIZE, b"\0")


def corrected(page: bytes, limits: CpuidLimits) -> bytes | None:
    """Return the page as it would be accepted, itself if it is; None if it is malformed."""
    count, reserved, more = _HEAD.unpack_from(page)
    if count > MAX_COUNT or reserved or more:
        return None
    done = bytearray(page)
    for number in range(count):
        at = _HEAD.size + number * _FUNCTION.size
        leaf, sub, xcr0, xss, *values, rest = _FUNCTION.unpack_from(page, at)
        allowed = limits.get((leaf, sub), (0, 0, 0, 0))
        kept = [value & bits for value, bits in zip(values, allowed, strict=True)]
        _FUNCTION.pack_into(done, at, leaf, sub, xcr0, xss, *kept, rest)
    return bytes(done)
