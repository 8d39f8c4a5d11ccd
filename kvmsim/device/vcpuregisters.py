# SPDX-License-Identifier: GPL-2.0-or-later
"""The ioctls that get and set registers of a vCPU, and those of them that travel in kvm_run.

kvm_vcpu_ioctl() of virt/kvm/kvm_main.c, kvm_arch_vcpu_ioctl() of arch/x86/kvm/x86.c (v6.18). The
vCPU does not run while one of these is at work.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvmsim.device import registers
from kvmsim.device.capabilities import sync_regs
from kvmsim.device.registers import ControlState, Invalid
from kvmsim.device.runbuffer import SYNC_EVENTS, SYNC_REGS, SYNC_SREGS, RunBuffer
from kvmsim.device.table import Call
from kvmsim.uapi import (
    KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS,
    structs,
)

if TYPE_CHECKING:
    from kvmsim.device.vcpu import VcpuDevice

_DR_RESERVED: Final = 0xFFFF_FFFF_0000_0000


def get_regs(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_GET_REGS."""
    call.write(registers.pack_regs(vcpu.cpu.get_regs()))


def set_regs(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_REGS; pending exceptions are dropped."""
    _store_regs(vcpu, call.fetch(structs.REGS.size))


def _store_regs(vcpu: VcpuDevice, data: bytes) -> None:
    regs = registers.unpack_regs(data)
    if regs.rip != vcpu.cpu.get_regs().rip:
        vcpu.stale_code = True  # whoever moves RIP may have written new code there
    vcpu.cpu.set_regs(regs)
    vcpu.events.exception = None


def _control(vcpu: VcpuDevice) -> ControlState:
    return ControlState(vcpu.cpu.get_sregs(), vcpu.cr8, vcpu.msrs.apic_base)


def get_sregs(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_GET_SREGS."""
    call.write(registers.pack_sregs(_control(vcpu), vcpu.events.interrupt))


def get_sregs2(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_GET_SREGS2."""
    call.write(registers.pack_sregs2(_control(vcpu)))


def set_sregs(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_SREGS."""
    data = call.fetch(structs.SREGS_SIZE)
    try:
        _store_sregs(vcpu, data)
    except Invalid as error:
        raise call.refused(errno.EINVAL, str(error)) from error


def _store_sregs(vcpu: VcpuDevice, data: bytes) -> None:
    state, interrupt = registers.unpack_sregs(data)
    _store_control(vcpu, state)
    if interrupt is not None:
        vcpu.events.interrupt = interrupt


def set_sregs2(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_SREGS2: no flag is known, since no guest has PDPTRs in its registers."""
    data = call.fetch(structs.SREGS2_SIZE)
    flags = structs.SREGS2_TAIL.unpack(data[-structs.SREGS2_TAIL.size :])[0]
    if flags:
        raise call.refused(errno.EINVAL, f"flags {flags:#x}: PDPTRs are not kept")
    try:
        _store_control(vcpu, registers.unpack_common(data))
    except Invalid as error:
        raise call.refused(errno.EINVAL, str(error)) from error


def _store_control(vcpu: VcpuDevice, state: ControlState) -> None:
    if state.sregs != vcpu.cpu.get_sregs():
        vcpu.cpu.set_sregs(state.sregs)
    vcpu.cr8 = state.cr8
    vcpu.msrs.apic_base = state.apic_base


def get_fpu(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_GET_FPU."""
    call.write(registers.pack_fpu(vcpu.cpu.get_fpu()))


def set_fpu(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_FPU."""
    vcpu.cpu.set_fpu(registers.unpack_fpu(call.fetch(structs.FPU.size)))


def get_xsave(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_GET_XSAVE and KVM_GET_XSAVE2: 4096 bytes."""
    call.write(registers.pack_xsave(vcpu.cpu.get_fpu()))


def set_xsave(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_XSAVE."""
    try:
        vcpu.cpu.set_fpu(registers.unpack_xsave(call.fetch(structs.XSAVE_SIZE)))
    except Invalid as error:
        raise call.refused(errno.EINVAL, str(error)) from error


def get_xcrs(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_GET_XCRS: none, since the processor has no XSAVE."""
    call.write(structs.XCRS.pack(0, 0).ljust(structs.XCRS_SIZE, b"\0"))


def set_xcrs(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_XCRS."""
    call.fetch(structs.XCRS_SIZE)
    raise call.refused(errno.EINVAL, "the processor has no XSAVE")


def get_debugregs(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_GET_DEBUGREGS."""
    call.write(structs.DEBUGREGS.pack(*vcpu.debugregs, 0))


def set_debugregs(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_DEBUGREGS: kept; the engine has no breakpoints."""
    *values, flags = call.read(structs.DEBUGREGS)
    if flags:
        raise call.refused(errno.EINVAL, f"flags {flags:#x}: none is known")
    if any(value & _DR_RESERVED for value in values[4:]):
        raise call.refused(errno.EINVAL, "the upper halves of DR6 and DR7 are reserved")
    vcpu.debugregs = tuple(values)


# --- struct kvm_sync_regs --------------------------------------------------------------------


def take_sync_regs(vcpu: VcpuDevice, buffer: RunBuffer, call: Call) -> None:
    """sync_regs(): what user space changed in struct kvm_run."""
    valid, dirty = buffer.sync
    if (valid | dirty) & ~sync_regs(vcpu.vm.kind):
        raise call.refused(errno.EINVAL, "kvm_valid_regs or kvm_dirty_regs has unknown bits")
    if not dirty:
        return
    try:
        if dirty & KVM_SYNC_X86_REGS:
            _store_regs(vcpu, buffer.part(SYNC_REGS))
        if dirty & KVM_SYNC_X86_SREGS:
            _store_sregs(vcpu, buffer.part(SYNC_SREGS))
        if dirty & KVM_SYNC_X86_EVENTS:
            vcpu.events.unpack(buffer.part(SYNC_EVENTS))
    except Invalid as error:
        raise call.refused(errno.EINVAL, str(error)) from error
    buffer.clear_dirty_regs()


def store_sync_regs(vcpu: VcpuDevice, buffer: RunBuffer) -> None:
    """store_regs(): what user space wants to see in struct kvm_run."""
    valid, _ = buffer.sync
    if valid & KVM_SYNC_X86_REGS:
        buffer.set_part(SYNC_REGS, registers.pack_regs(vcpu.cpu.get_regs()))
    if valid & KVM_SYNC_X86_SREGS:
        packed = registers.pack_sregs(_control(vcpu), vcpu.events.interrupt)
        buffer.set_part(SYNC_SREGS, packed)
    if valid & KVM_SYNC_X86_EVENTS:
        buffer.set_part(SYNC_EVENTS, vcpu.events.pack(shadow=False))
