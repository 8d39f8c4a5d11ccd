# SPDX-License-Identifier: GPL-2.0-or-later
"""SYSCALL and port permission: checks and transfers that Unicorn leaves to its user."""

from __future__ import annotations

from hwemu.cpu import msr
from hwemu.cpu import rawcontext as raw_layout
from hwemu.cpu.api import EFER_SCE
from hwemu.cpu.delivery import set_flat
from hwemu.cpu.guestmemory import GuestFault, GuestMemory
from hwemu.cpu.msr import MsrFile
from hwemu.cpu.rawcontext import RawState

_RF = 1 << 16
# descriptor bits 40 and up, as the engine keeps them: present, non-system, granular, accessed
_CODE64_RING0 = 0x00A0_9B00
_DATA_RING0 = 0x00C0_9300
_IOPL_SHIFT = 12
_TSS_IO_BASE = 0x66


def enter_kernel(raw: RawState, msrs: MsrFile, rflags: int, length: int) -> None:
    """SYSCALL of ``length`` bytes at RIP (AMD APM vol. 3); raises GuestFault(#UD)."""
    if not msrs.read(msr.EFER) & EFER_SCE:
        raise GuestFault(6, None)
    star = msrs.read(msr.STAR)
    long_mode = raw.d[raw_layout.HFLAGS] & raw_layout.HF_CS64
    raw.q[raw_layout.RCX] = raw.q[raw_layout.RIP] + length
    raw.q[11] = rflags & ~_RF
    selector = star >> 32 & 0xFFFC
    set_flat(raw, raw_layout.CS, selector, _CODE64_RING0)
    set_flat(raw, raw_layout.SS, selector + 8, _DATA_RING0)
    hflags = raw.d[raw_layout.HFLAGS] & ~(raw_layout.HF_CPL | raw_layout.HF_ADDSEG)
    raw.d[raw_layout.HFLAGS] = hflags | raw_layout.HF_CS64 | raw_layout.HF_CS32 | raw_layout.HF_SS32
    raw.set_rflags(rflags & ~(msrs.read(msr.SFMASK) | _RF))
    raw.q[raw_layout.RIP] = msrs.read(msr.LSTAR if long_mode else msr.CSTAR)


def port_allowed(raw: RawState, memory: GuestMemory, rflags: int, port: int, size: int) -> bool:
    """IOPL, then the permission bitmap of the TSS (AMD APM vol. 2, 12.2.5).

    Raises GuestFault or Stage2Miss when the TSS cannot be read.
    """
    if raw.cpl <= rflags >> _IOPL_SHIFT & 3:
        return True
    limit = raw.d[raw_layout.TR // 4 + 4]
    base = raw.q[raw_layout.TR // 8 + 1]
    if limit < _TSS_IO_BASE + 1:
        return False
    at = memory.read_int(base + _TSS_IO_BASE, 2) + port // 8
    if at + 1 > limit:
        return False
    bits = memory.read_int(base + at, 2) >> (port % 8)
    return not bits & (1 << size) - 1
