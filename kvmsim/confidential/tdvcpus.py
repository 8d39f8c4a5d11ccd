# SPDX-License-Identifier: GPL-2.0-or-later
"""The vCPUs of a TD: how they enter and leave it, and what is the module's to answer there.

An instruction or an access that is not a TD's own to make is #VE, #UD or a TDCALL; TDG.VP.VMCALL
goes on to the VMM (:mod:`kvmsim.confidential.tdvmcall`).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from hwemu.cpu import api as cpu_api
from hwemu.cpu.api import Regs
from hwemu.tdx import Result, TdxModule
from hwemu.tdx.result import DoubleFault, ExitReason, FlushTlb, TdExit, VirtualException
from hwemu.tdx.td import Vcpu as TdVcpu
from hwemu.tdx.td import VeInfo
from kvmsim import exits
from kvmsim.confidential.platform import Platform
from kvmsim.confidential.tdvmcall import TdVmCalls
from kvmsim.guard import Answer, Inject, Leave, Resolve, Verdict
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SIZE

_UD, _VE = 6, 20
#: Instructions of a TD that the module answers with #VE (TDX module base specification, "TD
#: Non-Root Mode Architectural State"), by the exit reason of the VE information.
_VE_REASONS: Final = {"in": 30, "ins": 30, "out": 30, "outs": 30, "cpuid": 10, "hlt": 12,
                      "rdmsr": 31, "wrmsr": 32}  # fmt: skip
#: Where a TD has no such instruction.
_UNDEFINED: Final = frozenset(
    ("vmcall", "vmmcall", "vmgexit", "seamcall", "pvalidate", "rmpadjust", "psmash", "rmpupdate")
)
INSTRUCTIONS: Final = frozenset(_VE_REASONS) | _UNDEFINED | {"tdcall"}
"""All that a TD does not execute by itself."""
_MMIO_REASON: Final = 48
_IN_REGISTERS: Final = ("rcx", "rdx", "rbx", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_VEINFO_GET: Final = 3
#: TDG.VP.INFO and TDG.VP.VEINFO.GET write registers; other leaves leave them alone.
_WRITES: Final = (1, _VEINFO_GET)


class TdVcpus:
    """The vCPUs of one TD, by index."""

    def __init__(self, platform: Platform, running: RunningVm, module: TdxModule) -> None:
        self._lock = platform.lock
        self._running = running
        self._module = module
        self._tdvprs: dict[int, int] = {}  #: vCPU → hpa of its TDVPR
        self._owed: set[int] = set()  #: vCPUs whose TLB the module wants flushed
        self._lengths: dict[int, int] = {}  #: vCPU → length of the instruction that #VE tells of
        self._calls = TdVmCalls(running)

    def add(self, vcpu: int, tdvpr: int) -> None:
        """TDH.VP.CREATE has made it of the page at ``tdvpr`` (hpa)."""
        self._tdvprs[vcpu] = tdvpr

    def flush(self) -> None:
        """TDH.VP.FLUSH of all that a logical processor has (the platform's lock held)."""
        for index, tdvpr in self._tdvprs.items():
            if self._module.vcpu(tdvpr).lp is not None:
                self._module.vp_flush(tdvpr, lp=index)

    # --- in and out -----------------------------------------------------------------------------

    def enter(self, vcpu: int) -> None:
        """TDH.VP.ENTER; what the module wants flushed is flushed."""
        with self._lock:
            self._enter(vcpu)
            if vcpu in self._owed:
                self._owed.remove(vcpu)
                self._running.vcpus[vcpu].cpu.flush(())

    def _enter(self, vcpu: int) -> None:
        entered = self._module.vp_enter(self._tdvprs[vcpu], lp=vcpu)
        for effect in entered.effects:
            if isinstance(effect, FlushTlb):
                self._owed.add(vcpu)

    def leave(self, vcpu: int) -> None:
        """A TD exit: an interrupt of the host's."""
        tdvpr = self._tdvprs[vcpu]
        with self._lock:
            if self._module.vcpu(tdvpr).running:
                self._module.td_exit(tdvpr)

    @contextlib.contextmanager
    def _inside(self, vcpu: int) -> Iterator[None]:
        """Have the vCPU in its TD for what the guest asks of the module."""
        was = self._vcpu(vcpu).running
        if not was:
            self._enter(vcpu)
        try:
            yield
        finally:
            if not was and self._vcpu(vcpu).running:
                self._module.td_exit(self._tdvprs[vcpu])

    # --- what the guest does --------------------------------------------------------------------

    def access(self, vcpu: int, gpa: int, access: cpu_api.Access) -> Verdict:
        """A private access for which the Secure EPT has an entry that is not MAPPED."""
        with self._lock, self._inside(vcpu):
            found = self._module.access(self._tdvprs[vcpu], gpa, _rights(access))
        if isinstance(found, VirtualException):
            self._lengths[vcpu] = 0
            return Inject(_VE)
        if isinstance(found, DoubleFault):
            return Leave(exits.ShutdownExit())
        # SEPT_VE_DISABLE: the page is there, and the guest does not take it
        # (vt_is_tdx_private_gpa() and PENDING in tdx_handle_ept_violation()).
        return Leave(exits.MemoryFaultExit(
            gpa & -PAGE_SIZE, PAGE_SIZE, True, errno.EFAULT, "the guest has not accepted this page"
        ))  # fmt: skip

    def mmio(self, vcpu: int, gpa: int, access: cpu_api.Access) -> Verdict:
        """No memory on the shared side: the shared EPT's entry says #VE."""
        return self._virtual_exception(vcpu, VeInfo(_MMIO_REASON, _rights(access), 0, gpa), 0)

    def instruction(self, vcpu: int, left: cpu_api.InterceptExit, regs: Regs) -> Verdict:
        """TDCALL, and what is #VE or #UD in a TD."""
        if left.instruction == "tdcall":
            return self._tdcall(vcpu, regs)
        reason = _VE_REASONS.get(left.instruction)
        if reason is None:
            return Inject(_UD)
        qualification = 0
        if left.port or left.size:  # SDM vol. 3, table 28-5
            string = left.instruction in ("ins", "outs")
            qualification = left.size - 1 | (not left.is_write) << 3 | string << 4 | left.port << 16
        return self._virtual_exception(vcpu, VeInfo(reason, qualification, 0, 0), left.length)

    def complete(self, vcpu: int, data: bytes | int | None, regs: Regs) -> Verdict:
        """The VMM's answer to a TDVMCALL."""
        return self._calls.complete(vcpu, data, regs)

    # --- inside ---------------------------------------------------------------------------------

    def _vcpu(self, index: int) -> TdVcpu:
        return self._module.vcpu(self._tdvprs[index])

    def _virtual_exception(self, vcpu: int, info: VeInfo, length: int) -> Verdict:
        with self._lock:
            known = self._vcpu(vcpu)
            if known.ve_info is not None:
                return Leave(exits.ShutdownExit())  # #DF: the last one was not fetched
            known.ve_info = info
            self._lengths[vcpu] = length
        return Inject(_VE)

    def _tdcall(self, vcpu: int, regs: Regs) -> Verdict:
        with self._lock, self._inside(vcpu):
            names = {name: getattr(regs, name) for name in _IN_REGISTERS}
            result = self._module.tdcall(self._tdvprs[vcpu], regs.rax, **names)
        for effect in result.effects:
            if isinstance(effect, VirtualException):
                self._lengths[vcpu] = 0
                return Inject(_VE)
            if isinstance(effect, DoubleFault):
                return Leave(exits.ShutdownExit())
            assert isinstance(effect, TdExit)
            if effect.reason is ExitReason.TDCALL:
                return self._calls.begin(vcpu, regs)
            return self._exit(effect)
        return self._answer(vcpu, regs, result)

    def _exit(self, exit_: TdExit) -> Verdict:
        """An EPT violation of the module's own walk: KVM finds the page, the call is repeated."""
        return Resolve(exit_.gpa, cpu_api.Access.WRITE)

    def _answer(self, vcpu: int, regs: Regs, result: Result) -> Verdict:
        changed = {"rax": result.status}
        if regs.rax in _WRITES or not result.ok:
            changed |= {"rcx": result.rcx, "rdx": result.rdx}
        if regs.rax in _WRITES and result.ok:
            changed |= {name: getattr(result, name) for name in ("r8", "r9", "r10", "r11")}
        if regs.rax == _VEINFO_GET and result.ok:
            changed["r10"] = self._lengths.get(vcpu, 0)  # 31:0 length, 63:32 information
        return Answer(replace(regs, **changed))


def _rights(access: cpu_api.Access) -> int:
    """As the qualification of an EPT violation: 1 read, 2 write, 4 fetch."""
    return int(access)
