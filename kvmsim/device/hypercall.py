# SPDX-License-Identifier: GPL-2.0-or-later
"""VMCALL and VMMCALL: what KVM answers itself and what it forwards.

____kvm_emulate_hypercall() of arch/x86/kvm/x86.c (v6.18), in its order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvmsim.exits import HypercallExit, map_gpa_ranges
from kvmsim.rangelist import MapGpaRange, list_size, unpack
from kvmsim.uapi import (
    KVM_EFAULT,
    KVM_EINVAL,
    KVM_ENOSYS,
    KVM_EPERM,
    KVM_HC_MAP_GPA_RANGE,
    KVM_HC_VAPIC_POLL_IRQ,
    KVMSIM_HC_MAP_GPA_RANGES,
)

FORWARDABLE: Final = 1 << KVM_HC_MAP_GPA_RANGE
"""KVM_EXIT_HYPERCALL_VALID_MASK: the argument that KVM_CAP_EXIT_HYPERCALL takes."""

_U64: Final = 0xFFFF_FFFF_FFFF_FFFF
_U32: Final = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Answer:
    """What RAX holds afterwards; the guest goes on."""

    value: int


@dataclass(frozen=True, slots=True)
class ReadList:
    """KVMSIM_HC_MAP_GPA_RANGES: ``size`` bytes at ``gpa`` are its list; then :func:`listed`."""

    gpa: int
    size: int


def hypercall(
    nr: int,
    args: tuple[int, ...],
    *,
    cpl: int,
    long_mode: bool,
    forwarded: int,
    batches: bool = False,
) -> Answer | HypercallExit | ReadList:
    """Answer, or forward to user space. ``forwarded`` is a bit per number that it wants;
    ``batches``: it takes lists of ranges, too (KVMSIM_CAP_MAP_GPA_RANGES).
    """
    mask = _U64 if long_mode else _U32
    nr &= mask
    gpa, npages, attributes = (arg & mask for arg in args[:3])
    if cpl:
        return Answer(-KVM_EPERM & _U64)
    if nr == KVM_HC_VAPIC_POLL_IRQ:
        return Answer(0)
    if nr == KVM_HC_MAP_GPA_RANGE and forwarded & 1 << KVM_HC_MAP_GPA_RANGE:
        if not MapGpaRange(gpa, npages, attributes).valid:
            return Answer(-KVM_EINVAL & _U64)
        return HypercallExit(nr, (gpa, npages, attributes))
    if nr == KVMSIM_HC_MAP_GPA_RANGES and batches:
        size = list_size(gpa, npages)
        return ReadList(gpa, size) if size else Answer(-KVM_EINVAL & _U64)
    return Answer(-KVM_ENOSYS & _U64)


def listed(data: bytes | None) -> Answer | HypercallExit:
    """Forward the list that a hypercall named, if every entry may be; None: it was not there."""
    if data is None:
        return Answer(-KVM_EFAULT & _U64)
    ranges = unpack(data)
    if not all(entry.valid for entry in ranges):
        return Answer(-KVM_EINVAL & _U64)
    return map_gpa_ranges(ranges)
