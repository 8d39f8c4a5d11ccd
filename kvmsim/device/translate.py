# SPDX-License-Identifier: GPL-2.0-or-later
"""A walk of the guest's page tables from outside: KVM_TRANSLATE.

kvm_mmu_gva_to_gpa_system() reads the tables through the slots' userspace side, so tables in
private memory are not seen. AMD APM vol. 2, 5.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hwemu.cpu.api import CR0_PG, CR4_PAE, CR4_PSE, EFER_LMA, Sregs

_PRESENT, _LARGE = 1 << 0, 1 << 7
_ADDRESS: Final = 0x000F_FFFF_FFFF_F000


def translate(sregs: Sregs, linear: int, read_word: Callable[[int], int | None]) -> int | None:
    """The gpa of a linear address, None if nothing is mapped there.

    ``read_word(gpa)`` gives the 64-bit word at a guest-physical address, None if there is none.
    Paging with PAE outside long mode is not simulated and maps nothing. Whether the address is
    canonical is not asked: FNAME(walk_addr_generic) does not either.
    """
    if not sregs.cr0 & CR0_PG:
        return linear
    if not sregs.efer & EFER_LMA:
        return None if sregs.cr4 & CR4_PAE else _translate32(sregs, linear, read_word)
    table = sregs.cr3 & _ADDRESS
    for level in (4, 3, 2, 1):
        shift = 12 + 9 * (level - 1)
        entry = read_word(table + (linear >> shift & 511) * 8)
        if entry is None or not entry & _PRESENT:
            return None
        if level == 1 or (level < 4 and entry & _LARGE):
            inside = (1 << shift) - 1
            return entry & _ADDRESS & ~inside | linear & inside
        table = entry & _ADDRESS
    raise AssertionError("a walk ends at level 1")


def _translate32(sregs: Sregs, linear: int, read_word: Callable[[int], int | None]) -> int | None:
    """Two levels of 4-byte entries (AMD APM vol. 2, 5.2)."""
    linear &= 0xFFFF_FFFF
    table = sregs.cr3 & 0xFFFF_F000
    for shift in (22, 12):
        at = table + (linear >> shift & 1023) * 4
        word = read_word(at & ~7)
        entry = 0 if word is None else word >> at % 8 * 8 & 0xFFFF_FFFF
        if not entry & _PRESENT:
            return None
        if shift == 22 and entry & _LARGE and sregs.cr4 & CR4_PSE:
            return entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32 | linear & 0x3F_FFFF
        table = entry & 0xFFFF_F000
    return table | linear & 0xFFF
