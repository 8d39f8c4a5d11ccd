# SPDX-License-Identifier: GPL-2.0-or-later
"""Sub-commands of KVM_MEMORY_ENCRYPT_OP for SEV-SNP guests.

arch/x86/include/uapi/asm/kvm.h and Documentation/virt/kvm/x86/amd-memory-encryption.rst (v6.18).
"""

from __future__ import annotations

from struct import Struct
from typing import Final

KVM_SEV_INIT: Final = 0
KVM_SEV_ES_INIT: Final = 1
KVM_SEV_LAUNCH_START: Final = 2
KVM_SEV_SEND_UPDATE_VMSA: Final = 10
KVM_SEV_RECEIVE_UPDATE_VMSA: Final = 14
KVM_SEV_CERT_EXPORT: Final = 19
KVM_SEV_SEND_CANCEL: Final = 21
KVM_SEV_INIT2: Final = 22
KVM_SEV_SNP_LAUNCH_START: Final = 100
KVM_SEV_SNP_LAUNCH_UPDATE: Final = 101
KVM_SEV_SNP_LAUNCH_FINISH: Final = 102

KVM_SEV_SNP_PAGE_TYPE_NORMAL: Final = 1
KVM_SEV_SNP_PAGE_TYPE_ZERO: Final = 3
KVM_SEV_SNP_PAGE_TYPE_UNMEASURED: Final = 4
KVM_SEV_SNP_PAGE_TYPE_SECRETS: Final = 5
KVM_SEV_SNP_PAGE_TYPE_CPUID: Final = 6

KVM_SEV_SNP_ID_BLOCK_SIZE: Final = 96
KVM_SEV_SNP_ID_AUTH_SIZE: Final = 4096

SEV_CMD: Final = Struct("<I4xQII")
"""id, data, error, sev_fd."""
SEV_CMD_ERROR_OFFSET: Final = 16
SEV_INIT: Final = Struct("<QIH34x")
"""vmsa_features, flags, ghcb_version."""
SNP_LAUNCH_START: Final = Struct("<Q16sH38x")
"""policy, gosvw, flags."""
SNP_LAUNCH_UPDATE: Final = Struct("<QQQBxH36x")
"""gfn_start, uaddr, len, type, flags."""
SNP_LAUNCH_UPDATE_DONE: Final = Struct("<QQQ")
"""What of it KVM writes: gfn_start, uaddr, len."""
SNP_LAUNCH_FINISH: Final = Struct("<QQBBB32s3xH32x")
"""id_block_uaddr, id_auth_uaddr, id_block_en, auth_key_en, vcek_disabled, host_data, flags."""
