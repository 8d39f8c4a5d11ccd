# SPDX-License-Identifier: GPL-2.0-or-later
"""The entry format of nested paging and the scalar walk through it.

x86-64 long-mode tables, four levels of 512 entries (AMD APM vol. 2, 5.3 and 15.25). The walk is
the one that Unicorn's engine does in C (get_hphys in QEMU's target/i386), with named errors.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
ENTRIES = 512
ADDRESS_BITS = 40
"""Width of guest- and host-physical addresses of the engine (TCG_PHYS_ADDR_BITS)."""
ROOT_LEVEL = 4

PRESENT = 1 << 0
WRITABLE = 1 << 1
USER = 1 << 2
ACCESSED = 1 << 5
DIRTY = 1 << 6
LARGE = 1 << 7
SOFT_NO_EXEC = 1 << 9
NX = 1 << 63

ADDRESS_MASK = 0x000F_FFFF_FFFF_F000
RESERVED_MASK = ADDRESS_MASK & ~((1 << ADDRESS_BITS) - 1)
NON_LEAF = PRESENT | WRITABLE | USER | ACCESSED
_PAT_LARGE = 1 << 12


class WalkReason(enum.StrEnum):
    """Why a walk found no translation; the strings are stable."""

    NOT_PRESENT = "not-present"
    NOT_WRITABLE = "not-writable"
    NOT_USER = "not-user"
    RESERVED_BIT = "reserved-bit"
    TABLE_OUTSIDE_POOL = "table-outside-pool"
    GPA_TOO_WIDE = "gpa-too-wide"


class Stage2Error(Exception):
    """Base of everything that second-stage tables raise."""


class WalkError(Stage2Error):
    """No translation: ``gpa``, the ``level`` (4 = root) whose entry said so, and the ``reason``."""

    def __init__(self, gpa: int, level: int, reason: WalkReason) -> None:
        super().__init__(f"stage-2 walk of gpa {gpa:#x}: {reason.value} at level {level}")
        self.gpa = gpa
        self.level = level
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Translation:
    """One leaf: ``hpa`` of the byte asked for, ``level`` 1 (4 KiB), 2 (2 MiB) or 3 (1 GiB)."""

    hpa: int
    level: int
    writable: bool
    executable: bool = True


def walk(words: memoryview, pool_hpa: int, root: int, gpa: int, write: bool) -> Translation:
    """Translate ``gpa`` through the tables in ``words`` (a 'Q' view of the pool at ``pool_hpa``).

    ``root`` is the index of the root table in the pool. Nested accesses are user accesses
    (APM vol. 2, 15.25.5): every entry on the path needs U/S; with ``write`` also R/W. Raises
    `WalkError`.
    """
    if gpa < 0 or gpa >> ADDRESS_BITS:
        raise WalkError(gpa, ROOT_LEVEL, WalkReason.GPA_TOO_WIDE)
    table = root
    rights = WRITABLE | USER
    executable = True
    level = ROOT_LEVEL
    while True:
        shift = PAGE_SHIFT + 9 * (level - 1)
        entry = words[table * ENTRIES + ((gpa >> shift) & 511)]
        if not entry & PRESENT:
            raise WalkError(gpa, level, WalkReason.NOT_PRESENT)
        if entry & RESERVED_MASK or (level == ROOT_LEVEL and entry & LARGE):
            raise WalkError(gpa, level, WalkReason.RESERVED_BIT)
        rights &= entry
        executable = executable and not entry & (NX | SOFT_NO_EXEC)
        if level == 1 or entry & LARGE:
            break
        offset = (entry & ADDRESS_MASK) - pool_hpa
        if not 0 <= offset < len(words) * 8:
            raise WalkError(gpa, level, WalkReason.TABLE_OUTSIDE_POOL)
        table = offset >> PAGE_SHIFT
        level -= 1
    size = 1 << shift
    if level > 1 and entry & ADDRESS_MASK & (size - 1) & ~_PAT_LARGE:
        raise WalkError(gpa, level, WalkReason.RESERVED_BIT)
    if not rights & USER:
        raise WalkError(gpa, level, WalkReason.NOT_USER)
    if write and not rights & WRITABLE:
        raise WalkError(gpa, level, WalkReason.NOT_WRITABLE)
    hpa = (entry & ADDRESS_MASK & ~(size - 1)) | (gpa & (size - 1))
    return Translation(hpa, level, bool(rights & WRITABLE), executable)


_PATH = PRESENT | USER
_PATH_WRITE = PRESENT | USER | WRITABLE
_REFUSED = RESERVED_MASK | LARGE


def lookup(words: memoryview, pool_hpa: int, root: int, gpa: int, write: bool) -> int:
    """What `walk` would give as hpa for a plain 4 KiB leaf, or -1: ask `walk` then.

    The short way for callers that translate often.
    """
    if gpa >> ADDRESS_BITS:
        return -1
    need = _PATH_WRITE if write else _PATH
    entry = words[root * ENTRIES + (gpa >> 39)]
    for shift in (30, 21, 12):
        at = (entry & ADDRESS_MASK) - pool_hpa
        if entry & need != need or entry & _REFUSED or at < 0:
            return -1
        entry = words[(at >> 3) + (gpa >> shift & 511)]
    if entry & need != need or entry & RESERVED_MASK:
        return -1
    return int((entry & ADDRESS_MASK) | (gpa & (PAGE_SIZE - 1)))
