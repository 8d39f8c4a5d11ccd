# SPDX-License-Identifier: GPL-2.0-or-later
"""Sub-commands of KVM_MEMORY_ENCRYPT_OP for TDs.

arch/x86/include/uapi/asm/kvm.h and Documentation/virt/kvm/x86/intel-tdx.rst (v6.18).
"""

from __future__ import annotations

from struct import Struct
from typing import Final

KVM_TDX_CAPABILITIES: Final = 0
KVM_TDX_INIT_VM: Final = 1
KVM_TDX_INIT_VCPU: Final = 2
KVM_TDX_INIT_MEM_REGION: Final = 3
KVM_TDX_FINALIZE_VM: Final = 4
KVM_TDX_GET_CPUID: Final = 5

KVM_TDX_MEASURE_MEMORY_REGION: Final = 1 << 0

TDX_TD_ATTR_SEPT_VE_DISABLE: Final = 1 << 28

TDX_CMD: Final = Struct("<IIQQ")
"""id, flags, data, hw_error."""
TDX_CAPABILITIES: Final = Struct("<6Q2000x")
"""supported_attrs, supported_xfam, kernel_tdvmcallinfo_1_r11, user_tdvmcallinfo_1_r11,
kernel_tdvmcallinfo_1_r12, user_tdvmcallinfo_1_r12; struct kvm_cpuid2 follows."""
TDX_INIT_VM: Final = Struct("<QQ48s48s48s96s")
"""attributes, xfam, mrconfigid, mrowner, mrownerconfig, reserved; struct kvm_cpuid2 follows."""
TDX_INIT_MEM_REGION: Final = Struct("<QQQ")
"""source_addr, gpa, nr_pages."""
CPUID2_HEAD: Final = Struct("<II")
"""nent, padding: struct kvm_cpuid2 where its padding counts."""
