# SPDX-License-Identifier: GPL-2.0-or-later
"""Per-gfn memory attributes of one VM: an interval map from gfn to attribute mask.

KVM keeps an xarray with one entry per gfn (kvm->mem_attr_array); runs of equal gfns are kept here
instead, so a terabyte costs as much as a page. A gfn that was never set holds 0: shared.
Attributes belong to the VM, not to slots: a range without a slot may be set, and a slot that is
deleted leaves them behind (kvm_vm_set_mem_attributes()).
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterator
from typing import Final, NamedTuple, Self

from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE, U64, KvmError

GFN_LIMIT: Final = U64 >> PAGE_SHIFT


class Run(NamedTuple):
    """Gfns [start, end) that all hold ``value``."""

    start: int
    end: int
    value: int


class _Request(NamedTuple):
    address: int
    size: int
    attributes: int
    flags: int
    supported: int


# kvm_vm_ioctl_set_mem_attributes(), in its order; each row is one refusal.
_CHECKS: Final[tuple[tuple[str, Callable[[_Request], bool]], ...]] = (
    ("flags must be 0", lambda r: r.flags != 0),
    ("an attribute is not supported", lambda r: bool(r.attributes & ~r.supported)),
    ("size is 0", lambda r: r.size == 0),
    ("address + size wraps", lambda r: r.address + r.size >= U64),
    ("address is not page-aligned", lambda r: bool(r.address % PAGE_SIZE)),
    ("size is not page-aligned", lambda r: bool(r.size % PAGE_SIZE)),
)


def check_request(
    operation: str, address: int, size: int, attributes: int, flags: int, *, supported: int
) -> tuple[int, int]:
    """The gfns [start, end) that a request names; KvmError(EINVAL) if it is refused.

    ``address`` and ``size`` are bytes, as in struct kvm_memory_attributes. The address and size
    rules are those of v7's KVM_MEMORY_ENCRYPT_REG_REGION as well.
    """
    request = _Request(address, size, attributes, flags, supported)
    for reason, refused in _CHECKS:
        if refused(request):
            raise KvmError(errno.EINVAL, operation, reason, start=address, size=size)
    return address >> PAGE_SHIFT, (address + size) >> PAGE_SHIFT


class Attributes:
    """The map. ``_starts`` are the first gfns of the runs, ascending from 0; neighbours differ."""

    __slots__ = ("_starts", "_values")

    def __init__(self) -> None:
        self._starts = [0]
        self._values = [0]

    def get(self, gfn: int) -> int:
        """The attributes of one gfn."""
        return self._values[bisect_right(self._starts, gfn) - 1]

    def run(self, gfn: int) -> Run:
        """The longest run of equal attributes around ``gfn``."""
        index = bisect_right(self._starts, gfn) - 1
        return Run(self._starts[index], self._end(index), self._values[index])

    def runs(self, start: int, end: int) -> Iterator[Run]:
        """The runs that cover gfns [start, end), clipped to it. Do not set while iterating."""
        _check_range(start, end)
        index = bisect_right(self._starts, start) - 1
        while start < end:
            stop = min(end, self._end(index))
            yield Run(start, stop, self._values[index])
            start = stop
            index += 1

    def uniform(self, start: int, end: int) -> bool:
        """Whether all gfns of [start, end) hold the same attributes."""
        _check_range(start, end)
        return end <= self.run(start).end

    def set(self, start: int, end: int, value: int) -> bool:
        """Give gfns [start, end) ``value``; False if they all had it already. All or nothing."""
        _check_range(start, end)
        around = self.run(start)
        if around.value == value and end <= around.end:
            return False
        first = bisect_left(self._starts, start)
        last = bisect_right(self._starts, end)
        after = self._values[last - 1]
        starts, values = [start], [value]
        if first and self._values[first - 1] == value:
            starts, values = [], []
        if end < GFN_LIMIT and after != value:
            starts.append(end)
            values.append(after)
        # In place: a map of many runs is not copied for each change. A list that cannot grow stays
        # as it is, and one that has can shrink again: a MemoryError leaves the map as it was.
        old = self._starts[first:last]
        self._starts[first:last] = starts
        try:
            self._values[first:last] = values
        except MemoryError:
            self._starts[first : first + len(starts)] = old
            raise
        return True

    def key(self) -> Hashable:
        """The whole state as a hashable value; equal maps have equal keys."""
        return (tuple(self._starts), tuple(self._values))

    def copy(self) -> Self:
        """An independent twin."""
        twin = type(self)()
        twin._starts, twin._values = self._starts.copy(), self._values.copy()
        return twin

    def _end(self, index: int) -> int:
        following = index + 1
        return self._starts[following] if following < len(self._starts) else GFN_LIMIT


def _check_range(start: int, end: int) -> None:
    if not 0 <= start < end <= GFN_LIMIT:
        raise ValueError(f"gfn range [{start:#x}, {end:#x}) is empty or outside the address space")
