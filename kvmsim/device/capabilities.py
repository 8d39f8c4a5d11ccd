# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM_CHECK_EXTENSION answers: only what is there.

kvm_vm_ioctl_check_extension_generic() of virt/kvm/kvm_main.c and kvm_vm_ioctl_check_extension()
of arch/x86/kvm/x86.c (v6.18). A capability that no table has is 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from kvmsim.device.hypercall import FORWARDABLE
from kvmsim.kind import KINDS, VmKind
from kvmsim.uapi import (
    ABIS,
    GUEST_MEMFD_FLAG_INIT_SHARED,
    KVM_CAP_EXIT_HYPERCALL,
    KVM_CAP_GUEST_MEMFD,
    KVM_CAP_GUEST_MEMFD_FLAGS,
    KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES,
    KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CAP_MEMORY_FAULT_INFO,
    KVM_CAP_NR_MEMSLOTS,
    KVM_CAP_PRE_FAULT_MEMORY,
    KVM_CAP_USER_MEMORY,
    KVM_CAP_USER_MEMORY2,
    KVM_CAP_VM_TYPES,
    KVM_MAX_VCPU_IDS,
    KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS,
    KVM_USER_MEM_SLOTS,
    KVMSIM_CAP_MAP_GPA_RANGES,
    KVMSIM_MAP_GPA_RANGES_MAX,
    KVMSIM_SHARED_BIT_VM,
    Abi,
    structs,
)
from kvmsim.uapi import capabilities as cap

MAX_VCPUS: Final = 256
"""vCPUs of a VM: each has an engine of about 3 MiB."""

VM_TYPES: Final[Mapping[Abi, Mapping[int, VmKind]]] = MappingProxyType(
    {
        "upstream": MappingProxyType(
            {
                KINDS["default"].vm_type: KINDS["default"],
                KINDS["sw-protected"].vm_type: KINDS["sw-protected"],
                KINDS["snp"].vm_type: KINDS["snp"],
                KINDS["tdx"].vm_type: KINDS["tdx"],
                KVMSIM_SHARED_BIT_VM: KINDS["shared-bit"],
            }
        ),
        # v7 has no VM types; its guests select the side by an address bit, as TDX's do.
        "v7": MappingProxyType({0: KINDS["shared-bit"]}),
    }
)
"""The argument of KVM_CREATE_VM, where nothing else was asked for."""

OFFERED: Final[Mapping[str, int]] = MappingProxyType(
    {
        name: KVMSIM_SHARED_BIT_VM if name == "shared-bit" else kind.vm_type
        for name, kind in KINDS.items()
        if kind.vm_type < KVMSIM_SHARED_BIT_VM  # pKVM's is a flag of Arm's argument, no number
    }
)
"""Types that a device can be told to have, by the name of their kind."""


def vm_types(names: Iterable[str]) -> Mapping[int, VmKind]:
    """The types of these names (:data:`OFFERED`, else KeyError) and no others."""
    return MappingProxyType({OFFERED[name]: KINDS[name] for name in names})


CLOCK_FLAGS: Final = cap.KVM_CLOCK_TSC_STABLE | cap.KVM_CLOCK_REALTIME | cap.KVM_CLOCK_HOST_TSC


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks: ``kind`` is None on /dev/kvm."""

    abi: Abi
    kind: VmKind | None
    gmem_flags: int | None
    """GUEST_MEMFD_FLAG_* of the mount, None: there is none."""
    in_place: bool = False
    """Whether files convert in place, and keep the types (gmem_in_place_conversion)."""

    types: Mapping[int, VmKind] | None = None
    """The types of VMs if they are not those of the interface."""

    @property
    def upstream(self) -> bool:
        """Whether the interface is that of today."""
        return self.abi == "upstream"


def _attributes(asked: Asked) -> int:
    """kvm_supported_mem_attributes()."""
    if not asked.upstream or (asked.kind is not None and not asked.kind.private_memory):
        return 0
    return ABIS[asked.abi].attribute_private


def gmem_flags(asked: Asked) -> int:
    """kvm_gmem_get_supported_flags(): what KVM_CREATE_GUEST_MEMFD takes.

    A VM with private memory has none that begins as shared (kvm_arch_supports_gmem_init_shared()),
    but where files convert.
    """
    flags = asked.gmem_flags or 0
    if asked.kind is not None and asked.kind.private_memory and not asked.in_place:
        flags &= ~GUEST_MEMFD_FLAG_INIT_SHARED
    return flags


def _types(asked: Asked) -> int:
    types = VM_TYPES[asked.abi] if asked.types is None else asked.types
    return sum(1 << number for number in types) if asked.upstream else 0


def sync_regs(kind: VmKind | None) -> int:
    """kvm_sync_valid_fields(): what of a vCPU travels in struct kvm_run."""
    if kind is not None and kind.protected_state:
        return 0
    return KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS


_ONE: Final = (
    KVM_CAP_USER_MEMORY,
    cap.KVM_CAP_HLT,
    cap.KVM_CAP_MMU_SHADOW_CACHE_CONTROL,
    cap.KVM_CAP_SET_TSS_ADDR,
    cap.KVM_CAP_EXT_CPUID,
    cap.KVM_CAP_CLOCKSOURCE,
    cap.KVM_CAP_NOP_IO_DELAY,
    cap.KVM_CAP_MP_STATE,
    cap.KVM_CAP_SYNC_MMU,
    cap.KVM_CAP_DESTROY_MEMORY_REGION_WORKS,
    cap.KVM_CAP_USER_NMI,
    cap.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS,
    cap.KVM_CAP_SET_BOOT_CPU_ID,
    cap.KVM_CAP_SET_IDENTITY_MAP_ADDR,
    cap.KVM_CAP_INTERNAL_ERROR_DATA,
    cap.KVM_CAP_VCPU_EVENTS,
    cap.KVM_CAP_DEBUGREGS,
    cap.KVM_CAP_XSAVE,
    cap.KVM_CAP_GET_TSC_KHZ,
    cap.KVM_CAP_KVMCLOCK_CTRL,
    cap.KVM_CAP_EXT_EMUL_CPUID,
    cap.KVM_CAP_ENABLE_CAP_VM,
    cap.KVM_CAP_CHECK_EXTENSION_VM,
    cap.KVM_CAP_IMMEDIATE_EXIT,
    cap.KVM_CAP_GET_MSR_FEATURES,
    cap.KVM_CAP_SREGS2,
    cap.KVM_CAP_SYS_ATTRIBUTES,
)

_VALUES: Final[Mapping[int, Callable[[Asked], int]]] = MappingProxyType(
    {
        KVM_CAP_NR_MEMSLOTS: lambda asked: KVM_USER_MEM_SLOTS,
        KVM_CAP_VM_TYPES: _types,
        KVM_CAP_USER_MEMORY2: lambda asked: int(asked.upstream),
        KVM_CAP_MEMORY_FAULT_INFO: lambda asked: int(asked.upstream),
        KVM_CAP_MEMORY_ATTRIBUTES: lambda asked: 0 if asked.in_place else _attributes(asked),
        KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES: lambda asked: (
            _attributes(asked) if asked.in_place else 0
        ),
        KVM_CAP_GUEST_MEMFD: lambda asked: int(asked.upstream and asked.gmem_flags is not None),
        KVM_CAP_GUEST_MEMFD_FLAGS: lambda asked: gmem_flags(asked) if asked.upstream else 0,
        KVM_CAP_PRE_FAULT_MEMORY: lambda asked: int(asked.upstream),
        KVM_CAP_EXIT_HYPERCALL: lambda asked: FORWARDABLE,
        KVMSIM_CAP_MAP_GPA_RANGES: lambda asked: KVMSIM_MAP_GPA_RANGES_MAX * asked.upstream,
        cap.KVM_CAP_READONLY_MEM: lambda asked: int(
            asked.kind is None or not asked.kind.protected_state
        ),
        # VMMs of TDs begin with it (tdx_vcpu_create() wants a local APIC); others go without.
        cap.KVM_CAP_SPLIT_IRQCHIP: lambda asked: int(
            asked.kind is not None and asked.kind.protected_state
        ),
        cap.KVM_CAP_NR_VCPUS: lambda asked: min(os.cpu_count() or 1, MAX_VCPUS),
        cap.KVM_CAP_MAX_VCPUS: lambda asked: MAX_VCPUS,
        # As of any KVM on x86: QEMU asks, and goes without where it makes no KVM_CREATE_IRQCHIP.
        cap.KVM_CAP_IRQ_ROUTING: lambda asked: cap.KVM_MAX_IRQ_ROUTES,
        cap.KVM_CAP_MAX_VCPU_ID: lambda asked: KVM_MAX_VCPU_IDS,
        cap.KVM_CAP_MCE: lambda asked: cap.KVM_MAX_MCE_BANKS,
        cap.KVM_CAP_ADJUST_CLOCK: lambda asked: CLOCK_FLAGS,
        cap.KVM_CAP_SYNC_REGS: lambda asked: sync_regs(asked.kind),
        cap.KVM_CAP_XSAVE2: lambda asked: structs.XSAVE_SIZE,
    }
)


def check_extension(number: int, asked: Asked) -> int:
    """The answer; 0 for what is not there."""
    if number in _ONE:
        return 1
    value = _VALUES.get(number)
    return value(asked) if value is not None else 0
