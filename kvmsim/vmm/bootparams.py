# SPDX-License-Identifier: GPL-2.0-or-later
"""The boot-parameter page: what the VMM tells the guest kernel.

The same layout stands in scripts/guests/kernel/common/bootparams.h; a test compiles that header
and compares every offset and constant.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from types import MappingProxyType
from typing import Final

BOOT_MAGIC: Final = int.from_bytes(b"KVMSIMBP", "little")
BOOT_VERSION: Final = 2
MAX_RAM_RANGES: Final = 16
MAX_VCPUS: Final = 16
MAX_MEASURED: Final = 8
RAM_PRIVATE_CAPABLE: Final = 0x1

PAGE_SIZE: Final = 4096
GPA_LIMIT: Final = 1 << 39
"""Guest-physical addresses lie below the bit that says which side of a gfn is meant."""
SIDE_BIT: Final = 39
"""That bit: shared where it is set (TDX, shared-bit), private where it is set (SNP's C-bit)."""
UNIT_SIZE: Final = 2 << 20
"""Memory is accepted by units of this size, as in UEFI's table of unaccepted memory."""


class BootFlag(IntFlag):
    """boot_params.flags."""

    NONE = 0
    SELFTEST = 0x1
    """Run the memory self-test before the first prompt."""
    ECHO = 0x2
    """Echo console input, for a terminal in raw mode."""
    EAGER = 0x4
    """Accept all private memory before the first prompt; else on first use, by 2 MiB."""


class Hypercall(IntEnum):
    """boot_params.hypercall: which instruction calls the host."""

    VMMCALL = 1
    VMCALL = 2


class Technology(IntEnum):
    """boot_params.technology: what makes memory private, and how the guest calls its host."""

    SHARED_BIT = 0
    SW_PROTECTED = 1
    TDX = 2
    SNP = 3
    PKVM = 4

    @property
    def kind(self) -> str:
        """The kind's name in :data:`kvmsim.kind.KINDS`."""
        return self.name.lower().replace("_", "-")

    @property
    def confidential(self) -> bool:
        """Whether a guest starts in private memory that is loaded before it runs."""
        return self in (Technology.TDX, Technology.SNP, Technology.PKVM)

    @property
    def accepts(self) -> bool:
        """Whether the guest accepts private memory before it uses it."""
        return self in (Technology.TDX, Technology.SNP)

    @property
    def shared_bit(self) -> int:
        """The page-table bit of the shared side, 0 if none."""
        return SIDE_BIT if self in (Technology.SHARED_BIT, Technology.TDX) else 0

    @property
    def private_bit(self) -> int:
        """The page-table bit of encrypted pages, 0 if none."""
        return SIDE_BIT if self is Technology.SNP else 0

    @property
    def hypercall(self) -> Hypercall:
        """The instruction of KVM's hypercalls (TDX and SNP have their own ways)."""
        return Hypercall.VMCALL if self is Technology.PKVM else Hypercall.VMMCALL


@dataclass(frozen=True, slots=True)
class RamRange:
    """Guest RAM in bytes, page-aligned; ``private``: its memslot has a private side."""

    gpa: int
    size: int
    private: bool = True

    def __post_init__(self) -> None:
        if self.gpa % PAGE_SIZE or self.size % PAGE_SIZE or self.gpa < 0 or self.size <= 0:
            raise ValueError(
                f"RAM range {self.gpa:#x}+{self.size:#x}: both must be multiples of 4096, "
                "the size not 0"
            )
        if self.end > GPA_LIMIT:
            raise ValueError(f"RAM range {self.gpa:#x}+{self.size:#x} does not end below 2^39")

    @property
    def end(self) -> int:
        """First byte behind the range."""
        return self.gpa + self.size


FIELDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "magic": "Q",
        "version": "I",
        "size": "I",
        "vcpus": "I",
        "shared_bit": "I",
        "hypercall": "I",
        "console_port": "H",
        "exit_port": "H",
        "flags": "Q",
        "low_size": "Q",
        "log_gpa": "Q",
        "log_size": "Q",
        "ram_count": "I",
        "technology": "I",
        "private_bit": "I",
        "bounce_port": "H",
        "reserved": "H",
        "ghcb_gpa": "Q",
        "bounce_gpa": "Q",
        "bounce_size": "Q",
        "secrets_gpa": "Q",
        "cpuid_gpa": "Q",
        "measured_count": "I",
        "reserved2": "I",
    }
)
"""struct boot_params without its arrays, in order: name and struct code, no padding."""

_HEAD: Final = struct.Struct("<" + "".join(FIELDS.values()))
_RANGE: Final = struct.Struct("<QQII")
_MEASURED: Final = struct.Struct("<QQ")
MEASURED_OFFSET: Final = _HEAD.size
RAM_OFFSET: Final = MEASURED_OFFSET + MAX_MEASURED * _MEASURED.size
BOOT_PARAMS_SIZE: Final = RAM_OFFSET + MAX_RAM_RANGES * _RANGE.size


def field_offset(name: str) -> int:
    """Byte offset of a field of :data:`FIELDS`; KeyError for any other name."""
    offset = 0
    for field, code in FIELDS.items():
        if field == name:
            return offset
        offset += struct.calcsize("<" + code)
    raise KeyError(name)


@dataclass(frozen=True, slots=True)
class BootParams:
    """One boot-parameter page. Sizes and addresses in bytes."""

    ram: tuple[RamRange, ...]
    vcpus: int
    low_size: int
    log_gpa: int
    log_size: int
    flags: BootFlag = BootFlag.NONE
    hypercall: Hypercall = Hypercall.VMMCALL
    console_port: int = 0x3F8
    exit_port: int = 0xF4
    shared_bit: int = SIDE_BIT
    technology: Technology = Technology.SHARED_BIT
    private_bit: int = 0
    bounce_port: int = 0x520
    ghcb_gpa: int = 0
    bounce_gpa: int = 0
    bounce_size: int = 0
    secrets_gpa: int = 0
    cpuid_gpa: int = 0
    measured: tuple[tuple[int, int], ...] = ()
    """(gpa, size) above low memory that is loaded before the guest runs, and so accepted."""

    def __post_init__(self) -> None:
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise ValueError(f"{self.vcpus} vCPUs: the guest kernel takes 1 to {MAX_VCPUS}")
        if not 1 <= len(self.ram) <= MAX_RAM_RANGES:
            raise ValueError(f"{len(self.ram)} RAM ranges: 1 to {MAX_RAM_RANGES} have room")
        for lower, upper in zip(self.ram, self.ram[1:], strict=False):
            if upper.gpa < lower.end:
                raise ValueError(f"RAM ranges {lower} and {upper} overlap or are out of order")
        if len(self.measured) > MAX_MEASURED:
            raise ValueError(f"{len(self.measured)} measured ranges: {MAX_MEASURED} have room")
        for r in self.ram:
            if self.technology.accepts and r.private and (r.gpa % UNIT_SIZE or r.size % UNIT_SIZE):
                raise ValueError(
                    f"RAM range {r.gpa:#x}+{r.size:#x}: a {self.technology.kind} guest accepts "
                    "memory by 2 MiB, so private ranges must begin and end there"
                )

    def pack(self) -> bytes:
        """The bytes of struct boot_params."""
        head = _HEAD.pack(
            BOOT_MAGIC,
            BOOT_VERSION,
            BOOT_PARAMS_SIZE,
            self.vcpus,
            self.shared_bit,
            self.hypercall,
            self.console_port,
            self.exit_port,
            self.flags,
            self.low_size,
            self.log_gpa,
            self.log_size,
            len(self.ram),
            self.technology,
            self.private_bit,
            self.bounce_port,
            0,
            self.ghcb_gpa,
            self.bounce_gpa,
            self.bounce_size,
            self.secrets_gpa,
            self.cpuid_gpa,
            len(self.measured),
            0,
        )
        measured = b"".join(_MEASURED.pack(gpa, size) for gpa, size in self.measured)
        ranges = b"".join(
            _RANGE.pack(r.gpa, r.size, RAM_PRIVATE_CAPABLE if r.private else 0, 0) for r in self.ram
        )
        return ((head + measured).ljust(RAM_OFFSET, b"\0") + ranges).ljust(BOOT_PARAMS_SIZE, b"\0")
