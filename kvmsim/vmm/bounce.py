# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk behind bounce buffers: a ring of descriptors in shared memory, as virtio has it.

A device reaches shared pages only, so a guest copies what goes out to shared pages first. The
guest writes the ring's gfn to the doorbell; everything available is done before the write returns.
A ring that makes no sense is refused as a whole and not touched; a descriptor that makes none gets
its error as its status, and neither memory nor disk is touched for it. Everything is read once,
since the guest's other vCPUs may write at any time.

The same layout stands in scripts/guests/kernel/common/bounce.h (compared by a test).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import Final, Protocol

from kvmsim.uapi import KvmError
from kvmsim.vmm.bootparams import GPA_LIMIT, PAGE_SIZE

MAGIC: Final = int.from_bytes(b"BNCE", "little")
ENTRIES: Final = 64
DESCRIPTORS_OFFSET: Final = 64
SECTOR: Final = 512
DOORBELL, RESULT = 0, 4
"""Offsets of the two registers, of 4 bytes each, from the device's port."""
PENDING: Final = 0xFFFF
"""What a guest writes as the status of what it offers; the device only overwrites it."""

HEADER: Final = struct.Struct("<IHHHH")
"""magic, entries, available, used, reserved."""
DESCRIPTOR: Final = struct.Struct("<QQIHHQ")
"""gpa, sector, length, operation, status, reserved."""
USED_OFFSET: Final = 8
STATUS_OFFSET: Final = 22
_INDEX: Final = 1 << 16


class Operation(IntEnum):
    """descriptor.operation."""

    READ = 0
    """Disk to memory."""
    WRITE = 1
    """Memory to disk."""


class Status(IntEnum):
    """What the device answers: of a descriptor, and of a ring (OK or BAD_RING)."""

    OK = 0
    IOERR = 1
    UNSUPPORTED = 2
    BAD_RING = 3
    BAD_ADDRESS = 4
    BAD_LENGTH = 5
    BAD_SECTOR = 6


class Disk(Protocol):
    """Sectors of 512 bytes. Reads and writes are within [0, sectors); they may raise OSError."""

    @property
    def sectors(self) -> int:
        """How many there are."""
        ...

    def read(self, sector: int, count: int) -> bytes:
        """``count`` sectors from ``sector`` on."""
        ...

    def write(self, sector: int, data: bytes) -> None:
        """Store whole sectors from ``sector`` on."""
        ...


class SharedMemory(Protocol):
    """Guest memory as a device sees it; bytes. Reads and writes may raise KvmError or OSError."""

    def is_shared(self, gpa: int, size: int) -> bool:
        """Whether all of [gpa, gpa + size) is RAM, and shared now."""
        ...

    def read_shared(self, gpa: int, length: int) -> bytes:
        """Read."""
        ...

    def write_shared(self, gpa: int, data: bytes) -> None:
        """Write."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """A descriptor as it was read."""

    gpa: int
    sector: int
    length: int
    operation: int


@dataclass(slots=True)
class BounceStatistics:
    """What the device did: descriptors by their answer, rings refused, bytes moved."""

    answers: dict[Status, int] = field(default_factory=lambda: dict.fromkeys(Status, 0))
    bad_rings: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


# What a descriptor must fulfil, in this order; each row is one refusal.
CHECKS: Final[Mapping[Status, Callable[[Request, Disk, SharedMemory], bool]]] = MappingProxyType(
    {
        Status.UNSUPPORTED: lambda r, d, m: r.operation in tuple(Operation),
        Status.BAD_LENGTH: lambda r, d, m: r.length > 0 and r.length % SECTOR == 0,
        Status.BAD_ADDRESS: lambda r, d, m: (
            r.gpa + r.length <= GPA_LIMIT and m.is_shared(r.gpa, r.length)
        ),
        Status.BAD_SECTOR: lambda r, d, m: r.sector + r.length // SECTOR <= d.sectors,
    }
)


class BounceDevice:
    """The device. ``result`` is what its second register reads: the answer to the last ring."""

    __slots__ = ("_disk", "_memory", "result", "statistics")

    def __init__(self, disk: Disk, memory: SharedMemory) -> None:
        self._disk = disk
        self._memory = memory
        self.result = Status.OK
        self.statistics = BounceStatistics()

    def ring(self, gfn: int) -> Status:
        """The doorbell: do what the ring in page ``gfn`` offers; the ring's answer."""
        try:
            self.result = self._run(gfn * PAGE_SIZE)
        except (KvmError, OSError):  # the ring's own page went away
            self.result = Status.BAD_RING
        self.statistics.bad_rings += self.result is Status.BAD_RING
        return self.result

    def _run(self, ring: int) -> Status:
        memory = self._memory
        if ring + PAGE_SIZE > GPA_LIMIT or not memory.is_shared(ring, PAGE_SIZE):
            return Status.BAD_RING
        magic, entries, available, used, _ = HEADER.unpack(memory.read_shared(ring, HEADER.size))
        offered = (available - used) % _INDEX
        if magic != MAGIC or entries != ENTRIES or offered > ENTRIES:
            return Status.BAD_RING
        for index in range(used, used + offered):
            at = ring + DESCRIPTORS_OFFSET + index % ENTRIES * DESCRIPTOR.size
            fields = DESCRIPTOR.unpack(memory.read_shared(at, DESCRIPTOR.size))
            status = self._serve(Request(*fields[:4]))
            self.statistics.answers[status] += 1
            memory.write_shared(at + STATUS_OFFSET, struct.pack("<H", status))
        memory.write_shared(ring + USED_OFFSET, struct.pack("<H", available))
        return Status.OK

    def _serve(self, request: Request) -> Status:
        for status, fulfilled in CHECKS.items():
            if not fulfilled(request, self._disk, self._memory):
                return status
        try:
            if request.operation == Operation.WRITE:
                data = self._memory.read_shared(request.gpa, request.length)
                self._disk.write(request.sector, data)
                self.statistics.written_bytes += request.length
            else:
                data = self._disk.read(request.sector, request.length // SECTOR)
                self._memory.write_shared(request.gpa, data)
                self.statistics.read_bytes += request.length
        except KvmError:
            return Status.BAD_ADDRESS
        except OSError:
            return Status.IOERR
        return Status.OK
