# SPDX-License-Identifier: GPL-2.0-or-later
"""Seals and purposes of a private file, as data.

A seal takes a right away for good (fcntl(2), ``memfd_add_seals`` in ``mm/memfd.c``); a purpose is
what the first user of a file is promised, and every later user must ask for the same
(``memfile_register_notifier`` of "KVM: mm: fd-based approach …" v7).

The numbers are those of memfds and of v7.  F_SEAL_AUTO_ALLOCATE was never merged, and its number
means F_SEAL_EXEC today: that is why none of them goes through fcntl here.
"""

from __future__ import annotations

import enum
import errno
from typing import Final

from privfs.personality import Refused


class Seal(enum.IntFlag):
    """Seals of a private file."""

    NONE = 0
    SEAL = 0x01  #: no more seals
    SHRINK = 0x02
    GROW = 0x04
    WRITE = 0x08  #: no stores by guests, and nothing that changes contents
    AUTO_ALLOCATE = 0x20  #: no allocation but by fallocate: a guest fault in a hole is refused


ALL_SEALS: Final = Seal.SEAL | Seal.SHRINK | Seal.GROW | Seal.WRITE | Seal.AUTO_ALLOCATE


class Deed(enum.Enum):
    """What a seal can forbid."""

    SEAL = "add a seal"
    SHRINK = "shrink"
    GROW = "grow"
    ERASE = "punch or zero pages"
    STORE = "grant a page for stores"
    FAULT_IN = "allocate for a guest's access"


#: What each seal forbids, and with which errno; shmem_setattr and shmem_fallocate answer EPERM.
FORBIDS: Final[dict[Seal, dict[Deed, int]]] = {
    Seal.SEAL: {Deed.SEAL: errno.EPERM},
    Seal.SHRINK: {Deed.SHRINK: errno.EPERM},
    Seal.GROW: {Deed.GROW: errno.EPERM},
    Seal.WRITE: {Deed.ERASE: errno.EPERM, Deed.STORE: errno.EACCES},
    Seal.AUTO_ALLOCATE: {Deed.FAULT_IN: errno.ENOENT},
}


class Purpose(enum.IntFlag):
    """What a file is for (``MEMFILE_F_*`` of v7); a promise to its users."""

    NONE = 0
    USER_INACCESSIBLE = 0x1  #: user space cannot read, write or map it: true of every file here
    UNMOVABLE = 0x2  #: its pages stay where they are while it has users
    UNRECLAIMABLE = 0x4  #: its pages are not swapped out; kept while the machine has no swap


ALL_PURPOSES: Final = Purpose.USER_INACCESSIBLE | Purpose.UNMOVABLE | Purpose.UNRECLAIMABLE


def check(seals: int, deed: Deed, what: object) -> None:
    """Raise Refused if one of ``seals`` forbids ``deed``; ``what`` names it for the message."""
    if not seals:
        return
    for seal, forbidden in FORBIDS.items():
        if seals & seal and deed in forbidden:
            raise Refused(forbidden[deed], f"{what}: sealed against this (F_SEAL_{seal.name})")


def names(flags: enum.IntFlag) -> list[str]:
    """Return the names of the flags that are set, in order of their numbers."""
    return [flag.name or "" for flag in type(flags) if flag and flag & flags]
