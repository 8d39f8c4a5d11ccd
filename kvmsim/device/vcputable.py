# SPDX-License-Identifier: GPL-2.0-or-later
"""The requests that a vCPU's descriptor answers."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvmsim.device import launch
from kvmsim.device import vcpuregisters as registers
from kvmsim.device import vcpustate as state
from kvmsim.device.results import Result
from kvmsim.device.table import Answer, Call, Row, table
from kvmsim.uapi import KVM_PRE_FAULT_MEMORY, KVM_RUN, requests

if TYPE_CHECKING:
    from kvmsim.device.vcpu import VcpuDevice

_Handler = Callable[["VcpuDevice", Call], Answer]


def _run(vcpu: VcpuDevice, call: Call) -> Result:
    return vcpu.run(call)


def _seen(handler: _Handler) -> _Handler:
    """For what nobody sees of a guest whose state is protected."""

    def checked(vcpu: VcpuDevice, call: Call) -> Answer:
        if vcpu.protected:
            raise call.refused(errno.EINVAL, "the guest's state is protected")
        return handler(vcpu, call)

    return checked


TABLE: Final = table(
    (
        Row(KVM_RUN, _run, "runs the guest until an exit",
            "EINTR: a signal or immediate_exit; EFAULT, EHWPOISON: with KVM_EXIT_MEMORY_FAULT, or "
            "nothing behind an hva; EINVAL: argument, cr8, sync registers, a launch that is not "
            "over; EIO: the VM is dead"),
        Row(requests.KVM_GET_REGS, _seen(registers.get_regs), "all"),
        Row(requests.KVM_SET_REGS, _seen(registers.set_regs),
            "all; where RIP changes, code is translated anew"),
        Row(requests.KVM_GET_SREGS, _seen(registers.get_sregs), "all"),
        Row(requests.KVM_SET_SREGS, _seen(registers.set_sregs), "all",
            "EINVAL: a state that the processor cannot be in, or features that it has not"),
        Row(requests.KVM_GET_SREGS2, _seen(registers.get_sregs2), "all, without PDPTRs"),
        Row(requests.KVM_SET_SREGS2, _seen(registers.set_sregs2), "all, without PDPTRs",
            "EINVAL: as KVM_SET_SREGS; any flag"),
        Row(requests.KVM_GET_FPU, _seen(registers.get_fpu),
            "x87, SSE; without last instruction and data"),
        Row(requests.KVM_SET_FPU, _seen(registers.set_fpu), "the same"),
        Row(requests.KVM_GET_XSAVE, _seen(registers.get_xsave),
            "x87, SSE: all that the processor has"),
        Row(requests.KVM_GET_XSAVE2, _seen(registers.get_xsave), "the same 4096 bytes"),
        Row(requests.KVM_SET_XSAVE, _seen(registers.set_xsave), "the same",
            "EINVAL: other features in xstate_bv, reserved bits of MXCSR"),
        Row(requests.KVM_GET_XCRS, _seen(registers.get_xcrs), "there are none"),
        Row(requests.KVM_SET_XCRS, _seen(registers.set_xcrs), "there are none", "EINVAL: always"),
        Row(requests.KVM_GET_DEBUGREGS, _seen(registers.get_debugregs), "what was set last"),
        Row(requests.KVM_SET_DEBUGREGS, _seen(registers.set_debugregs), "kept; no breakpoint fires",
            "EINVAL: flags, upper halves of DR6 and DR7"),
        Row(requests.KVM_GET_MSRS, state.get_msrs,
            "the registers of KVM_GET_MSR_INDEX_LIST, MTRRcap, those of machine checks",
            "E2BIG: 256 or more"),
        Row(requests.KVM_SET_MSRS, state.set_msrs,
            "those of KVM_GET_MSR_INDEX_LIST and of machine checks; the first refused one ends it",
            "E2BIG: 256 or more"),
        Row(requests.KVM_SET_CPUID2, state.set_cpuid2, "all", "E2BIG: more than 256 entries; "
            "EINVAL: another one after KVM_RUN"),
        Row(requests.KVM_SET_CPUID, state.set_cpuid, "all", "as KVM_SET_CPUID2"),
        Row(requests.KVM_GET_CPUID2, state.get_cpuid2, "what was set", "E2BIG: no room"),
        Row(requests.KVM_GET_MP_STATE, state.get_mp_state, "all"),
        Row(requests.KVM_SET_MP_STATE, state.set_mp_state, "all; no SIPI can come",
            "EINVAL: other than RUNNABLE without KVM_CREATE_IRQCHIP; not of x86"),
        Row(requests.KVM_GET_VCPU_EVENTS, state.get_vcpu_events,
            "exception, interrupt, NMI that wait"),
        Row(requests.KVM_SET_VCPU_EVENTS, state.set_vcpu_events, "the same",
            "EINVAL: unknown flags, no such exception, SMM"),
        Row(requests.KVM_INTERRUPT, state.interrupt, "injects at the next entry",
            "EINVAL: vector above 255; ENXIO: KVM_CREATE_IRQCHIP was called"),
        Row(requests.KVM_NMI, state.nmi, "injects at the next entry"),
        Row(requests.KVM_SET_SIGNAL_MASK, state.set_signal_mask,
            "handed on to whoever watches the caller's signals",
            "EINVAL: not the size of a signal set"),
        Row(requests.KVM_GET_LAPIC, state.get_lapic, "what was set, or the state after reset",
            "EINVAL: no KVM_CREATE_IRQCHIP"),
        Row(requests.KVM_SET_LAPIC, state.set_lapic, "kept; no local APIC works",
            "EINVAL: no KVM_CREATE_IRQCHIP"),
        Row(requests.KVM_TRANSLATE, state.translate_address,
            "walks the guest's four-level tables in shared memory"),
        Row(requests.KVM_GET_TSC_KHZ, state.get_tsc_khz, "the host's"),
        Row(requests.KVM_SET_TSC_KHZ, state.set_tsc_khz, "the host's alone",
            "EINVAL: another frequency"),
        Row(requests.KVM_KVMCLOCK_CTRL, state.kvmclock_ctrl,
            "the next entry tells the guest, in its clock page, that it was paused",
            "EINVAL: the guest has asked for no kvmclock"),
        Row(requests.KVM_X86_SETUP_MCE, state.setup_mce,
            "MCG_CAP, MCG_CTL and the banks as the kernel has them; no machine check comes",
            "EINVAL: banks, or what is not supported"),
        Row(requests.KVM_SET_GUEST_DEBUG, _seen(state.set_guest_debug), "only to switch it off",
            "EINVAL: any control bit"),
        Row(requests.KVM_TPR_ACCESS_REPORTING, state.tpr_access_reporting,
            "taken; there is nothing to report", "EINVAL: flags"),
        Row(requests.KVM_SET_VAPIC_ADDR, state.set_vapic_addr, "taken, not needed",
            "EINVAL: no KVM_CREATE_IRQCHIP"),
        Row(requests.KVM_ENABLE_CAP, state.enable_cap, "there is none", "EINVAL: always"),
        Row(requests.KVM_MEMORY_ENCRYPT_OP, launch.vcpu_operation,
            "commands of [TDs](#commands-of-a-td)", "EINVAL: a VM of another type; SNP: ENOTTY"),
        Row(KVM_PRE_FAULT_MEMORY, state.pre_fault_memory, "maps without running the guest",
            "EINVAL: flags, not aligned, size 0, wrap; ENOENT: no slot; EINTR, EAGAIN, EFAULT: "
            "before any page; EOPNOTSUPP: a launch that is not over"),
    )
)  # fmt: skip
"""By request number."""
