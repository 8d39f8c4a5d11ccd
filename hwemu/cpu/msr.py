# SPDX-License-Identifier: GPL-2.0-or-later
"""Model-specific registers that live in the engine's own CPU state.

All others leave the engine as `MsrExit`. Their places are found at start by writing distinct
values through Unicorn's API, never assumed (AMD APM vol. 2, appendix A lists the registers).
"""

from __future__ import annotations

from dataclasses import replace

from hwemu.cpu import rawcontext as raw_layout
from hwemu.cpu.api import Sregs
from hwemu.cpu.guestmemory import GuestFault
from hwemu.cpu.rawcontext import EngineMismatchError, RawState
from hwemu.cpu.vmcb import EFER_SVME

EFER, STAR, LSTAR, CSTAR, SFMASK = 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084
FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX = 0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103

_EFER_WRITABLE = 1 << 0 | 1 << 8 | 1 << 11
_EFER_KEPT = 1 << 10 | EFER_SVME

# words from STAR on in CPUX86State: star, vm_hsave, lstar, cstar, fmask, kernelgsbase, tsc,
# tsc_adjust, tsc_deadline, tsc_aux
_FROM_STAR = {STAR: 0, LSTAR: 2, CSTAR: 3, SFMASK: 4, KERNEL_GS_BASE: 5, TSC_AUX: 9}
_CANONICAL = frozenset((LSTAR, CSTAR, FS_BASE, GS_BASE, KERNEL_GS_BASE))
_WIDTH32 = frozenset((TSC_AUX,))
IN_SREGS = frozenset((EFER, FS_BASE, GS_BASE))
"""Registers that `Sregs` hold as well."""


def _check(index: int, value: int) -> None:
    if index in _CANONICAL and (value >> 47) not in (0, 0x1FFFF):
        raise GuestFault(13, 0)
    if index in _WIDTH32 and value >> 32:
        raise GuestFault(13, 0)


def _new_efer(value: int, now: int, cr0: int) -> int:
    if value & ~(_EFER_WRITABLE | _EFER_KEPT):
        raise GuestFault(13, 0)
    if (value ^ now) & 1 << 8 and cr0 >> 31 & 1:
        raise GuestFault(13, 0)
    return value & _EFER_WRITABLE | now & _EFER_KEPT


def read_in_sregs(sregs: Sregs, index: int) -> int:
    """One of `IN_SREGS` of a vCPU that has not entered with ``sregs`` yet."""
    if index == EFER:
        return sregs.efer
    return (sregs.fs if index == FS_BASE else sregs.gs).base


def write_in_sregs(sregs: Sregs, index: int, value: int) -> Sregs:
    """The same with another value; raises GuestFault(#GP) for one that is refused."""
    if index == EFER:
        return replace(sregs, efer=_new_efer(value, sregs.efer, sregs.cr0))
    _check(index, value)
    if index == FS_BASE:
        return replace(sregs, fs=replace(sregs.fs, base=value))
    return replace(sregs, gs=replace(sregs.gs, base=value))


class MsrFile:
    """The registers of one engine by index."""

    def __init__(self, raw: RawState, star_word: int, efer_word: int) -> None:
        self._raw = raw
        self._words = {index: star_word + at for index, at in _FROM_STAR.items()}
        self._words[FS_BASE] = raw_layout.FS // 8 + 1
        self._words[GS_BASE] = raw_layout.GS // 8 + 1
        self._efer = efer_word

    def __contains__(self, index: int) -> bool:
        return index == EFER or index in self._words

    @property
    def efer(self) -> int:
        """EFER as the guest sees it."""
        return int(self._raw.q[self._efer]) & ~EFER_SVME

    def read(self, index: int) -> int:
        """Value as the guest sees it."""
        if index == EFER:
            return self.efer
        return int(self._raw.q[self._words[index]])

    def write(self, index: int, value: int) -> None:
        """Store; raises GuestFault(#GP) for a value the processor refuses."""
        if index == EFER:
            now = int(self._raw.q[self._efer])
            self._raw.q[self._efer] = _new_efer(value, now, int(self._raw.q[raw_layout.CR0]))
            return
        _check(index, value)
        self._raw.q[self._words[index]] = value

    def vmload(self) -> dict[str, int]:
        """The values VMLOAD would clobber, by the VMCB's names."""
        return {
            "star": self.read(STAR),
            "lstar": self.read(LSTAR),
            "cstar": self.read(CSTAR),
            "fmask": self.read(SFMASK),
            "kernelgsbase": self.read(KERNEL_GS_BASE),
        }


def locate(state: memoryview, magic: dict[int, int], hsave: int, version: str) -> int:
    """Word index of STAR in the CPU state, given the ``magic`` just written by MSR index."""
    for word in range(len(state) - max(_FROM_STAR.values())):
        if all(
            state[word + at] == magic[index] for index, at in _FROM_STAR.items() if index in magic
        ):
            if state[word + 1] != hsave:
                break
            return word
    raise EngineMismatchError(version, "STAR, LSTAR, SFMASK not found side by side")
