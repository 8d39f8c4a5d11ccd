# SPDX-License-Identifier: GPL-2.0-or-later
"""The requests that a VM's descriptor answers."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvmsim.device import irqchip, launch
from kvmsim.device.table import Answer, Call, Row, table
from kvmsim.uapi import (
    KVM_CHECK_EXTENSION,
    KVM_CREATE_GUEST_MEMFD,
    KVM_CREATE_VCPU,
    KVM_MEMORY_ENCRYPT_REG_REGION,
    KVM_MEMORY_ENCRYPT_UNREG_REGION,
    KVM_SET_MEMORY_ATTRIBUTES,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
    requests,
)

if TYPE_CHECKING:
    from kvmsim.device.vm import VmDevice

_Handler = Callable[["VmDevice", Call], Answer]


def _of_vm(name: str) -> _Handler:
    return lambda vm, call: getattr(vm, name)(call)


def _of_memory(name: str) -> _Handler:
    return lambda vm, call: getattr(vm.memory, name)(call)


_REGION_ERRORS: Final = (
    "EINVAL: slot id, flags, alignment, wrap, what the descriptor is, pages of it that are bound "
    "already, a change that needs a deletion; EEXIST: gfns overlap; ENOMEM: no address space"
)


def _without(rule: irqchip.Without) -> str:
    name = errno.errorcode[rule.number]
    return f"{name}: {rule.reason}" + (", always" if rule.always else "; else EOPNOTSUPP")


TABLE: Final = table(
    (
        Row(KVM_CREATE_VCPU, _of_vm("create_vcpu"), "a vCPU on an engine of its own",
            "EINVAL: id from 4096 on, more than 256 vCPUs; EEXIST: the id is taken"),
        Row(KVM_SET_USER_MEMORY_REGION, _of_memory("set_region"),
            "all. v7: also 160 bytes with KVM_MEM_PRIVATE", _REGION_ERRORS),
        Row(KVM_SET_USER_MEMORY_REGION2, _of_memory("set_region2"),
            "all; a private file of any privfs mount can be bound",
            _REGION_ERRORS + "; EBADF: guest_memfd is not open; v7: ENOTTY"),
        Row(KVM_SET_MEMORY_ATTRIBUTES, _of_memory("set_attributes"), "all",
            "EINVAL: flags, attributes that this VM type lacks, size 0, wrap, not aligned"),
        Row(requests.KVM_MEMORY_ENCRYPT_OP, launch.operation,
            "commands of [TDs](#commands-of-a-td) and [SNP guests](#commands-of-an-snp-guest)",
            "ENOTTY: a VM of another type; else the command's"),
        Row(KVM_MEMORY_ENCRYPT_REG_REGION, launch.region,
            "SNP guests: sees that the hvas are there; v7: makes a range of gpas private",
            "ENOTTY: another type, or no KVM_SEV_INIT2; EINVAL: size 0, wrap; ENOMEM: a gap"),
        Row(KVM_MEMORY_ENCRYPT_UNREG_REGION, launch.region,
            "SNP guests: the same, back; v7: makes a range of gpas shared",
            "ENOTTY: as above; EINVAL: no such region"),
        Row(KVM_CREATE_GUEST_MEMFD, _of_memory("create_guest_memfd"),
            "an unlinked file on the privfs mount",
            "EINVAL: size 0 or not aligned, flags that the mount lacks; ENOTTY: no mount, v7; "
            "what the mount answers"),
        Row(requests.KVM_GET_DIRTY_LOG, _of_memory("get_dirty_log"),
            "all; reading it takes the marks", "ENOENT: the slot does not log; EINVAL: slot id"),
        Row(KVM_CHECK_EXTENSION, _of_vm("check_extension"), "only what is there"),
        Row(requests.KVM_ENABLE_CAP, _of_vm("enable_cap"),
            "KVM_CAP_EXIT_HYPERCALL, KVM_CAP_MAX_VCPU_ID, KVMSIM_CAP_MAP_GPA_RANGES; of TDs and "
            "SNP guests KVM_CAP_SPLIT_IRQCHIP",
            "EINVAL: others, flags, arguments, KVM_CAP_MAX_VCPU_ID below the boot CPU's id or "
            "another one than before; EEXIST: KVM_CAP_SPLIT_IRQCHIP twice, after a vCPU"),
        Row(requests.KVM_SET_BOOT_CPU_ID, _of_vm("set_boot_cpu_id"), "all",
            "EBUSY: there are vCPUs; EINVAL: above 4096 or KVM_CAP_MAX_VCPU_ID"),
        Row(requests.KVM_CREATE_IRQCHIP, _of_vm("create_irqchip"),
            "no controller; HLT and INIT wait inside KVM_RUN, for a signal or an NMI",
            "EEXIST: twice; EINVAL: there are vCPUs"),
        *(Row(request, irqchip.refuse, "nothing", _without(rule))
          for request, rule in irqchip.RULES.items()),
        Row(requests.KVM_SET_TSS_ADDR, _of_vm("set_tss_addr"), "checked, not needed",
            "EINVAL: beyond 4 GiB"),
        Row(requests.KVM_SET_IDENTITY_MAP_ADDR, _of_vm("set_identity_map_addr"),
            "checked, not needed", "EINVAL: there are vCPUs"),
        Row(requests.KVM_SET_NR_MMU_PAGES, _of_vm("set_nr_mmu_pages"),
            "checked; tables are not limited",
            "EINVAL: below 64"),
        Row(requests.KVM_GET_CLOCK, _of_vm("get_clock"), "monotonic since the VM was made"),
        Row(requests.KVM_SET_CLOCK, _of_vm("set_clock"), "all", "EINVAL: flags"),
        Row(requests.KVM_GET_TSC_KHZ, _of_vm("get_tsc_khz"), "the host's"),
        Row(requests.KVM_SET_TSC_KHZ, _of_vm("check_tsc_khz"), "the host's alone",
            "EINVAL: another frequency"),
        Row(requests.KVM_CREATE_DEVICE, _of_vm("create_device"), "no device", "ENODEV: always"),
    )
)  # fmt: skip
"""By request number."""
