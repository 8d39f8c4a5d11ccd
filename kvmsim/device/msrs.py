# SPDX-License-Identifier: GPL-2.0-or-later
"""Model-specific registers of a vCPU that its engine does not keep: values and what they accept.

Names and numbers: arch/x86/include/asm/msr-index.h; which ones KVM saves: msrs_to_save_base and
emulated_msrs_all of arch/x86/kvm/x86.c. Nothing here has an effect beyond keeping its value, but
for the time stamp counter and what is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from hwemu.cpu import msr as engine_msr
from kvmsim import pvclock
from kvmsim.device import machinecheck
from kvmsim.device.machinecheck import MachineCheck
from kvmsim.device.registers import APIC_BASE_BSP, APIC_BASE_RESET, Invalid, check_apic_base

MSR_IA32_TSC: Final = 0x10
MSR_IA32_APICBASE: Final = 0x1B
MSR_IA32_MISC_ENABLE: Final = 0x1A0
MSR_IA32_UCODE_REV: Final = 0x8B
MSR_MTRRCAP: Final = 0xFE
MSR_PLATFORM_INFO: Final = 0xCE
MSR_K7_HWCR: Final = 0xC001_0015

_U64: Final = 0xFFFF_FFFF_FFFF_FFFF
_PAT_RESET: Final = 0x0007_0406_0007_0406
_MTRR_TYPES: Final = frozenset((0, 1, 4, 5, 6))


@dataclass(frozen=True, slots=True)
class Msr:
    """``accepts`` judges what the guest writes, and user space if ``host`` does not.

    Of what is accepted only the bits of ``kept`` stay.
    """

    name: str
    reset: int = 0
    accepts: Callable[[int], bool] = lambda value: True
    host: Callable[[int], bool] | None = None
    kept: int = _U64

    @property
    def saved(self) -> bool:
        """Whether who saves and restores a guest gives it back: what nobody writes is not."""
        return (self.host or self.accepts) is not _never


def _bits(mask: int) -> Callable[[int], bool]:
    return lambda value: not value & ~mask


def _canonical(value: int) -> bool:
    return value >> 47 in (0, 0x1FFFF)


def _pat(value: int) -> bool:
    return all(byte in (0, 1, 4, 5, 6, 7) for byte in value.to_bytes(8, "little"))


def _apic_base(value: int) -> bool:
    try:
        check_apic_base(value)
    except Invalid:
        return False
    return True


def _mtrr_default(value: int) -> bool:
    return not value & ~0xCFF and value & 0xFF in _MTRR_TYPES


def _mtrr_fixed(value: int) -> bool:
    return all(byte in _MTRR_TYPES for byte in value.to_bytes(8, "little"))


def _mtrr_base(value: int) -> bool:
    return not value & ~0xFF_FFFF_F0FF and value & 0xFF in _MTRR_TYPES


def _never(value: int) -> bool:
    return False


def _always(value: int) -> bool:
    return True


_MTRR_FIXED: Final = (0x250, 0x258, 0x259, *range(0x268, 0x270))
_MTRR_PAIRS: Final = 8
_MC_STATUS_WR_EN: Final = 1 << 18
_HWCR_KEPT: Final = _MC_STATUS_WR_EN | 1 << 24  # and TscFreqSel
_HWCR_IGNORED: Final = 1 << 3 | 1 << 6 | 1 << 8  # TLB cache, flush filter, IGNNE

TABLE: Final[Mapping[int, Msr]] = MappingProxyType(
    {
        MSR_IA32_TSC: Msr("MSR_IA32_TSC"),
        MSR_IA32_APICBASE: Msr("MSR_IA32_APICBASE", APIC_BASE_RESET, _apic_base),
        MSR_IA32_UCODE_REV: Msr("MSR_IA32_UCODE_REV", 0x0100_0065, _always),
        pvclock.MSR_KVM_WALL_CLOCK: Msr("MSR_KVM_WALL_CLOCK"),
        pvclock.MSR_KVM_SYSTEM_TIME: Msr("MSR_KVM_SYSTEM_TIME"),
        pvclock.MSR_KVM_WALL_CLOCK_NEW: Msr("MSR_KVM_WALL_CLOCK_NEW"),
        pvclock.MSR_KVM_SYSTEM_TIME_NEW: Msr("MSR_KVM_SYSTEM_TIME_NEW"),
        MSR_PLATFORM_INFO: Msr("MSR_PLATFORM_INFO", 1 << 31, _never, _always),
        MSR_MTRRCAP: Msr("MSR_MTRRcap", 0x500 | _MTRR_PAIRS, _never),
        0x174: Msr("MSR_IA32_SYSENTER_CS"),
        0x175: Msr("MSR_IA32_SYSENTER_ESP", 0, _canonical),
        0x176: Msr("MSR_IA32_SYSENTER_EIP", 0, _canonical),
        MSR_IA32_MISC_ENABLE: Msr("MSR_IA32_MISC_ENABLE", 1, _bits(0xFFFF_FFFF), _always),
        **{
            0x200 + at: Msr(
                f"MSR_MTRRphys{'Mask' if at & 1 else 'Base'}{at // 2}",
                0,
                _bits(0xFF_FFFF_F800) if at & 1 else _mtrr_base,
            )
            for at in range(2 * _MTRR_PAIRS)
        },
        **{index: Msr(f"MSR_MTRRfix_{index:#x}", 0, _mtrr_fixed) for index in _MTRR_FIXED},
        0x277: Msr("MSR_IA32_CR_PAT", _PAT_RESET, _pat),
        0x2FF: Msr("MSR_MTRRdefType", 0, _mtrr_default),
        MSR_K7_HWCR: Msr("MSR_K7_HWCR", 0, _bits(_HWCR_KEPT | _HWCR_IGNORED), kept=_HWCR_KEPT),
    }
)

ENGINE: Final = (
    engine_msr.EFER,
    engine_msr.STAR,
    engine_msr.LSTAR,
    engine_msr.CSTAR,
    engine_msr.SFMASK,
    engine_msr.FS_BASE,
    engine_msr.GS_BASE,
    engine_msr.KERNEL_GS_BASE,
    engine_msr.TSC_AUX,
)
"""Those that the engine keeps."""

SAVED: Final = (
    *(index for index, msr in TABLE.items() if msr.saved),
    *machinecheck.SAVED,
    *ENGINE,
)
"""KVM_GET_MSR_INDEX_LIST: each takes its own value back by KVM_SET_MSRS."""

FEATURES: Final[Mapping[int, int]] = MappingProxyType(
    {MSR_IA32_UCODE_REV: TABLE[MSR_IA32_UCODE_REV].reset,
     MSR_PLATFORM_INFO: TABLE[MSR_PLATFORM_INFO].reset}
)  # fmt: skip
"""KVM_GET_MSR_FEATURE_INDEX_LIST, and what KVM_GET_MSRS of the system answers."""


class MsrStore:
    """The registers of one vCPU. ``tsc`` reads the host's time stamp counter.

    ``amd``: whether its guest's CPUID is AMD's (is_amd_compatible).
    """

    def __init__(
        self, tsc: Callable[[], int], *, bsp: bool, amd: Callable[[], bool] = lambda: False
    ) -> None:
        self._tsc = tsc
        self._tsc_offset = 0
        self._watched: dict[int, Callable[[int], None]] = {}
        self._values = {index: msr.reset for index, msr in TABLE.items()}
        self._values[MSR_IA32_APICBASE] |= APIC_BASE_BSP if bsp else 0
        self.machine_check = MachineCheck(
            lambda: amd() and bool(self._values[MSR_K7_HWCR] & _MC_STATUS_WR_EN)
        )

    def read(self, index: int, *, host: bool) -> int | None:
        """The value; None: there is no such register here."""
        if index in self.machine_check:
            return self.machine_check.read(index, host=host)
        if index == MSR_IA32_TSC:
            return self._tsc() + self._tsc_offset & _U64
        return self._values.get(index)

    def write(self, index: int, value: int, *, host: bool) -> bool:
        """Store; False if there is no such register or it does not accept the value."""
        if index in self.machine_check:
            return self.machine_check.write(index, value, host=host)
        msr = TABLE.get(index)
        if msr is None:
            return False
        accepts = msr.host if host and msr.host is not None else msr.accepts
        if not accepts(value):
            return False
        if index == MSR_IA32_TSC:
            self._tsc_offset = value - self._tsc()
        else:
            self._values[index] = value & msr.kept
        if index in self._watched:
            self._watched[index](value)
        return True

    def watch(self, index: int, written: Callable[[int], None]) -> None:
        """Have ``written`` called with each value that is stored, by whoever stores it."""
        self._watched[index] = written

    @property
    def apic_base(self) -> int:
        """MSR_IA32_APICBASE."""
        return self._values[MSR_IA32_APICBASE]

    @apic_base.setter
    def apic_base(self, value: int) -> None:
        self._values[MSR_IA32_APICBASE] = value
