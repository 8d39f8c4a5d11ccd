# SPDX-License-Identifier: GPL-2.0-or-later
"""Request numbers of KVM's ioctls on x86, under the kernel's names (include/uapi/linux/kvm.h)."""

from __future__ import annotations

from typing import Final

from kvmsim.uapi import structs
from kvmsim.uapi.encoding import io, ior, iow, iowr

# --- the system ------------------------------------------------------------------------------

KVM_GET_MSR_INDEX_LIST: Final = iowr(0x02, structs.MSR_LIST.size)
KVM_GET_SUPPORTED_CPUID: Final = iowr(0x05, structs.CPUID2.size)
KVM_GET_EMULATED_CPUID: Final = iowr(0x09, structs.CPUID2.size)
KVM_GET_MSR_FEATURE_INDEX_LIST: Final = iowr(0x0A, structs.MSR_LIST.size)
KVM_X86_GET_MCE_CAP_SUPPORTED: Final = ior(0x9D, structs.U64_VALUE.size)

# --- a VM ------------------------------------------------------------------------------------

KVM_GET_DIRTY_LOG: Final = iow(0x42, structs.DIRTY_LOG.size)
KVM_SET_NR_MMU_PAGES: Final = io(0x44)
KVM_GET_NR_MMU_PAGES: Final = io(0x45)
KVM_SET_TSS_ADDR: Final = io(0x47)
KVM_SET_IDENTITY_MAP_ADDR: Final = iow(0x48, structs.U64_VALUE.size)
KVM_CREATE_IRQCHIP: Final = io(0x60)
KVM_IRQ_LINE: Final = iow(0x61, structs.IRQ_LEVEL.size)
KVM_GET_IRQCHIP: Final = iowr(0x62, structs.IRQCHIP.size)
KVM_SET_IRQCHIP: Final = ior(0x63, structs.IRQCHIP.size)
KVM_CREATE_PIT: Final = io(0x64)
KVM_IRQ_LINE_STATUS: Final = iowr(0x67, structs.IRQ_LEVEL.size)
KVM_REGISTER_COALESCED_MMIO: Final = iow(0x67, structs.COALESCED_MMIO_ZONE.size)
KVM_UNREGISTER_COALESCED_MMIO: Final = iow(0x68, structs.COALESCED_MMIO_ZONE.size)
KVM_SET_GSI_ROUTING: Final = iow(0x6A, structs.IRQ_ROUTING.size)
KVM_REINJECT_CONTROL: Final = io(0x71)
KVM_IRQFD: Final = iow(0x76, structs.IRQFD.size)
KVM_CREATE_PIT2: Final = iow(0x77, structs.PIT_CONFIG.size)
KVM_SET_BOOT_CPU_ID: Final = io(0x78)
KVM_IOEVENTFD: Final = iow(0x79, structs.IOEVENTFD.size)
KVM_SET_CLOCK: Final = iow(0x7B, structs.CLOCK_DATA.size)
KVM_GET_CLOCK: Final = ior(0x7C, structs.CLOCK_DATA.size)
KVM_SET_TSC_KHZ: Final = io(0xA2)
KVM_GET_TSC_KHZ: Final = io(0xA3)
KVM_ENABLE_CAP: Final = iow(0xA3, structs.ENABLE_CAP.size)
KVM_SIGNAL_MSI: Final = iow(0xA5, structs.MSI.size)
KVM_MEMORY_ENCRYPT_OP: Final = iowr(0xBA, structs.U64_VALUE.size)
KVM_CLEAR_DIRTY_LOG: Final = iowr(0xC0, structs.CLEAR_DIRTY_LOG.size)
KVM_GET_STATS_FD: Final = io(0xCE)
KVM_CREATE_DEVICE: Final = iowr(0xE0, structs.CREATE_DEVICE.size)
KVM_SET_DEVICE_ATTR: Final = iow(0xE1, structs.DEVICE_ATTR.size)
KVM_GET_DEVICE_ATTR: Final = iow(0xE2, structs.DEVICE_ATTR.size)
KVM_HAS_DEVICE_ATTR: Final = iow(0xE3, structs.DEVICE_ATTR.size)

# --- a vCPU ----------------------------------------------------------------------------------

KVM_GET_REGS: Final = ior(0x81, structs.REGS.size)
KVM_SET_REGS: Final = iow(0x82, structs.REGS.size)
KVM_GET_SREGS: Final = ior(0x83, structs.SREGS_SIZE)
KVM_SET_SREGS: Final = iow(0x84, structs.SREGS_SIZE)
KVM_TRANSLATE: Final = iowr(0x85, structs.TRANSLATION.size)
KVM_INTERRUPT: Final = iow(0x86, structs.INTERRUPT.size)
KVM_GET_MSRS: Final = iowr(0x88, structs.MSRS.size)
KVM_SET_MSRS: Final = iow(0x89, structs.MSRS.size)
KVM_SET_CPUID: Final = iow(0x8A, structs.CPUID2.size)
KVM_SET_SIGNAL_MASK: Final = iow(0x8B, structs.SIGNAL_MASK.size)
KVM_GET_FPU: Final = ior(0x8C, structs.FPU.size)
KVM_SET_FPU: Final = iow(0x8D, structs.FPU.size)
KVM_GET_LAPIC: Final = ior(0x8E, structs.LAPIC_STATE_SIZE)
KVM_SET_LAPIC: Final = iow(0x8F, structs.LAPIC_STATE_SIZE)
KVM_SET_CPUID2: Final = iow(0x90, structs.CPUID2.size)
KVM_GET_CPUID2: Final = iowr(0x91, structs.CPUID2.size)
KVM_TPR_ACCESS_REPORTING: Final = iowr(0x92, structs.TPR_ACCESS_CTL.size)
KVM_SET_VAPIC_ADDR: Final = iow(0x93, structs.VAPIC_ADDR.size)
KVM_GET_MP_STATE: Final = ior(0x98, structs.MP_STATE.size)
KVM_SET_MP_STATE: Final = iow(0x99, structs.MP_STATE.size)
KVM_NMI: Final = io(0x9A)
KVM_SET_GUEST_DEBUG: Final = iow(0x9B, structs.GUEST_DEBUG.size)
KVM_X86_SETUP_MCE: Final = iow(0x9C, structs.U64_VALUE.size)
KVM_X86_SET_MCE: Final = iow(0x9E, structs.X86_MCE.size)
KVM_GET_VCPU_EVENTS: Final = ior(0x9F, structs.VCPU_EVENTS.size)
KVM_SET_VCPU_EVENTS: Final = iow(0xA0, structs.VCPU_EVENTS.size)
KVM_GET_DEBUGREGS: Final = ior(0xA1, structs.DEBUGREGS.size)
KVM_SET_DEBUGREGS: Final = iow(0xA2, structs.DEBUGREGS.size)
KVM_GET_XSAVE: Final = ior(0xA4, structs.XSAVE_SIZE)
KVM_SET_XSAVE: Final = iow(0xA5, structs.XSAVE_SIZE)
KVM_GET_XCRS: Final = ior(0xA6, structs.XCRS_SIZE)
KVM_SET_XCRS: Final = iow(0xA7, structs.XCRS_SIZE)
KVM_KVMCLOCK_CTRL: Final = io(0xAD)
KVM_SMI: Final = io(0xB7)
KVM_GET_SREGS2: Final = ior(0xCC, structs.SREGS2_SIZE)
KVM_SET_SREGS2: Final = iow(0xCD, structs.SREGS2_SIZE)
KVM_GET_XSAVE2: Final = ior(0xCF, structs.XSAVE_SIZE)
