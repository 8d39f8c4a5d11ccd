# SPDX-License-Identifier: GPL-2.0-or-later
"""CPUID as KVM hands it out and takes it back (arch/x86/kvm/cpuid.c).

What is supported is what the engine's processor has; what the guest sees is what user space sets,
and zeros before.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hwemu.cpu.cpuid import DEFAULT, Leaf
from kvmsim.uapi import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, structs

_KVM_SIGNATURE: Final = struct.unpack("<III", b"KVMKVMKVM\0\0\0")
_AMD_COMPATIBLE: Final = frozenset(
    (ebx, ecx, edx)
    for ebx, edx, ecx in map(struct.Struct("<III").unpack, (b"AuthenticAMD", b"HygonGenuine"))
)
_KVM_BASE: Final = 0x4000_0000
_KVM_FEATURES: Final = _KVM_BASE + 1
KVM_FEATURE_CLOCKSOURCE: Final = 1 << 0
KVM_FEATURE_NOP_IO_DELAY: Final = 1 << 1
KVM_FEATURE_CLOCKSOURCE2: Final = 1 << 3
KVM_FEATURE_CLOCKSOURCE_STABLE_BIT: Final = 1 << 24
_FEATURES: Final = (
    KVM_FEATURE_CLOCKSOURCE | KVM_FEATURE_NOP_IO_DELAY | KVM_FEATURE_CLOCKSOURCE2
    | KVM_FEATURE_CLOCKSOURCE_STABLE_BIT
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """Struct kvm_cpuid_entry2."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0

    @property
    def answer(self) -> Leaf:
        """What the guest sees."""
        return self.eax, self.ebx, self.ecx, self.edx

    def pack(self) -> bytes:
        """As the structure."""
        return structs.CPUID_ENTRY2.pack(self.function, self.index, self.flags, *self.answer)


def _supported() -> tuple[Entry, ...]:
    leaves = {
        **DEFAULT,
        _KVM_BASE: (_KVM_FEATURES, *_KVM_SIGNATURE),
        _KVM_FEATURES: (_FEATURES, 0, 0, 0),
    }
    return tuple(
        Entry(function, 0, 0, eax, ebx, ecx, edx)
        for function, (eax, ebx, ecx, edx) in sorted(leaves.items())
    )


SUPPORTED: Final = _supported()
"""KVM_GET_SUPPORTED_CPUID."""

EMULATED: Final = ()
"""KVM_GET_EMULATED_CPUID: nothing is emulated that the processor does not have."""


def unpack_entries(data: bytes) -> tuple[Entry, ...]:
    """An array of struct kvm_cpuid_entry2."""
    return tuple(Entry(*fields) for fields in structs.CPUID_ENTRY2.iter_unpack(data))


def unpack_old_entries(data: bytes) -> tuple[Entry, ...]:
    """An array of struct kvm_cpuid_entry (KVM_SET_CPUID), which knows no index."""
    return tuple(
        Entry(function, 0, 0, *registers)
        for function, *registers in structs.CPUID_ENTRY.iter_unpack(data)
    )


class GuestCpuid:
    """What one vCPU's guest sees; callable as the engine asks."""

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self.entries = tuple(entries)
        self._first: dict[int, Entry] = {}
        self._exact: dict[tuple[int, int], Entry] = {}
        for entry in reversed(self.entries):
            if entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX:
                self._exact[entry.function, entry.index] = entry
            else:
                self._first[entry.function] = entry

    def __call__(self, leaf: int, subleaf: int) -> Leaf:
        """cpuid_entry2_find(); what is not there is zero, as on AMD."""
        entry = self._first.get(leaf) or self._exact.get((leaf, subleaf))
        return entry.answer if entry else (0, 0, 0, 0)

    @property
    def amd_compatible(self) -> bool:
        """guest_cpuid_is_amd_or_hygon()."""
        _, *vendor = self(0, 0)
        return tuple(vendor) in _AMD_COMPATIBLE
