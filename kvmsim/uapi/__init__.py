# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM's user interface: ioctl numbers, struct layouts, flags and exit reasons.

Names and numbers are those of include/uapi/linux/kvm.h (v6.18). Where the July 2022 series ("v7",
"KVM: mm: fd-based approach for supporting KVM guest private memory") has another number or answer
for the same thing, both stand in :data:`ABIS` and nowhere else.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from types import MappingProxyType
from typing import Final, Literal

from kvmsim.uapi.capabilities import *  # noqa: F403
from kvmsim.uapi.encoding import KVMIO as KVMIO
from kvmsim.uapi.encoding import io as io
from kvmsim.uapi.encoding import ior as ior
from kvmsim.uapi.encoding import iow as iow
from kvmsim.uapi.encoding import iowr as iowr
from kvmsim.uapi.requests import *  # noqa: F403

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
U64: Final = 1 << 64

EHWPOISON: Final = 133  # asm-generic/errno.h; the errno module has it on no Python yet

# --- argument structs, little-endian as on x86 -----------------------------------------------

USERSPACE_MEMORY_REGION: Final = Struct("<IIQQQ")
"""slot, flags, guest_phys_addr, memory_size, userspace_addr."""

USERSPACE_MEMORY_REGION2: Final = Struct("<IIQQQQI4x112x")
"""The same, then guest_memfd_offset, guest_memfd; v7's kvm_userspace_memory_region_ext."""

MEMORY_ATTRIBUTES: Final = Struct("<QQQQ")
"""address, size, attributes, flags."""

MEMORY_ATTRIBUTES2: Final = Struct("<QQQQQ11Q")
"""offset, size, attributes, flags, error_offset (out), reserved; of the in-place series."""

ENC_REGION: Final = Struct("<QQ")
"""addr, size; in v7 a guest-physical range."""

CREATE_GUEST_MEMFD: Final = Struct("<QQ48x")
"""size, flags."""

PRE_FAULT_MEMORY: Final = Struct("<QQQ40x")
"""gpa, size, flags."""

# --- ioctls ----------------------------------------------------------------------------------

KVM_API_VERSION: Final = 12
KVM_GET_API_VERSION: Final = io(0x00)
KVM_CREATE_VM: Final = io(0x01)
KVM_CHECK_EXTENSION: Final = io(0x03)
KVM_GET_VCPU_MMAP_SIZE: Final = io(0x04)
KVM_CREATE_VCPU: Final = io(0x41)
KVM_SET_USER_MEMORY_REGION: Final = iow(0x46, USERSPACE_MEMORY_REGION.size)
KVM_SET_USER_MEMORY_REGION2: Final = iow(0x49, USERSPACE_MEMORY_REGION2.size)
KVM_RUN: Final = io(0x80)
KVM_MEMORY_ENCRYPT_REG_REGION: Final = ior(0xBB, ENC_REGION.size)
KVM_MEMORY_ENCRYPT_UNREG_REGION: Final = ior(0xBC, ENC_REGION.size)
KVM_SET_MEMORY_ATTRIBUTES: Final = iow(0xD2, MEMORY_ATTRIBUTES.size)
KVM_SET_MEMORY_ATTRIBUTES2: Final = iowr(0xD2, MEMORY_ATTRIBUTES2.size)
KVM_CREATE_GUEST_MEMFD: Final = iowr(0xD4, CREATE_GUEST_MEMFD.size)
KVM_PRE_FAULT_MEMORY: Final = iowr(0xD5, PRE_FAULT_MEMORY.size)

# --- capabilities (KVM_CHECK_EXTENSION) ------------------------------------------------------

KVM_CAP_USER_MEMORY: Final = 3
KVM_CAP_NR_MEMSLOTS: Final = 10
KVM_CAP_EXIT_HYPERCALL: Final = 201
KVM_CAP_USER_MEMORY2: Final = 231
KVM_CAP_MEMORY_FAULT_INFO: Final = 232
KVM_CAP_MEMORY_ATTRIBUTES: Final = 233
KVM_CAP_GUEST_MEMFD: Final = 234
KVM_CAP_VM_TYPES: Final = 235
KVM_CAP_PRE_FAULT_MEMORY: Final = 236
KVM_CAP_GUEST_MEMFD_FLAGS: Final = 244
KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES: Final = 250  # of the in-place series, not merged

# --- VM types (arch/x86/include/uapi/asm/kvm.h): the argument of KVM_CREATE_VM ----------------

KVM_X86_DEFAULT_VM: Final = 0
KVM_X86_SW_PROTECTED_VM: Final = 1
KVM_X86_SNP_VM: Final = 4
KVM_X86_TDX_VM: Final = 5
KVM_VM_TYPE_ARM_PROTECTED: Final = 1 << 31

# --- flags of KVM_CREATE_GUEST_MEMFD ---------------------------------------------------------

GUEST_MEMFD_FLAG_MMAP: Final = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED: Final = 1 << 1

# --- memslots --------------------------------------------------------------------------------

KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEM_READONLY: Final = 1 << 1
KVM_MEM_GUEST_MEMFD: Final = 1 << 2
KVM_MEM_PRIVATE: Final = KVM_MEM_GUEST_MEMFD  # v7's name of the same bit

KVM_USER_MEM_SLOTS: Final = 32764  # SHRT_MAX - KVM_INTERNAL_MEM_SLOTS (3) on x86
KVM_MEM_MAX_NR_PAGES: Final = (1 << 31) - 1

KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3

# What becomes of contents when a file converts in place; without either no promise is made.
KVM_SET_MEMORY_ATTRIBUTES2_ZERO: Final = 1 << 0
KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE: Final = 1 << 1

# --- hypercalls (include/uapi/linux/kvm_para.h) ----------------------------------------------

KVM_HC_MAP_GPA_RANGE: Final = 12
KVM_MAP_GPA_RANGE_ENCRYPTED: Final = 1 << 4

# --- an extension of this project, with numbers far from the kernel's (kvmsim/rangelist.py) -----

KVMSIM_CAP_MAP_GPA_RANGES: Final = 0x6B76_0001
KVMSIM_HC_MAP_GPA_RANGES: Final = 0x6B76_0001
MAP_GPA_RANGE: Final = Struct("<3Q")
KVMSIM_MAP_GPA_RANGES_MAX: Final = PAGE_SIZE // MAP_GPA_RANGE.size

# --- exits -----------------------------------------------------------------------------------

KVM_EXIT_UNKNOWN: Final = 0
KVM_EXIT_IO: Final = 2
KVM_EXIT_HYPERCALL: Final = 3
KVM_EXIT_HLT: Final = 5
KVM_EXIT_MMIO: Final = 6
KVM_EXIT_SHUTDOWN: Final = 8
KVM_EXIT_INTR: Final = 10
KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_EXIT_SYSTEM_EVENT: Final = 24
KVM_EXIT_MEMORY_FAULT: Final = 39

KVM_EXIT_IO_IN: Final = 0
KVM_EXIT_IO_OUT: Final = 1

KVM_INTERNAL_ERROR_EMULATION: Final = 1
KVM_INTERNAL_ERROR_DELIVERY_EV: Final = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: Final = 4

KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3

# struct kvm_run: where the parts of the mapping are that an exit fills in.
KVM_RUN_IMMEDIATE_EXIT_OFFSET: Final = 1
KVM_RUN_EXIT_REASON_OFFSET: Final = 8
KVM_RUN_UNION_OFFSET: Final = 32
KVM_RUN_UNION_SIZE: Final = 256
KVM_PIO_DATA_OFFSET: Final = PAGE_SIZE  # x86: KVM_PIO_PAGE_OFFSET is 1
KVM_RUN_MMAP_SIZE: Final = 3 * PAGE_SIZE  # kvm_run, PIO data, coalesced MMIO ring

RUN_EXIT_REASON: Final = Struct("<I")
RUN_IO: Final = Struct("<BBHIQ")
"""direction, size, port, count, data_offset."""
RUN_MMIO: Final = Struct("<Q8sIB")
"""phys_addr, data, len, is_write."""
RUN_HYPERCALL: Final = Struct("<Q6QQQ")
"""nr, args, ret, flags."""
RUN_INTERNAL: Final = Struct("<II")
"""suberror, ndata; ndata u64 follow."""
RUN_INTERNAL_DATA_MAX: Final = 16
RUN_SYSTEM_EVENT: Final = Struct("<II")
"""type, ndata; u64 data[16] follows, as of an internal error."""
KVM_SYSTEM_EVENT_SEV_TERM: Final = 6
KVM_SYSTEM_EVENT_TDX_FATAL: Final = 7

# --- the two interfaces ----------------------------------------------------------------------

Abi = Literal["upstream", "v7"]


@dataclass(frozen=True, slots=True)
class AbiNumbers:
    """What differs between v7 and upstream, by meaning."""

    exit_memory_fault: int
    memory_fault: Struct
    """Layout of the exit; the unnamed word of v7 is padding."""
    memory_fault_private: int
    """The flag of the exit that says the access was private."""
    attribute_private: int
    """What a private gfn holds in the attribute map."""
    conversion_errno: int | None
    """What KVM_RUN fails with on a conversion exit; None: it returns 0."""
    region_ioctl: int
    """The ioctl that accepts a private file."""
    bad_fd_errno: int
    """A private fd that is not open."""
    checks_file: bool
    """Whether a slot must lie inside its file and share no file page with another slot."""
    private_slot_refuses: int
    """Slot flags refused together with a private file."""
    private_slot_needs_private_memory: bool
    """Whether only VMs with private memory may bind one (kvm_arch_private_mem_supported())."""


ABIS: Final[Mapping[Abi, AbiNumbers]] = MappingProxyType(
    {
        "upstream": AbiNumbers(
            exit_memory_fault=KVM_EXIT_MEMORY_FAULT,
            memory_fault=Struct("<QQQ"),
            memory_fault_private=KVM_MEMORY_EXIT_FLAG_PRIVATE,
            attribute_private=KVM_MEMORY_ATTRIBUTE_PRIVATE,
            conversion_errno=errno.EFAULT,
            region_ioctl=KVM_SET_USER_MEMORY_REGION2,
            bad_fd_errno=errno.EBADF,
            checks_file=True,
            private_slot_refuses=KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY,
            private_slot_needs_private_memory=False,
        ),
        "v7": AbiNumbers(
            exit_memory_fault=37,  # KVM_EXIT_NOTIFY upstream
            memory_fault=Struct("<I4xQQ"),
            memory_fault_private=1 << 0,  # KVM_MEMORY_EXIT_FLAG_PRIVATE
            attribute_private=1 << 0,  # KVM_MEM_ATTR_PRIVATE
            conversion_errno=None,
            region_ioctl=KVM_SET_USER_MEMORY_REGION,
            bad_fd_errno=errno.EINVAL,
            checks_file=False,
            private_slot_refuses=0,
            private_slot_needs_private_memory=True,
        ),
    }
)


class KvmError(Exception):
    """A KVM ioctl refused; nothing was changed.

    ``errno`` is what the ioctl answers; ``operation`` the ioctl's name; ``slot`` the memslot id if
    one is concerned; ``start`` and ``size`` the guest-physical range in bytes.
    """

    def __init__(
        self,
        number: int,
        operation: str,
        reason: str,
        *,
        slot: int | None = None,
        start: int = 0,
        size: int = 0,
    ) -> None:
        self.errno = number
        self.operation = operation
        self.reason = reason
        self.slot = slot
        self.start = start
        self.size = size
        where = "" if slot is None else f" slot {slot}"
        if slot is not None or start or size:
            where += f" gpa {start:#x}+{size:#x}"
        name = errno.errorcode.get(number, str(number))
        super().__init__(f"{operation}{where}: {name}: {reason}")
