# SPDX-License-Identifier: GPL-2.0-or-later
"""The ioctls of a vCPU that are about neither its registers nor KVM_RUN: one function each.

kvm_vcpu_ioctl() of virt/kvm/kvm_main.c, kvm_arch_vcpu_ioctl() of arch/x86/kvm/x86.c,
arch/x86/kvm/cpuid.c (v6.18). The vCPU does not run while one of these is at work.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Final

from kvmsim.device import cpuid, machinecheck
from kvmsim.device.registers import Invalid
from kvmsim.device.table import Answer, Call
from kvmsim.device.translate import translate
from kvmsim.uapi import (
    KVM_MAX_CPUID_ENTRIES,
    KVM_MAX_IO_MSRS,
    KVM_MAX_MCE_BANKS,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED,
    KVM_NR_INTERRUPTS,
    structs,
)

if TYPE_CHECKING:
    from kvmsim.device.vcpu import VcpuDevice

_SIGSET_SIZE: Final = 8

# --- model-specific registers ----------------------------------------------------------------


def _msr_entries(call: Call) -> list[tuple[int, int]]:
    (count,) = call.read(structs.MSRS)
    if count >= KVM_MAX_IO_MSRS:
        raise call.refused(errno.E2BIG, f"{count} registers at once, {KVM_MAX_IO_MSRS} are many")
    data = call.fetch(count * structs.MSR_ENTRY.size, structs.MSRS.size)
    return list(structs.MSR_ENTRY.iter_unpack(data))


def get_msrs(vcpu: VcpuDevice, call: Call) -> int:
    """KVM_GET_MSRS: how many could be read, from the first on."""
    done = []
    for index, _ in _msr_entries(call):
        value = vcpu.cpu.get_msr(index)
        if value is not None and vcpu.protected:  # sev_es_prevent_msr_access(), tdx_get_msr()
            break
        if value is None:
            value = vcpu.msrs.read(index, host=True)
        if value is None:
            break
        done.append(structs.MSR_ENTRY.pack(index, value))
    call.write(b"".join(done), structs.MSRS.size)
    return len(done)


def set_msrs(vcpu: VcpuDevice, call: Call) -> int:
    """KVM_SET_MSRS: how many could be written, from the first on."""
    done = 0
    for index, value in _msr_entries(call):
        if vcpu.protected and vcpu.cpu.get_msr(index) is not None:
            break
        if not vcpu.cpu.set_msr(index, value) and not vcpu.msrs.write(index, value, host=True):
            break
        done += 1
    return done


# --- CPUID -----------------------------------------------------------------------------------


def set_cpuid2(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_CPUID2."""
    (count,) = call.read(structs.CPUID2)
    _check_cpuid_count(call, count)
    data = call.fetch(count * structs.CPUID_ENTRY2.size, structs.CPUID2.size)
    _store_cpuid(vcpu, call, cpuid.unpack_entries(data))


def set_cpuid(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_CPUID, the older one."""
    (count,) = call.read(structs.CPUID2)
    _check_cpuid_count(call, count)
    data = call.fetch(count * structs.CPUID_ENTRY.size, structs.CPUID2.size)
    _store_cpuid(vcpu, call, cpuid.unpack_old_entries(data))


def _check_cpuid_count(call: Call, count: int) -> None:
    if count > KVM_MAX_CPUID_ENTRIES:
        raise call.refused(errno.E2BIG, f"{count} entries, {KVM_MAX_CPUID_ENTRIES} are many")


def _store_cpuid(vcpu: VcpuDevice, call: Call, entries: tuple[cpuid.Entry, ...]) -> None:
    if vcpu.has_run and entries != vcpu.cpuid.entries:
        raise call.refused(errno.EINVAL, "CPUID cannot change after KVM_RUN")
    vcpu.cpuid = cpuid.GuestCpuid(entries)
    vcpu.cpu.set_cpuid(vcpu.cpuid)


def get_cpuid2(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_GET_CPUID2."""
    (room,) = call.read(structs.CPUID2)
    entries = vcpu.cpuid.entries
    if room < len(entries):
        raise call.refused(errno.E2BIG, f"room for {room} entries, there are {len(entries)}")
    call.write(b"".join(entry.pack() for entry in entries), structs.CPUID2.size)
    call.write(structs.CPUID2.pack(len(entries)))


# --- events ----------------------------------------------------------------------------------


def get_mp_state(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_GET_MP_STATE."""
    call.write(structs.MP_STATE.pack(vcpu.mp_state))


_NEEDS_LAPIC: Final = (
    KVM_MP_STATE_UNINITIALIZED,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_SIPI_RECEIVED,
)


def set_mp_state(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_MP_STATE."""
    (state,) = call.read(structs.MP_STATE)
    if state != KVM_MP_STATE_RUNNABLE and state not in _NEEDS_LAPIC:
        raise call.refused(errno.EINVAL, f"mp_state {state}: not on x86")
    if state in _NEEDS_LAPIC and not vcpu.vm.irqchip:
        raise call.refused(errno.EINVAL, f"mp_state {state} needs KVM_CREATE_IRQCHIP")
    vcpu.mp_state = KVM_MP_STATE_INIT_RECEIVED if state == KVM_MP_STATE_SIPI_RECEIVED else state


def get_vcpu_events(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_GET_VCPU_EVENTS."""
    call.write(vcpu.events.pack(shadow=False))


def set_vcpu_events(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_VCPU_EVENTS."""
    data = call.fetch(structs.VCPU_EVENTS.size)
    try:
        vcpu.events.unpack(data)
    except Invalid as error:
        raise call.refused(errno.EINVAL, str(error)) from error


def interrupt(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_INTERRUPT: injected at the next entry, whatever RFLAGS.IF is."""
    (vector,) = call.read(structs.INTERRUPT)
    if vector >= KVM_NR_INTERRUPTS:
        raise call.refused(errno.EINVAL, f"vector {vector}: there are {KVM_NR_INTERRUPTS}")
    if vcpu.vm.irqchip:
        raise call.refused(errno.ENXIO, "the interrupt controllers are in the kernel")
    vcpu.events.interrupt = vector


def nmi(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_NMI."""
    vcpu.events.nmi = True


def set_signal_mask(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_SIGNAL_MASK; a null pointer takes it away."""
    if not call.argument:
        vcpu.signal_mask = None
        return
    (length,) = call.read(structs.SIGNAL_MASK)
    if length != _SIGSET_SIZE:
        raise call.refused(errno.EINVAL, f"a signal set of {length} bytes, it has {_SIGSET_SIZE}")
    mask = call.fetch(length, structs.SIGNAL_MASK.size)
    vcpu.signal_mask = int.from_bytes(mask, "little")


def get_lapic(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_GET_LAPIC."""
    if not vcpu.vm.irqchip:
        raise call.refused(errno.EINVAL, "there is no local APIC in the kernel")
    call.write(vcpu.lapic or _reset_lapic(vcpu.id))


def set_lapic(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_LAPIC."""
    if not vcpu.vm.irqchip:
        raise call.refused(errno.EINVAL, "there is no local APIC in the kernel")
    vcpu.lapic = call.fetch(structs.LAPIC_STATE_SIZE)


def _reset_lapic(id: int) -> bytes:
    """kvm_lapic_reset(): id, version, LVT entries masked, DFR, SVR."""
    page = bytearray(structs.LAPIC_STATE_SIZE)
    values = {0x20: id << 24 & 0xFFFF_FFFF, 0x30: 0x50014, 0xE0: 0xFFFF_FFFF, 0xF0: 0xFF}
    values.update(dict.fromkeys(range(800, 896, 16), 1 << 16))
    for offset, value in values.items():
        page[offset : offset + 4] = value.to_bytes(4, "little")
    return bytes(page)


# --- the rest --------------------------------------------------------------------------------


def translate_address(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_TRANSLATE: through the guest's own tables."""
    linear, *_ = call.read(structs.TRANSLATION)
    read_word = partial(vcpu.vm.memory.read_word, caller=call.caller)
    gpa = translate(vcpu.cpu.get_sregs(), linear, read_word)
    valid = gpa is not None
    found = gpa if gpa is not None else 0xFFFF_FFFF_FFFF_FFFF
    call.write(structs.TRANSLATION.pack(linear, found, valid, 1, 0))


def get_tsc_khz(vcpu: VcpuDevice, call: Call) -> int:
    """KVM_GET_TSC_KHZ."""
    return vcpu.vm.clock.tsc_khz


def set_tsc_khz(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_TSC_KHZ: only the host's own."""
    vcpu.vm.check_tsc_khz(call)


def kvmclock_ctrl(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_KVMCLOCK_CTRL."""
    if not vcpu.clock.active:
        raise call.refused(errno.EINVAL, "the guest has no kvmclock")
    vcpu.clock.want(stopped=True)


def setup_mce(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_X86_SETUP_MCE."""
    (capability,) = call.read(structs.U64_VALUE)
    banks = capability & 0xFF
    if not 0 < banks <= KVM_MAX_MCE_BANKS:
        raise call.refused(errno.EINVAL, f"{banks} banks, from 1 to {KVM_MAX_MCE_BANKS} there are")
    if capability & ~(machinecheck.SUPPORTED | 0xFF | 0xFF0000):
        raise call.refused(errno.EINVAL, f"capability {capability:#x} is not supported")
    vcpu.msrs.machine_check.set_up(capability)


def set_guest_debug(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_GUEST_DEBUG: only to switch it off."""
    control, *_ = call.read(structs.GUEST_DEBUG)
    if control:
        raise call.refused(errno.EINVAL, "breakpoints and single steps are not simulated")


def tpr_access_reporting(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_TPR_ACCESS_REPORTING: there is no local APIC whose TPR could be accessed."""
    enabled, flags = call.read(structs.TPR_ACCESS_CTL)
    if flags:
        raise call.refused(errno.EINVAL, f"flags {flags:#x}: none is known")
    call.write(structs.TPR_ACCESS_CTL.pack(enabled, flags))


def set_vapic_addr(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_SET_VAPIC_ADDR: the same."""
    if not vcpu.vm.irqchip:
        raise call.refused(errno.EINVAL, "there is no local APIC in the kernel")
    call.read(structs.VAPIC_ADDR)


def enable_cap(vcpu: VcpuDevice, call: Call) -> None:
    """KVM_ENABLE_CAP of a vCPU."""
    cap, *_ = call.read(structs.ENABLE_CAP)
    raise call.refused(errno.EINVAL, f"capability {cap} cannot be enabled for a vCPU")


def pre_fault_memory(vcpu: VcpuDevice, call: Call) -> Answer:
    """KVM_PRE_FAULT_MEMORY."""
    return vcpu.vm.memory.pre_fault(vcpu, call)
