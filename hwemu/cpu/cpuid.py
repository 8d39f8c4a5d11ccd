# SPDX-License-Identifier: GPL-2.0-or-later
"""What CPUID tells the guest: a table, since the host's own answers must not leak in.

AMD APM vol. 3, appendix E. No AVX and no XSAVE, which the engine lacks.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

Leaf = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""


def _text(text: bytes) -> tuple[int, int, int]:
    first, second, third = struct.unpack("<III", text)
    return first, second, third


_VENDOR = _text(b"AuthenticAMD")
_HYPERVISOR = _text(b"privfsprivfs")

# leaf 1 EDX: FPU PSE TSC MSR PAE CX8 PGE CMOV PAT CLFSH MMX FXSR SSE SSE2
_FEATURES_EDX = sum(1 << bit for bit in (0, 3, 4, 5, 6, 8, 13, 15, 16, 19, 23, 24, 25, 26))
# leaf 1 ECX: SSE3 SSSE3 CX16 SSE4.1 SSE4.2 POPCNT, and "running under a hypervisor"
_FEATURES_ECX = sum(1 << bit for bit in (0, 9, 13, 19, 20, 23, 31))
# leaf 0x80000001 EDX: SYSCALL NX 1-GiB-pages RDTSCP long-mode; ECX: LAHF
_EXTENDED_EDX = sum(1 << bit for bit in (11, 20, 26, 27, 29))
_EXTENDED_ECX = 1

DEFAULT: Mapping[int, Leaf] = {
    0x0000_0000: (1, _VENDOR[0], _VENDOR[2], _VENDOR[1]),
    0x0000_0001: (0x0080_0F12, 0, _FEATURES_ECX, _FEATURES_EDX),
    0x4000_0000: (0x4000_0000, *_HYPERVISOR),
    0x8000_0000: (0x8000_0008, _VENDOR[0], _VENDOR[2], _VENDOR[1]),
    0x8000_0001: (0x0080_0F12, 0, _EXTENDED_ECX, _EXTENDED_EDX),
    0x8000_0008: (40 | 48 << 8, 0, 0, 0),
}


Lookup = Callable[[int, int], Leaf]
"""What CPUID answers for (EAX, ECX), both 32 bits."""


def fixed(table: Mapping[int, Leaf], index: int) -> Lookup:
    """Answers from a table of leaves for vCPU ``index``; unknown leaves are zero."""

    def answer(leaf: int, subleaf: int) -> Leaf:
        eax, ebx, ecx, edx = table.get(leaf, (0, 0, 0, 0))
        if leaf == 1:
            ebx |= (index & 0xFF) << 24  # initial APIC id
        return eax, ebx, ecx, edx

    return answer
