# SPDX-License-Identifier: GPL-2.0-or-later
"""The clock pages that a guest asks KVM for: what stands in them and by which MSRs.

arch/x86/include/asm/pvclock-abi.h, arch/x86/include/uapi/asm/kvm_para.h; how they are written:
kvm_setup_guest_pvclock() and kvm_write_wall_clock() of arch/x86/kvm/x86.c (v6.18). The guest reads
the version before and after, and again while it is odd.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

MSR_KVM_WALL_CLOCK: Final = 0x11
MSR_KVM_SYSTEM_TIME: Final = 0x12
MSR_KVM_WALL_CLOCK_NEW: Final = 0x4B56_4D00
MSR_KVM_SYSTEM_TIME_NEW: Final = 0x4B56_4D01
ENABLED: Final = 1 << 0
"""Of MSR_KVM_SYSTEM_TIME: the rest is the gpa."""

PVCLOCK_TSC_STABLE_BIT: Final = 1 << 0
PVCLOCK_GUEST_STOPPED: Final = 1 << 1

TIME_INFO: Final = Struct("<IIQQIbBxx")
"""struct pvclock_vcpu_time_info: version, pad, tsc_timestamp, system_time, mul, shift, flags."""

WALL_CLOCK: Final = Struct("<III")
"""struct pvclock_wall_clock: version, seconds, nanoseconds at which the system time was 0."""

_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Scale:
    """From ticks to nanoseconds: shift left (right if negative), times ``mul``, >> 32."""

    mul: int
    shift: int

    @classmethod
    def of(cls, tsc_khz: int) -> Scale:
        """kvm_get_time_scale(): the multiplier has its highest bit in use; ValueError if 0."""
        if tsc_khz <= 0:
            raise ValueError(f"a time stamp counter of {tsc_khz} kHz")
        hz, shift = tsc_khz * 1000, 0
        while _scaled(hz, shift) > 2 * _NS:
            shift -= 1
        while _scaled(hz, shift) <= _NS:
            shift += 1
        return cls((_NS << 32) // _scaled(hz, shift), shift)

    def nanoseconds(self, ticks: int) -> int:
        """What a guest makes of a difference of its counter (pvclock_scale_delta())."""
        return _scaled(ticks, self.shift) * self.mul >> 32


def _scaled(value: int, shift: int) -> int:
    return value << shift if shift >= 0 else value >> -shift


def next_version(version: int) -> int:
    """An even one that the guest has not seen, also where it left an odd one behind."""
    return (version | 1) + 1 & 0xFFFF_FFFF


def time_info(old: bytes, tsc: int, system_ns: int, scale: Scale, *, stopped: bool) -> bytes:
    """The next struct pvclock_vcpu_time_info after ``old``, 32 bytes.

    ``tsc`` is the guest's counter when its system time was ``system_ns``. That it was stopped
    stays told until the guest clears it.
    """
    version, *_, flags = TIME_INFO.unpack(old)
    kept = flags & PVCLOCK_GUEST_STOPPED
    flags = PVCLOCK_TSC_STABLE_BIT | kept | (PVCLOCK_GUEST_STOPPED if stopped else 0)
    return TIME_INFO.pack(
        next_version(version), 0, tsc, system_ns, scale.mul, scale.shift, flags
    )  # fmt: skip


def wall_clock(old: bytes, boot_ns: int) -> bytes:
    """The next struct pvclock_wall_clock after ``old``; ``boot_ns`` since 1970."""
    version, *_ = WALL_CLOCK.unpack(old)
    seconds, rest = divmod(boot_ns, _NS)
    return WALL_CLOCK.pack(next_version(version), seconds & 0xFFFF_FFFF, rest)
