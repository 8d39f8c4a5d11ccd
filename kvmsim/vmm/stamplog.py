# SPDX-License-Identifier: GPL-2.0-or-later
"""The stamp log: watch a guest's private pages for reads of memory that was punched away.

The guest writes stamps into private pages and, before each, judges what it reads back. The host
brackets each punch with :meth:`StampLog.begin_punch` and :meth:`StampLog.end_punch`. docs/guest.md
has the protocol; scripts/guests/kernel/common/stamplog.h the same layout (compared by a test).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from types import MappingProxyType
from typing import Final, Protocol, Self

from kvmsim.vmm.loader import LOG_GPA

STAMP_MAGIC: Final = int.from_bytes(b"STAMPLOG", "little")
STAMP_WINDOW: Final = 16384
STAMP_RING: Final = 256
STAMP_VCPUS: Final = 0x1000
STAMP_EPOCHS: Final = 0x10000
STAMP_RINGS: Final = 0x40000
STAMP_LOG_SIZE: Final = 0x80000

_HEADER: Final = struct.Struct("<QIIQQ")
_EPOCH: Final = struct.Struct("<II")
_RECORD: Final = struct.Struct("<QQQIIIIIIII8x")
_COUNTERS: Final = struct.Struct("<13Q")
_FIRST_BAD: Final = 16 * 8
_VCPU_SIZE: Final[int] = _FIRST_BAD + _RECORD.size

LAYOUT: Final[Mapping[str, int]] = MappingProxyType(
    {
        "header": _HEADER.size,
        "epoch": _EPOCH.size,
        "record": _RECORD.size,
        "vcpu": _VCPU_SIZE,
        "first_bad": _FIRST_BAD,
    }
)
"""Sizes of the structs and the offset of stamp_vcpu.first_bad, for the comparison with C."""


class SharedMemory(Protocol):
    """The shared side of the guest's memory."""

    def read_shared(self, gpa: int, length: int) -> bytes:
        """Bytes at a gpa."""
        ...

    def write_shared(self, gpa: int, data: bytes) -> None:
        """Write bytes; an aligned 4-byte write must not be torn."""
        ...


class Verdict(IntEnum):
    """What the guest thinks of a value that it read."""

    FRESH = 0
    SAME = 1
    PUNCHED = 2
    STALE = 3
    LOST = 4
    MISMATCH = 5

    @property
    def bad(self) -> bool:
        """Whether the value should have been impossible."""
        return self >= Verdict.STALE


class RecordFlag(IntFlag):
    """stamp_record.flags."""

    KNOWN = 1
    WINDOWED = 2


class StampLogError(ValueError):
    """The memory holds no stamp log of this version, or a range is outside its window."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """The fields of a stamp word."""

    gfn: int
    vcpu: int
    epoch: int
    generation: int

    @classmethod
    def unpack(cls, value: int) -> Self:
        """Split a word; gfn, epoch and generation have 20 bits each, the vCPU 4."""
        return cls(value & 0xFFFFF, value >> 20 & 0xF, value >> 24 & 0xFFFFF, value >> 44)


@dataclass(frozen=True, slots=True)
class Record:
    """One read: what came, what was expected, and the page's epochs around it."""

    seq: int
    value: int
    expect: int
    page: int
    begin: int
    done: int
    expect_epoch: int
    flags: RecordFlag
    verdict: Verdict
    generation: int
    vcpu: int

    def judged(self) -> Verdict:
        """The verdict that follows from the other fields, independently of the guest's."""
        if not self.flags & RecordFlag.KNOWN:
            return Verdict.FRESH
        if self.value == self.expect:
            stale = self.value != 0 and self.expect_epoch < self.done
            return Verdict.STALE if stale else Verdict.SAME
        if self.value != 0:
            return Verdict.MISMATCH
        erasable = self.begin > self.expect_epoch or bool(self.flags & RecordFlag.WINDOWED)
        return Verdict.PUNCHED if erasable else Verdict.LOST


@dataclass(frozen=True, slots=True)
class StampStats:
    """struct stamp_vcpu's counters; see its comments."""

    loops: int
    reads: int
    writes: int
    zeros: int
    punched: int
    decisive: int
    windowed: int
    skipped: int
    busy: int
    stale: int
    lost: int
    mismatches: int
    head: int

    @property
    def bad(self) -> int:
        """Reads that should have been impossible."""
        return self.stale + self.lost + self.mismatches


class StampLog:
    """The host's end of the log. StampLogError unless a guest has set it up."""

    def __init__(self, memory: SharedMemory, gpa: int = LOG_GPA) -> None:
        self._memory = memory
        self._gpa = gpa
        self._begun: dict[int, int] = {}
        fields: tuple[int, ...] = _HEADER.unpack(memory.read_shared(gpa, _HEADER.size))
        magic, self.vcpus, ring, self.window_gfn, self.window_pages = fields
        if magic != STAMP_MAGIC or ring != STAMP_RING:
            raise StampLogError(f"no stamp log at gpa {gpa:#x}: boot the guest kernel first")

    def begin_punch(self, gfn: int, npages: int) -> None:
        """Say that gfns [gfn, gfn + npages) are about to be punched. Before every punch.

        Punches that overlap must not run at the same time.
        """
        first = self._first(gfn, npages)
        epochs = self._epochs(first, npages)
        for page, (begin, _) in enumerate(epochs, first):
            self._begun[page] = begin + 1
            self._memory.write_shared(self._epoch_gpa(page), struct.pack("<I", begin + 1))

    def end_punch(self, gfn: int, npages: int) -> None:
        """Say that the punch returned success. A punch that failed is not ended."""
        first = self._first(gfn, npages)
        for page in range(first, first + npages):
            if page not in self._begun:
                raise StampLogError(f"end of a punch of gfn {gfn:#x} that was not begun")
        for page in range(first, first + npages):
            begin = self._begun.pop(page)
            self._memory.write_shared(self._epoch_gpa(page) + 4, struct.pack("<I", begin))

    def stats(self, vcpu: int) -> StampStats:
        """A vCPU's counters now; the guest may be changing them."""
        return StampStats(
            *_COUNTERS.unpack(self._memory.read_shared(self._vcpu_gpa(vcpu), _COUNTERS.size))
        )

    def first_bad(self, vcpu: int) -> Record | None:
        """The first read that should have been impossible."""
        return self._record(self._vcpu_gpa(vcpu) + _FIRST_BAD)

    def latest(self, vcpu: int) -> Record | None:
        """The newest record of a vCPU: the page that it read last."""
        head = self.stats(vcpu).head
        return self._record(self._slot_gpa(vcpu, head % STAMP_RING)) if head else None

    def records(self, vcpu: int, after: int = 0) -> list[Record]:
        """The records newer than seq ``after`` that are still in the ring, oldest first."""
        self._vcpu_gpa(vcpu)
        found = []
        for slot in range(STAMP_RING):
            record = self._record(self._slot_gpa(vcpu, slot))
            if record is not None and record.seq > after:
                found.append(record)
        return sorted(found, key=lambda record: record.seq)

    # --- inside --------------------------------------------------------------------------

    def _slot_gpa(self, vcpu: int, slot: int) -> int:
        return self._gpa + STAMP_RINGS + (vcpu * STAMP_RING + slot) * _RECORD.size

    def _record(self, gpa: int) -> Record | None:
        """The record at a gpa; None if empty or if it changes while it is read."""
        seq, *rest = _RECORD.unpack(self._memory.read_shared(gpa, _RECORD.size))
        (again,) = struct.unpack("<Q", self._memory.read_shared(gpa, 8))
        if seq == 0 or again != seq:
            return None
        value, expect, page, begin, done, epoch, flags, verdict, generation, vcpu = rest
        return Record(
            seq,
            value,
            expect,
            page,
            begin,
            done,
            epoch,
            RecordFlag(flags),
            Verdict(verdict),
            generation,
            vcpu,
        )

    def _first(self, gfn: int, npages: int) -> int:
        first = gfn - self.window_gfn
        if npages <= 0 or first < 0 or first + npages > self.window_pages:
            raise StampLogError(
                f"gfns {gfn:#x}+{npages:#x} are outside the stamp window "
                f"{self.window_gfn:#x}+{self.window_pages:#x}: move it with the command window"
            )
        return first

    def _epoch_gpa(self, page: int) -> int:
        return self._gpa + STAMP_EPOCHS + page * _EPOCH.size

    def _epochs(self, first: int, npages: int) -> list[tuple[int, int]]:
        data = self._memory.read_shared(self._epoch_gpa(first), npages * _EPOCH.size)
        return list(_EPOCH.iter_unpack(data))

    def _vcpu_gpa(self, vcpu: int) -> int:
        if not 0 <= vcpu < self.vcpus:
            raise StampLogError(f"no vcpu {vcpu}: the guest has {self.vcpus}")
        return self._gpa + STAMP_VCPUS + vcpu * _VCPU_SIZE
