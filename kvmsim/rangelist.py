# SPDX-License-Identifier: GPL-2.0-or-later
"""Many ranges in one exit: the list that a guest hands over to be converted.

An extension of this project, off until a VMM asks for it: KVM_HC_MAP_GPA_RANGE (kvm_para.h) takes
one range and leaves the guest for each. The list is the guest's, in one page of shared memory;
each entry is {u64 gpa, u64 npages, u64 attributes}, the arguments of that hypercall.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from kvmsim.uapi import KVMSIM_MAP_GPA_RANGES_MAX, MAP_GPA_RANGE, PAGE_SHIFT, PAGE_SIZE

_GFNS: Final = 1 << 64


class MapGpaRange(NamedTuple):
    """``npages`` pages from ``gpa`` are to be what ``attributes`` say (KVM_MAP_GPA_RANGE_*)."""

    gpa: int
    npages: int
    attributes: int

    @property
    def valid(self) -> bool:
        """What KVM itself checks before it asks user space."""
        wraps = (self.gpa >> PAGE_SHIFT) + self.npages >= _GFNS
        return not self.gpa % PAGE_SIZE and self.npages > 0 and not wraps


def list_size(gpa: int, count: int) -> int:
    """Bytes of a list of ``count`` entries at ``gpa``; 0 if no list can be so.

    It is aligned to 8 bytes and lies in one page.
    """
    size = count * MAP_GPA_RANGE.size
    if not 0 < count <= KVMSIM_MAP_GPA_RANGES_MAX or gpa % 8 or gpa % PAGE_SIZE + size > PAGE_SIZE:
        return 0
    return size


def unpack(data: bytes) -> tuple[MapGpaRange, ...]:
    """The entries of a list as they are; ask each whether it is :attr:`~MapGpaRange.valid`."""
    return tuple(MapGpaRange(*entry) for entry in MAP_GPA_RANGE.iter_unpack(data))


def pack(ranges: Sequence[MapGpaRange]) -> bytes:
    """The bytes of a list."""
    return b"".join(MAP_GPA_RANGE.pack(*entry) for entry in ranges)


def joined(ranges: Sequence[MapGpaRange]) -> Iterator[Sequence[MapGpaRange]]:
    """Cut a list into runs, in its order, of entries that continue each other alike."""
    first = 0
    for at in range(1, len(ranges) + 1):
        if at < len(ranges):
            before, entry = ranges[at - 1], ranges[at]
            end = before.gpa + before.npages * PAGE_SIZE
            if entry.gpa == end and entry.attributes == before.attributes:
                continue
        yield ranges[first:at]
        first = at
