# SPDX-License-Identifier: GPL-2.0-or-later
"""x87 and SSE state of an engine, for a user that saves and restores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unicorn import x86_const

_XMM_BYTES = 16
_FP_BYTES = 10
_TOP_SHIFT = 11
_SLOTS = 8


@dataclass(frozen=True, slots=True)
class Fpu:
    """Registers as FXSAVE has them (AMD APM vol. 2, 11.4.4).

    ``st`` are eight of 16 bytes, ST(0) first, the upper six of each 0; ``ftw`` has a bit per
    physical register, set if it is in use; ``xmm`` are sixteen of 16 bytes.
    """

    fcw: int = 0x37F
    fsw: int = 0
    ftw: int = 0
    mxcsr: int = 0x1F80
    st: tuple[bytes, ...] = (bytes(16),) * _SLOTS
    xmm: tuple[bytes, ...] = (bytes(_XMM_BYTES),) * 16


def read_fpu(uc: Any) -> Fpu:
    """The state out of a stopped engine."""
    fsw = uc.reg_read(x86_const.UC_X86_REG_FPSW)
    tags = uc.reg_read(x86_const.UC_X86_REG_FPTAG)
    top = fsw >> _TOP_SHIFT & 7
    st = []
    for index in range(_SLOTS):
        # the engine names physical registers, FXSAVE those relative to the top
        register = x86_const.UC_X86_REG_FP0 + (top + index) % _SLOTS
        mantissa, exponent = uc.reg_read(register)
        st.append(mantissa.to_bytes(8, "little") + exponent.to_bytes(2, "little") + bytes(6))
    return Fpu(
        fcw=uc.reg_read(x86_const.UC_X86_REG_FPCW),
        fsw=fsw,
        ftw=sum(1 << slot for slot in range(_SLOTS) if tags >> 2 * slot & 3 != 3),
        mxcsr=uc.reg_read(x86_const.UC_X86_REG_MXCSR),
        st=tuple(st),
        xmm=tuple(
            uc.reg_read(x86_const.UC_X86_REG_XMM0 + index).to_bytes(_XMM_BYTES, "little")
            for index in range(16)
        ),
    )


def write_fpu(uc: Any, fpu: Fpu) -> None:
    """The state into a stopped engine."""
    top = fpu.fsw >> _TOP_SHIFT & 7
    uc.reg_write(x86_const.UC_X86_REG_FPCW, fpu.fcw)
    uc.reg_write(x86_const.UC_X86_REG_FPSW, fpu.fsw)
    for index, raw in enumerate(fpu.st):
        value = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:_FP_BYTES], "little")
        uc.reg_write(x86_const.UC_X86_REG_FP0 + (top + index) % _SLOTS, value)
    tags = sum(3 << 2 * slot for slot in range(_SLOTS) if not fpu.ftw >> slot & 1)
    uc.reg_write(x86_const.UC_X86_REG_FPTAG, tags)
    uc.reg_write(x86_const.UC_X86_REG_MXCSR, fpu.mxcsr)
    for index, raw in enumerate(fpu.xmm):
        uc.reg_write(x86_const.UC_X86_REG_XMM0 + index, int.from_bytes(raw, "little"))
