# SPDX-License-Identifier: GPL-2.0-or-later
"""What the three levels of /dev/kvm refuse, as tables: for the simulated device and a real one.

Each row is (level, request, argument, errno); an argument of bytes is a structure. The VM has one
vCPU with id 0, no slots and no interrupt controllers.
"""

from __future__ import annotations

import errno
import struct

from device_program import PAGE

from kvmsim import uapi
from kvmsim.uapi import capabilities, requests, structs

U64 = (1 << 64) - 1
BAD = 8  # an address that nobody has

# Every request that takes a pointer fails with EFAULT for a bad one, before anything else.
POINTERS = {
    "system": (
        requests.KVM_GET_SUPPORTED_CPUID, requests.KVM_GET_EMULATED_CPUID,
        requests.KVM_GET_MSR_INDEX_LIST, requests.KVM_GET_MSR_FEATURE_INDEX_LIST,
        requests.KVM_GET_MSRS, requests.KVM_X86_GET_MCE_CAP_SUPPORTED,
        requests.KVM_HAS_DEVICE_ATTR, requests.KVM_GET_DEVICE_ATTR,
    ),
    "vm": (
        uapi.KVM_SET_USER_MEMORY_REGION, uapi.KVM_SET_USER_MEMORY_REGION2,
        uapi.KVM_SET_MEMORY_ATTRIBUTES, requests.KVM_GET_DIRTY_LOG, requests.KVM_ENABLE_CAP,
        requests.KVM_SET_IDENTITY_MAP_ADDR, requests.KVM_GET_CLOCK, requests.KVM_SET_CLOCK,
        requests.KVM_IRQ_LINE, requests.KVM_CREATE_DEVICE, requests.KVM_SIGNAL_MSI,
        requests.KVM_CREATE_PIT2, requests.KVM_IRQFD, requests.KVM_IOEVENTFD,
    ),
    "vcpu": (
        requests.KVM_GET_REGS, requests.KVM_SET_REGS, requests.KVM_GET_SREGS,
        requests.KVM_SET_SREGS, requests.KVM_GET_SREGS2, requests.KVM_SET_SREGS2,
        requests.KVM_GET_FPU, requests.KVM_SET_FPU, requests.KVM_GET_XSAVE,
        requests.KVM_GET_XSAVE2, requests.KVM_SET_XSAVE, requests.KVM_GET_XCRS,
        requests.KVM_SET_XCRS, requests.KVM_GET_DEBUGREGS, requests.KVM_SET_DEBUGREGS,
        requests.KVM_GET_MSRS, requests.KVM_SET_MSRS, requests.KVM_SET_CPUID,
        requests.KVM_SET_CPUID2, requests.KVM_GET_CPUID2, requests.KVM_GET_MP_STATE,
        requests.KVM_SET_MP_STATE, requests.KVM_GET_VCPU_EVENTS, requests.KVM_SET_VCPU_EVENTS,
        requests.KVM_INTERRUPT, requests.KVM_SET_SIGNAL_MASK, requests.KVM_TRANSLATE,
        requests.KVM_X86_SETUP_MCE, requests.KVM_ENABLE_CAP, uapi.KVM_PRE_FAULT_MEMORY,
        requests.KVM_SET_GUEST_DEBUG, requests.KVM_TPR_ACCESS_REPORTING,
    ),
}  # fmt: skip


MSRS = struct.Struct("<II")
ONE_MSR = struct.Struct("<IIIIQ")


ERRORS = [
    # level, request, argument, errno
    ("system", uapi.KVM_GET_API_VERSION, 1, errno.EINVAL),
    ("system", uapi.KVM_GET_VCPU_MMAP_SIZE, 1, errno.EINVAL),
    ("system", uapi.KVM_CREATE_VM, 2, errno.EINVAL),
    ("system", uapi.KVM_CREATE_VM, 6, errno.EINVAL),
    ("system", uapi.KVM_CREATE_VM, U64, errno.EINVAL),
    ("system", requests.KVM_GET_SUPPORTED_CPUID, structs.CPUID2.pack(0), errno.E2BIG),
    ("system", requests.KVM_GET_SUPPORTED_CPUID, structs.CPUID2.pack(1), errno.E2BIG),
    ("system", requests.KVM_GET_EMULATED_CPUID, structs.CPUID2.pack(0), errno.E2BIG),
    ("system", requests.KVM_GET_MSR_INDEX_LIST, structs.MSR_LIST.pack(0), errno.E2BIG),
    ("system", requests.KVM_GET_MSRS, MSRS.pack(256, 0), errno.E2BIG),
    ("system", requests.KVM_HAS_DEVICE_ATTR, structs.DEVICE_ATTR.pack(0, 0, 0, 0), 0),
    ("system", requests.KVM_HAS_DEVICE_ATTR, structs.DEVICE_ATTR.pack(1, 0, 0, 0), 0),
    ("system", requests.KVM_HAS_DEVICE_ATTR, structs.DEVICE_ATTR.pack(0, 0, 1, 0), errno.ENXIO),
    ("system", requests.KVM_HAS_DEVICE_ATTR, structs.DEVICE_ATTR.pack(0, 1, 7, 0), errno.ENXIO),
    ("system", requests.KVM_HAS_DEVICE_ATTR, structs.DEVICE_ATTR.pack(0, 2, 0, 0), errno.ENXIO),
    ("system", requests.KVM_GET_DEVICE_ATTR, structs.DEVICE_ATTR.pack(0, 0, 1, 0), errno.ENXIO),
    ("system", requests.KVM_GET_DEVICE_ATTR, structs.DEVICE_ATTR.pack(0, 0, 0, BAD), errno.EFAULT),
    ("vm", uapi.KVM_CREATE_VCPU, 4096, errno.EINVAL),
    ("vm", uapi.KVM_CREATE_VCPU, U64, errno.EINVAL),
    ("vm", uapi.KVM_CREATE_VCPU, 1 << 32, errno.EINVAL),
    ("vm", uapi.KVM_CREATE_VCPU, 0, errno.EEXIST),
    ("vm", requests.KVM_SET_BOOT_CPU_ID, 0, errno.EBUSY),
    ("vm", requests.KVM_CREATE_IRQCHIP, 0, errno.EINVAL),
    ("vm", requests.KVM_SET_IDENTITY_MAP_ADDR, bytes(8), errno.EINVAL),
    ("vm", requests.KVM_SET_TSS_ADDR, 0xFFFF_D001, errno.EINVAL),
    ("vm", requests.KVM_SET_TSS_ADDR, 0xFFFF_D000, 0),
    ("vm", requests.KVM_SET_NR_MMU_PAGES, 63, errno.EINVAL),
    ("vm", requests.KVM_SET_NR_MMU_PAGES, 64, 0),
    ("vm", requests.KVM_IRQ_LINE, bytes(8), errno.ENXIO),
    ("vm", requests.KVM_GET_IRQCHIP, bytes(structs.IRQCHIP.size), errno.ENXIO),
    ("vm", requests.KVM_SET_IRQCHIP, bytes(structs.IRQCHIP.size), errno.ENXIO),
    ("vm", requests.KVM_CREATE_PIT, 0, errno.ENOENT),
    ("vm", requests.KVM_CREATE_PIT2, bytes(structs.PIT_CONFIG.size), errno.ENOENT),
    ("vm", requests.KVM_REINJECT_CONTROL, bytes(32), errno.ENXIO),
    ("vm", requests.KVM_SIGNAL_MSI, bytes(structs.MSI.size), errno.EINVAL),
    ("vm", requests.KVM_SET_CLOCK, structs.CLOCK_DATA.pack(0, 1, 0, 0), errno.EINVAL),
    ("vm", requests.KVM_SET_CLOCK, structs.CLOCK_DATA.pack(0, 16, 0, 0), errno.EINVAL),
    ("vm", requests.KVM_SET_TSC_KHZ, 1, errno.EINVAL),
    ("vm", requests.KVM_SET_TSC_KHZ, 0, 0),
    ("vm", requests.KVM_CREATE_DEVICE, structs.CREATE_DEVICE.pack(99, 0, 0), errno.ENODEV),
    ("vm", requests.KVM_GET_DIRTY_LOG, structs.DIRTY_LOG.pack(32764, 0), errno.EINVAL),
    ("vm", requests.KVM_GET_DIRTY_LOG, structs.DIRTY_LOG.pack(1 << 16, 0), errno.EINVAL),
    ("vm", requests.KVM_GET_DIRTY_LOG, structs.DIRTY_LOG.pack(5, 0), errno.ENOENT),
    ("vm", uapi.KVM_CREATE_GUEST_MEMFD, uapi.CREATE_GUEST_MEMFD.pack(PAGE, 0), errno.ENOTTY),
    ("vm", uapi.KVM_MEMORY_ENCRYPT_REG_REGION, uapi.ENC_REGION.pack(0, PAGE), errno.ENOTTY),
    ("vm", uapi.KVM_SET_MEMORY_ATTRIBUTES, uapi.MEMORY_ATTRIBUTES.pack(0, PAGE, 8, 0),
     errno.EINVAL),
    ("vm", uapi.KVM_SET_MEMORY_ATTRIBUTES, uapi.MEMORY_ATTRIBUTES.pack(0, PAGE, 0, 0), 0),
    ("vm", requests.KVM_ENABLE_CAP, structs.ENABLE_CAP.pack(201, 1, 0, 0, 0, 0), errno.EINVAL),
    ("vm", requests.KVM_ENABLE_CAP, structs.ENABLE_CAP.pack(201, 0, 1, 0, 0, 0), errno.EINVAL),
    ("vm", requests.KVM_ENABLE_CAP, structs.ENABLE_CAP.pack(201, 0, 4096, 0, 0, 0), 0),
    ("vm", requests.KVM_ENABLE_CAP, structs.ENABLE_CAP.pack(9999, 0, 0, 0, 0, 0), errno.EINVAL),
    ("vm", requests.KVM_ENABLE_CAP, structs.ENABLE_CAP.pack(128, 0, 4097, 0, 0, 0), errno.EINVAL),
    ("vcpu", uapi.KVM_RUN, 1, errno.EINVAL),
    ("vcpu", requests.KVM_SET_XCRS, bytes(structs.XCRS_SIZE), errno.EINVAL),
    ("vcpu", requests.KVM_SET_DEBUGREGS, structs.DEBUGREGS.pack(0, 0, 0, 0, 0, 0, 1),
     errno.EINVAL),
    ("vcpu", requests.KVM_SET_DEBUGREGS, structs.DEBUGREGS.pack(0, 0, 0, 0, 1 << 32, 0, 0),
     errno.EINVAL),
    ("vcpu", requests.KVM_GET_MSRS, MSRS.pack(256, 0), errno.E2BIG),
    ("vcpu", requests.KVM_SET_MSRS, MSRS.pack(1 << 31, 0), errno.E2BIG),
    ("vcpu", requests.KVM_SET_CPUID2, structs.CPUID2.pack(257), errno.E2BIG),
    ("vcpu", requests.KVM_SET_CPUID, structs.CPUID2.pack(257), errno.E2BIG),
    ("vcpu", requests.KVM_GET_CPUID2, structs.CPUID2.pack(0), errno.E2BIG),
    ("vcpu", requests.KVM_SET_MP_STATE, structs.MP_STATE.pack(3), errno.EINVAL),
    ("vcpu", requests.KVM_SET_MP_STATE, structs.MP_STATE.pack(99), errno.EINVAL),
    ("vcpu", requests.KVM_SET_MP_STATE, structs.MP_STATE.pack(0), 0),
    ("vcpu", requests.KVM_INTERRUPT, structs.INTERRUPT.pack(256), errno.EINVAL),
    ("vcpu", requests.KVM_SET_SIGNAL_MASK, struct.pack("<IQ", 4, 0), errno.EINVAL),
    ("vcpu", requests.KVM_SET_SIGNAL_MASK, struct.pack("<IQ", 8, 0), 0),
    ("vcpu", requests.KVM_SET_SIGNAL_MASK, 0, 0),
    ("vcpu", requests.KVM_GET_LAPIC, bytes(1024), errno.EINVAL),
    ("vcpu", requests.KVM_SET_LAPIC, bytes(1024), errno.EINVAL),
    ("vcpu", requests.KVM_KVMCLOCK_CTRL, 0, errno.EINVAL),
    ("vcpu", requests.KVM_SET_GUEST_DEBUG, bytes(structs.GUEST_DEBUG.size), 0),
    ("vcpu", requests.KVM_TPR_ACCESS_REPORTING, structs.TPR_ACCESS_CTL.pack(0, 1), errno.EINVAL),
    ("vcpu", requests.KVM_TPR_ACCESS_REPORTING, structs.TPR_ACCESS_CTL.pack(1, 0), 0),
    ("vcpu", requests.KVM_SET_VAPIC_ADDR, bytes(8), errno.EINVAL),
    ("vcpu", requests.KVM_SET_TSC_KHZ, 77, errno.EINVAL),
    ("vcpu", requests.KVM_X86_SETUP_MCE, structs.U64_VALUE.pack(0), errno.EINVAL),
    ("vcpu", requests.KVM_X86_SETUP_MCE, structs.U64_VALUE.pack(33), errno.EINVAL),
    ("vcpu", requests.KVM_X86_SETUP_MCE, structs.U64_VALUE.pack(1 << 9 | 1), errno.EINVAL),
    ("vcpu", requests.KVM_X86_SETUP_MCE, structs.U64_VALUE.pack(1 << 24 | 10), 0),
    ("vcpu", requests.KVM_ENABLE_CAP, structs.ENABLE_CAP.pack(201, 0, 0, 0, 0, 0), errno.EINVAL),
    ("vcpu", uapi.KVM_PRE_FAULT_MEMORY, uapi.PRE_FAULT_MEMORY.pack(0, PAGE, 1), errno.EINVAL),
    ("vcpu", uapi.KVM_PRE_FAULT_MEMORY, uapi.PRE_FAULT_MEMORY.pack(0, 0, 0), errno.EINVAL),
    ("vcpu", uapi.KVM_PRE_FAULT_MEMORY, uapi.PRE_FAULT_MEMORY.pack(0, PAGE, 0), errno.ENOENT),
]  # fmt: skip


def _max_vcpu_id(limit: int) -> bytes:
    return structs.ENABLE_CAP.pack(capabilities.KVM_CAP_MAX_VCPU_ID, 0, limit, 0, 0, 0)


#: Request, argument, errno: one after the other on a VM without vCPUs.
VCPU_IDS = [
    (requests.KVM_SET_BOOT_CPU_ID, 4096, 0),
    (requests.KVM_SET_BOOT_CPU_ID, 4097, errno.EINVAL),
    (requests.KVM_SET_BOOT_CPU_ID, 1 << 32, errno.EINVAL),
    (requests.KVM_SET_BOOT_CPU_ID, 5, 0),
    (requests.KVM_ENABLE_CAP, _max_vcpu_id(0), errno.EINVAL),
    (requests.KVM_ENABLE_CAP, _max_vcpu_id(4), errno.EINVAL),
    (requests.KVM_ENABLE_CAP, _max_vcpu_id(4097), errno.EINVAL),
    (requests.KVM_ENABLE_CAP, _max_vcpu_id(5), 0),
    (requests.KVM_ENABLE_CAP, _max_vcpu_id(5), 0),
    (requests.KVM_ENABLE_CAP, _max_vcpu_id(6), errno.EINVAL),
    (requests.KVM_SET_BOOT_CPU_ID, 6, errno.EINVAL),
    (requests.KVM_SET_BOOT_CPU_ID, 5, 0),
    (uapi.KVM_CREATE_VCPU, 5, errno.EINVAL),
    (requests.KVM_SET_BOOT_CPU_ID, 3, 0),
    (requests.KVM_ENABLE_CAP, _max_vcpu_id(3), errno.EINVAL),
    (uapi.KVM_CREATE_VCPU, 4, 0),
    (requests.KVM_SET_BOOT_CPU_ID, 3, errno.EBUSY),
    (requests.KVM_SET_BOOT_CPU_ID, 1 << 32, errno.EBUSY),
    (requests.KVM_ENABLE_CAP, _max_vcpu_id(5), 0),
]


WRONG_LEVEL = [
    ("system", requests.KVM_SET_DEVICE_ATTR, errno.EINVAL),
    ("system", uapi.KVM_CREATE_GUEST_MEMFD, errno.EINVAL),
    ("system", uapi.KVM_CREATE_VCPU, errno.EINVAL),
    ("system", uapi.KVM_RUN, errno.EINVAL),
    ("system", uapi.KVM_SET_USER_MEMORY_REGION, errno.EINVAL),
    ("vm", uapi.KVM_CREATE_VM, errno.ENOTTY),
    ("vm", uapi.KVM_RUN, errno.ENOTTY),
    ("vm", requests.KVM_GET_REGS, errno.ENOTTY),
    ("vm", uapi.KVM_PRE_FAULT_MEMORY, errno.ENOTTY),
    ("vcpu", uapi.KVM_CREATE_VCPU, errno.EINVAL),
    ("vcpu", uapi.KVM_CHECK_EXTENSION, errno.EINVAL),
    ("vcpu", uapi.KVM_SET_USER_MEMORY_REGION, errno.EINVAL),
]
