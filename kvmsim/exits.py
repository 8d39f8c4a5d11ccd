# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a vCPU left guest code: one frozen value per exit, and its bytes in struct kvm_run.

An exit is what KVM_RUN hands to user space. :func:`encode` writes it into the shared mapping and
says what KVM_RUN returns; :func:`decode` reads it back as a VMM would. Layout: struct kvm_run in
include/uapi/linux/kvm.h; the numbers that v7 has otherwise come from :data:`kvmsim.uapi.ABIS`.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvmsim import rangelist
from kvmsim.rangelist import MapGpaRange
from kvmsim.uapi import (
    ABIS,
    KVM_EXIT_HLT,
    KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR,
    KVM_EXIT_IO,
    KVM_EXIT_IO_IN,
    KVM_EXIT_IO_OUT,
    KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    KVM_EXIT_UNKNOWN,
    KVM_PIO_DATA_OFFSET,
    KVM_RUN_EXIT_REASON_OFFSET,
    KVM_RUN_UNION_OFFSET,
    KVMSIM_HC_MAP_GPA_RANGES,
    KVMSIM_MAP_GPA_RANGES_MAX,
    MAP_GPA_RANGE,
    RUN_EXIT_REASON,
    RUN_HYPERCALL,
    RUN_INTERNAL,
    RUN_INTERNAL_DATA_MAX,
    RUN_IO,
    RUN_MMIO,
    RUN_SYSTEM_EVENT,
    Abi,
)


@dataclass(frozen=True, slots=True)
class IoExit:
    """Port I/O: ``count`` accesses of ``size`` bytes; ``data`` is what an OUT writes."""

    port: int
    size: int
    write: bool
    data: bytes = b""
    count: int = 1


@dataclass(frozen=True, slots=True)
class MmioExit:
    """An access of ``length`` bytes (1…8) to a gpa without memory; ``data`` is what it writes."""

    gpa: int
    length: int
    write: bool
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class HltExit:
    """The guest executed HLT and nothing is pending."""


@dataclass(frozen=True, slots=True)
class HypercallExit:
    """VMCALL/VMMCALL number ``nr``, forwarded to user space (KVM_CAP_EXIT_HYPERCALL).

    ``ranges`` is the list that goes with KVMSIM_HC_MAP_GPA_RANGES, whose arguments are its length
    and where it lies in struct kvm_run's mapping.
    """

    nr: int
    args: tuple[int, ...]
    ranges: tuple[MapGpaRange, ...] = ()


def map_gpa_ranges(ranges: Sequence[MapGpaRange]) -> HypercallExit:
    """The exit that asks for many conversions; answered by how many were done, or -errno."""
    args = (len(ranges), KVM_PIO_DATA_OFFSET)
    return HypercallExit(KVMSIM_HC_MAP_GPA_RANGES, args, tuple(ranges))


@dataclass(frozen=True, slots=True)
class MemoryFaultExit:
    """An access that user space must resolve: wrong type (a conversion) or no page to be had.

    ``gpa`` and ``size`` are page-aligned bytes, without the shared bit. ``errno`` is what KVM_RUN
    fails with; None (v7's conversion exits): it returns 0.
    """

    gpa: int
    size: int
    private: bool
    errno: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BadHvaExit:
    """Nothing behind the userspace side of a slot: KVM_RUN fails with EFAULT and says no more."""

    gpa: int


@dataclass(frozen=True, slots=True)
class ShutdownExit:
    """Triple fault."""


@dataclass(frozen=True, slots=True)
class InternalErrorExit:
    """KVM cannot go on: ``suberror`` is KVM_INTERNAL_ERROR_*, ``data`` up to 16 u64."""

    suberror: int
    data: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SystemEventExit:
    """The guest gives up, or asks for something that is of the whole machine.

    ``event`` is KVM_SYSTEM_EVENT_*; ``data`` up to 16 u64: of SEV_TERM the GHCB's request, of
    TDX_FATAL the registers of TDVMCALL<ReportFatalError>.
    """

    event: int
    data: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class InterruptedExit:
    """A signal, or immediate_exit: KVM_RUN fails with EINTR."""


Exit = (
    IoExit
    | MmioExit
    | HltExit
    | HypercallExit
    | MemoryFaultExit
    | BadHvaExit
    | ShutdownExit
    | InternalErrorExit
    | SystemEventExit
    | InterruptedExit
)

# Exits without a payload: exit_reason and what KVM_RUN returns.
_PLAIN: Final[dict[type[Exit], tuple[int, int]]] = {
    HltExit: (KVM_EXIT_HLT, 0),
    ShutdownExit: (KVM_EXIT_SHUTDOWN, 0),
    InterruptedExit: (KVM_EXIT_INTR, -errno.EINTR),
    BadHvaExit: (KVM_EXIT_UNKNOWN, -errno.EFAULT),
}


def encode(exit: Exit, run: bytearray | memoryview, abi: Abi = "upstream") -> int:
    """Write ``exit`` into ``run`` (KVM_RUN_MMAP_SIZE bytes); return KVM_RUN's 0 or -errno.

    ValueError if a field does not fit its place; ``run`` is then unchanged but for PIO data.
    """
    numbers = ABIS[abi]
    result = 0
    payload = b""
    match exit:
        case IoExit(port, size, write, data, count):
            if size not in (1, 2, 4) or (write and len(data) != size * count):
                raise ValueError(f"{exit}: data must be count × size bytes, size 1, 2 or 4")
            # What an IN finds if nobody answers is 0 (emulator_pio_in_out()).
            shown = data if write else bytes(size * count)
            run[KVM_PIO_DATA_OFFSET : KVM_PIO_DATA_OFFSET + len(shown)] = shown
            reason = KVM_EXIT_IO
            direction = KVM_EXIT_IO_OUT if write else KVM_EXIT_IO_IN
            payload = RUN_IO.pack(direction, size, port, count, KVM_PIO_DATA_OFFSET)
        case MmioExit(gpa, length, write, data):
            if not 1 <= length <= 8 or (write and len(data) != length):
                raise ValueError(f"{exit}: length must be 1 to 8 and that of the data")
            reason = KVM_EXIT_MMIO
            payload = RUN_MMIO.pack(gpa, data, length, write)
        case HypercallExit(nr, args, ranges):
            if len(args) > 6 or len(ranges) > KVMSIM_MAP_GPA_RANGES_MAX:
                raise ValueError(f"{exit}: at most 6 arguments and a page of ranges")
            if ranges:
                shown = rangelist.pack(ranges)
                run[KVM_PIO_DATA_OFFSET : KVM_PIO_DATA_OFFSET + len(shown)] = shown
            reason = KVM_EXIT_HYPERCALL
            payload = RUN_HYPERCALL.pack(nr, *args, *[0] * (6 - len(args)), 0, 0)
        case MemoryFaultExit(gpa, size, private, number):
            reason = numbers.exit_memory_fault
            flags = numbers.memory_fault_private if private else 0
            payload = numbers.memory_fault.pack(flags, gpa, size)
            result = -(number or 0)
        case InternalErrorExit(first, values) | SystemEventExit(first, values):
            if len(values) > RUN_INTERNAL_DATA_MAX:
                raise ValueError(f"{exit}: at most {RUN_INTERNAL_DATA_MAX} words")
            of_system = isinstance(exit, SystemEventExit)
            reason = KVM_EXIT_SYSTEM_EVENT if of_system else KVM_EXIT_INTERNAL_ERROR
            head = RUN_SYSTEM_EVENT if of_system else RUN_INTERNAL
            payload = head.pack(first, len(values)) + struct.pack(f"<{len(values)}Q", *values)
        case _:
            reason, result = _PLAIN[type(exit)]
    RUN_EXIT_REASON.pack_into(run, KVM_RUN_EXIT_REASON_OFFSET, reason)
    run[KVM_RUN_UNION_OFFSET : KVM_RUN_UNION_OFFSET + len(payload)] = payload
    return result


def decode(run: bytes | bytearray | memoryview, result: int, abi: Abi = "upstream") -> Exit:
    """The exit that ``run`` and KVM_RUN's ``result`` (0 or -errno) tell of.

    ValueError if they tell of none. What the bytes do not carry (a reason, a gpa) stays empty.
    """
    numbers = ABIS[abi]
    at = KVM_RUN_UNION_OFFSET
    (reason,) = RUN_EXIT_REASON.unpack_from(run, KVM_RUN_EXIT_REASON_OFFSET)
    if reason == numbers.exit_memory_fault:
        flags, gpa, size = numbers.memory_fault.unpack_from(run, at)
        private = bool(flags & numbers.memory_fault_private)
        return MemoryFaultExit(gpa, size, private, -result or None)
    for plain, told in _PLAIN.items():
        if told == (reason, result):
            return BadHvaExit(0) if plain is BadHvaExit else plain()  # type: ignore[call-arg]
    if result == 0 and reason == KVM_EXIT_IO:
        direction, size, port, count, offset = RUN_IO.unpack_from(run, at)
        write = direction == KVM_EXIT_IO_OUT
        data = bytes(run[offset : offset + size * count]) if write else b""
        return IoExit(port, size, write, data, count)
    if result == 0 and reason == KVM_EXIT_MMIO:
        gpa, data, length, is_write = RUN_MMIO.unpack_from(run, at)
        return MmioExit(gpa, length, bool(is_write), data[:length] if is_write else b"")
    if result == 0 and reason == KVM_EXIT_HYPERCALL:
        nr, *rest = RUN_HYPERCALL.unpack_from(run, at)
        if nr == KVMSIM_HC_MAP_GPA_RANGES:
            count, first = rest[:2]
            listed = bytes(run[first : first + count * MAP_GPA_RANGE.size])
            return map_gpa_ranges(rangelist.unpack(listed))
        return HypercallExit(nr, tuple(rest[:6]))
    if result == 0 and reason == KVM_EXIT_INTERNAL_ERROR:
        suberror, ndata = RUN_INTERNAL.unpack_from(run, at)
        values = struct.unpack_from(f"<{ndata}Q", run, at + RUN_INTERNAL.size)
        return InternalErrorExit(suberror, values)
    if result == 0 and reason == KVM_EXIT_SYSTEM_EVENT:
        event, ndata = RUN_SYSTEM_EVENT.unpack_from(run, at)
        values = struct.unpack_from(f"<{ndata}Q", run, at + RUN_SYSTEM_EVENT.size)
        return SystemEventExit(event, values)
    raise ValueError(f"exit_reason {reason} with result {result}: no such exit in {abi}")
