# SPDX-License-Identifier: GPL-2.0-or-later
"""Prepare a fresh engine as SVM host and find its inner state, proving each find.

Every raw offset belongs to one build of Unicorn. A wrong one would corrupt memory silently, so an
engine that does not look exactly as expected is refused with `EngineMismatchError`.
"""

from __future__ import annotations

import ctypes
from typing import Any

from unicorn import x86_const

from hwemu.cpu import msr
from hwemu.cpu import rawcontext as raw_layout
from hwemu.cpu.msr import MsrFile
from hwemu.cpu.rawcontext import EngineMismatchError, RawState
from hwemu.cpu.registers import ORDER

_CR4_HOST = 0x220
_EFER_HOST = 0x1D01  # SVME NXE LMA LME SCE
_MSR_HSAVE = 0xC0010117
_EFER_WORD = 592 // 8


def find_engine_state(
    uc: Any, hsave_hpa: int, version: str, *, stops_between_blocks: bool
) -> tuple[RawState, MsrFile]:
    """The CPU state and the model-specific registers of ``uc``, made ready for VMRUN.

    ``stops_between_blocks``: set uc_struct.no_exit_request, see `hwemu.cpu.engine`.
    """
    magic = tuple(0x5EED_0000_1234_0000 + 0x1_0001 * index for index in range(len(ORDER)))
    registers = [getattr(x86_const, f"UC_X86_REG_{name.upper()}") for name in ORDER]
    for register, value in zip(registers, magic, strict=True):
        uc.reg_write(register, value)
    handle = uc._uch.value
    raw = RawState(*raw_layout.find_state(handle, magic, version))
    uc.reg_write(x86_const.UC_X86_REG_CR4, _CR4_HOST)
    uc.msr_write(msr.EFER, _EFER_HOST)
    uc.msr_write(_MSR_HSAVE, hsave_hpa)
    probes = {msr.STAR: 0x5EED_57A2, msr.LSTAR: 0x5EED_157A, msr.SFMASK: 0x5EED_FA5C}
    for index, value in probes.items():
        uc.msr_write(index, value)
    star = msr.locate(raw.q, probes, hsave_hpa, version)
    for index in probes:
        uc.msr_write(index, 0)
    if raw.q[_EFER_WORD] != _EFER_HOST:
        # a processor model without SVM drops SVME silently
        raise EngineMismatchError(version, f"EFER reads {raw.q[_EFER_WORD]:#x}")
    if stops_between_blocks:
        byte = raw_layout.find_no_exit_request(handle, version)
        ctypes.c_uint8.from_address(byte).value = 1
    for register in registers:
        uc.reg_write(register, 0)
    return raw, MsrFile(raw, star, _EFER_WORD)


def host_state(raw: RawState) -> bytes:
    """What VMRUN replaces: everything from the general registers through EFER."""
    return bytes(raw.bytes[: (_EFER_WORD + 1) * 8])
