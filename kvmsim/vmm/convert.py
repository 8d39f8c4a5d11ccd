# SPDX-License-Identifier: GPL-2.0-or-later
"""Conversion of guest memory between shared and private: QEMU's kvm_convert_memory().

Validate, change the attributes, then give back what the other side held. With separate pools a
converted gfn would else have two pages ("double allocation").
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from kvmsim.rangelist import MapGpaRange, joined
from kvmsim.uapi import KvmError
from kvmsim.vmm.bootparams import PAGE_SIZE, RamRange


class GuestMemory(Protocol):
    """What the VMM needs of its VM. Addresses and sizes are bytes, without the shared bit.

    Every method may raise KvmError or OSError; the VMM then tells the guest.
    """

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> bool:
        """KVM_SET_MEMORY_ATTRIBUTES; True if anything changed."""
        ...

    def discard_shared(self, gpa: int, size: int) -> None:
        """Free the shared side of a range (QEMU: ram_block_discard_range)."""
        ...

    def discard_private(self, gpa: int, size: int) -> None:
        """Punch the private side (QEMU: ram_block_discard_guest_memfd_range)."""
        ...

    def read_shared(self, gpa: int, length: int) -> bytes:
        """Bytes of the shared side, as a device would read them."""
        ...

    def write_shared(self, gpa: int, data: bytes) -> None:
        """Write to the shared side."""
        ...

    def populate(self, gpa: int, source: bytes) -> None:
        """Fill private pages from source pages, before the VM runs (kvm_gmem_populate())."""
        ...


class Discard(Enum):
    """Which side a conversion away from it frees."""

    NONE = "none"
    PRIVATE = "private"
    SHARED = "shared"
    BOTH = "both"

    def applies(self, to_private: bool) -> bool:
        """Whether a conversion in this direction discards the side that is left."""
        left = Discard.SHARED if to_private else Discard.PRIVATE
        return self in (left, Discard.BOTH)


@dataclass(frozen=True, slots=True)
class Converted:
    """Done. ``changed``: an attribute was different before; ``discarded``: bytes given back."""

    gpa: int
    size: int
    private: bool
    changed: bool
    discarded: int


@dataclass(frozen=True, slots=True)
class Ignored:
    """Nothing to do: memory that cannot be private is shared already."""

    gpa: int
    size: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Not done, or (``attributes_set``) attributes changed but the other side not freed."""

    errno: int
    reason: str
    attributes_set: bool = False


def convert_memory(
    memory: GuestMemory,
    ram: Sequence[RamRange],
    gpa: int,
    size: int,
    *,
    private: bool,
    discard: Discard = Discard.BOTH,
) -> Converted | Ignored | Refused:
    """Convert [gpa, gpa + size) bytes; checked as a whole before anything is changed.

    EINVAL: unaligned, empty, or private where there is no private-capable RAM. To shared where
    there is none is silently right, as guests convert their device regions so.
    """
    what = f"convert {gpa:#x}+{size:#x} to {'private' if private else 'shared'}"
    if gpa % PAGE_SIZE or size % PAGE_SIZE or size <= 0 or gpa < 0:
        return Refused(errno.EINVAL, f"{what}: both must be multiples of {PAGE_SIZE}, size not 0")
    capable = _pieces(ram, gpa, gpa + size)
    covered = sum(length for _, length in capable)
    if private and covered != size:
        return Refused(
            errno.EINVAL, f"{what}: only {covered:#x} bytes of it are private-capable RAM"
        )
    if not capable:
        return Ignored(gpa, size)
    changed = False
    discarded = 0
    attributes_set = False
    for start, length in capable:
        try:
            changed |= memory.set_memory_attributes(start, length, private)
            attributes_set = True
            if discard.applies(private):
                (memory.discard_shared if private else memory.discard_private)(start, length)
                discarded += length
        except (KvmError, OSError) as error:
            return Refused(error.errno or errno.EIO, f"{what}: {error}", attributes_set)
    return Converted(gpa, size, private, changed, discarded)


def convert_list(ranges: Sequence[MapGpaRange], convert: Callable[[MapGpaRange], int]) -> int:
    """How many entries are done, from the first on; a negative errno if none is.

    ``convert`` answers 0 or a negative errno. What continues its predecessor is converted with it,
    by one change of attributes and one discard; if that is refused each has its own answer.
    """
    done = 0
    for run in joined(ranges):
        npages = sum(entry.npages for entry in run)
        number = convert(MapGpaRange(run[0].gpa, npages, run[0].attributes))
        if not number:
            done += len(run)
            continue
        for entry in run if len(run) > 1 else ():
            number = convert(entry)
            if number:
                break
            done += 1
        return done or number
    return done


def _pieces(ram: Sequence[RamRange], start: int, end: int) -> list[tuple[int, int]]:
    """The private-capable parts of [start, end): (gpa, size), in order."""
    pieces = []
    for r in ram:
        first, last = max(start, r.gpa), min(end, r.end)
        if r.private and first < last:
            pieces.append((first, last - first))
    return pieces
