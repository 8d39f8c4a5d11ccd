# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine-check registers of a vCPU: a global set, and banks as KVM_X86_SETUP_MCE made them.

set_msr_mce(), get_msr_mce() and kvm_vcpu_ioctl_x86_setup_mce() of arch/x86/kvm/x86.c (v6.18). No
machine check is ever raised: the registers keep what is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvmsim.uapi import KVM_MAX_MCE_BANKS

MSR_IA32_P5_MC_ADDR: Final = 0x0
MSR_IA32_P5_MC_TYPE: Final = 0x1
MSR_IA32_MCG_CAP: Final = 0x179
MSR_IA32_MCG_STATUS: Final = 0x17A
MSR_IA32_MCG_CTL: Final = 0x17B
MSR_IA32_MC0_CTL2: Final = 0x280
MSR_IA32_MC0_CTL: Final = 0x400

MCG_CTL_P: Final = 1 << 8
MCG_SER_P: Final = 1 << 24
SUPPORTED: Final = MCG_CTL_P | MCG_SER_P
"""KVM_X86_GET_MCE_CAP_SUPPORTED."""

SAVED: Final = (MSR_IA32_MCG_STATUS, MSR_IA32_MCG_CTL)
"""Those that KVM_GET_MSR_INDEX_LIST names; how many banks there are is what MCG_CAP says."""

_ALL: Final = 0xFFFF_FFFF_FFFF_FFFF
_PER_BANK: Final = 4  # CTL, STATUS, ADDR, MISC
_CTL: Final = 0
_STATUS: Final = 1
# Some Linux clears bit 10 of bank 4 on AMD's K8, UNIXWARE bit 0 of bank 1 (set_msr_mce()).
_CTL_MAY_BE_CLEAR: Final = 1 << 10 | 1 << 0

BANKS: Final = range(MSR_IA32_MC0_CTL, MSR_IA32_MC0_CTL + _PER_BANK * KVM_MAX_MCE_BANKS)
CTL2: Final = range(MSR_IA32_MC0_CTL2, MSR_IA32_MC0_CTL2 + KVM_MAX_MCE_BANKS)
GLOBAL: Final = frozenset(
    (MSR_IA32_P5_MC_ADDR, MSR_IA32_P5_MC_TYPE, MSR_IA32_MCG_CAP, *SAVED)
)  # fmt: skip


class MachineCheck:
    """``status_writable``: whether the guest may store other than 0 in MCi_STATUS."""

    def __init__(self, status_writable: Callable[[], bool] = lambda: False) -> None:
        self._status_writable = status_writable
        self._capability = KVM_MAX_MCE_BANKS
        self._status = 0
        self._control = 0
        self._banks = [0] * len(BANKS)

    def __contains__(self, index: int) -> bool:
        """Whether it is one of these registers, there or not."""
        return index in GLOBAL or index in BANKS or index in CTL2

    def set_up(self, capability: int) -> None:
        """KVM_X86_SETUP_MCE: MCG_CAP, and all controls on."""
        self._capability = capability
        if capability & MCG_CTL_P:
            self._control = _ALL
        for bank in range(self._number):
            self._banks[bank * _PER_BANK + _CTL] = _ALL

    @property
    def _number(self) -> int:
        return self._capability & 0xFF

    def _there(self, index: int) -> bool:
        """Whether MCG_CAP has the bank of a register."""
        if index in CTL2:
            return index - MSR_IA32_MC0_CTL2 < self._number
        return index - MSR_IA32_MC0_CTL < _PER_BANK * self._number

    def read(self, index: int, *, host: bool) -> int | None:
        """The value; None: there is no such register."""
        if index in (MSR_IA32_P5_MC_ADDR, MSR_IA32_P5_MC_TYPE):
            return 0
        if index == MSR_IA32_MCG_CAP:
            return self._capability
        if index == MSR_IA32_MCG_STATUS:
            return self._status
        if index == MSR_IA32_MCG_CTL:
            return self._control if host or self._capability & MCG_CTL_P else None
        if not self._there(index):
            return None
        if index in CTL2:  # MCG_CMCI_P is not supported
            return 0 if host else None
        return self._banks[index - MSR_IA32_MC0_CTL]

    def write(self, index: int, value: int, *, host: bool) -> bool:
        """Store; False if there is no such register or it does not accept the value."""
        if index == MSR_IA32_MCG_STATUS:
            self._status = value
            return True
        if index == MSR_IA32_MCG_CTL:
            cleared = host and not value
            if value not in (0, _ALL) or not (cleared or self._capability & MCG_CTL_P):
                return False
            self._control = value
            return True
        if index in GLOBAL or not self._there(index):
            return False
        if index in CTL2:
            return host and not value
        return self._write_bank(index - MSR_IA32_MC0_CTL, value, host=host)

    def _write_bank(self, at: int, value: int, *, host: bool) -> bool:
        register = at % _PER_BANK
        if register == _CTL and value and value | _CTL_MAY_BE_CLEAR != _ALL:
            return False
        if register == _STATUS and value and not host and not self._status_writable():
            return False
        self._banks[at] = value
        return True
