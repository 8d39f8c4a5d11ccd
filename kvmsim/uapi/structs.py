# SPDX-License-Identifier: GPL-2.0-or-later
"""Structures that KVM's ioctls take, as they lie in memory on x86-64.

include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h (v6.18). A layout is a
:class:`struct.Struct` with its fields named in the docstring; padding is skipped. Structures with
a flexible array are a header and an entry.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

# --- the system ------------------------------------------------------------------------------

CPUID2: Final = Struct("<I4x")
"""nent; nent entries follow."""
CPUID_ENTRY: Final = Struct("<IIIII4x")
"""struct kvm_cpuid_entry (KVM_SET_CPUID): function, eax, ebx, ecx, edx."""
CPUID_ENTRY2: Final = Struct("<IIIIIII12x")
"""function, index, flags, eax, ebx, ecx, edx."""
MSR_LIST: Final = Struct("<I")
"""nmsrs; nmsrs u32 indices follow."""
MSRS: Final = Struct("<I4x")
"""nmsrs; nmsrs entries follow."""
MSR_ENTRY: Final = Struct("<I4xQ")
"""index, data."""
DEVICE_ATTR: Final = Struct("<IIQQ")
"""flags, group, attr, addr."""

# --- a VM ------------------------------------------------------------------------------------

DIRTY_LOG: Final = Struct("<I4xQ")
"""slot, dirty_bitmap (address of a bit per page, in u64)."""
CLEAR_DIRTY_LOG: Final = Struct("<IIQQ")
"""slot, num_pages, first_page, dirty_bitmap."""
ENABLE_CAP: Final = Struct("<II4Q64x")
"""cap, flags, args."""
CLOCK_DATA: Final = Struct("<QI4xQQ16x")
"""clock, flags, realtime, host_tsc."""
IRQ_LEVEL: Final = Struct("<II")
"""irq (status, when the kernel writes), level."""
IRQCHIP: Final = Struct("<I4x512s")
"""chip_id, the chip's state."""
PIT_CONFIG: Final = Struct("<I60x")
"""flags."""
MSI: Final = Struct("<IIIII12x")
"""address_lo, address_hi, data, flags, devid."""
IRQ_ROUTING: Final = Struct("<II")
"""nr, flags; nr entries of 48 bytes follow."""
IRQ_ROUTING_ENTRY_SIZE: Final = 48
IRQFD: Final = Struct("<IIII16x")
"""fd, gsi, flags, resamplefd."""
IOEVENTFD: Final = Struct("<QQIiI36x")
"""datamatch, addr, len, fd, flags."""
COALESCED_MMIO_ZONE: Final = Struct("<QII")
"""addr, size, pio."""
CREATE_DEVICE: Final = Struct("<III")
"""type, fd, flags."""

# --- a vCPU ----------------------------------------------------------------------------------

REGS: Final = Struct("<18Q")
"""rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 … r15, rip, rflags."""
SEGMENT: Final = Struct("<QIHBBBBBBBBBx")
"""base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable."""
DTABLE: Final = Struct("<QH6x")
"""base, limit."""
SREGS_CONTROL: Final = Struct("<7Q")
"""cr0, cr2, cr3, cr4, cr8, efer, apic_base; behind eight segments and two tables."""
INTERRUPT_BITMAP: Final = Struct("<4Q")
"""struct kvm_sregs ends with it."""
SREGS2_TAIL: Final = Struct("<Q4Q")
"""struct kvm_sregs2 ends with: flags, pdptrs."""
SREGS_SIZE: Final = 8 * SEGMENT.size + 2 * DTABLE.size + SREGS_CONTROL.size + INTERRUPT_BITMAP.size
SREGS2_SIZE: Final = 8 * SEGMENT.size + 2 * DTABLE.size + SREGS_CONTROL.size + SREGS2_TAIL.size
FPU: Final = Struct("<128sHHBxHQQ256sI4x")
"""fpr (8 × 16), fcw, fsw, ftwx, last_opcode, last_ip, last_dp, xmm (16 × 16), mxcsr."""
FXSAVE: Final = Struct("<HHBxHQQII128s256s96x")
"""fcw, fsw, ftwx, last_opcode, last_ip, last_dp, mxcsr, mxcsr_mask, fpr, xmm (AMD APM vol. 2)."""
XSAVE_SIZE: Final = 4096
XSAVE_HEADER_OFFSET: Final = 512
XSAVE_HEADER: Final = Struct("<QQ48x")
"""xstate_bv, xcomp_bv."""
XCRS: Final = Struct("<II")
"""nr_xcrs, flags; 16 entries and 128 bytes follow."""
XCR: Final = Struct("<I4xQ")
"""xcr, value."""
XCRS_MAX: Final = 16
XCRS_SIZE: Final = XCRS.size + XCRS_MAX * XCR.size + 128
TRANSLATION: Final = Struct("<QQBBB5x")
"""linear_address, physical_address, valid, writeable, usermode."""
INTERRUPT: Final = Struct("<I")
"""irq."""
MP_STATE: Final = Struct("<I")
"""mp_state."""
SIGNAL_MASK: Final = Struct("<I")
"""len; a sigset of len bytes follows."""
VCPU_EVENTS: Final = Struct("<4BI 4B 3Bx I I 4B B 26x B Q")
"""exception: injected, nr, has_error_code, pending, error_code; interrupt: injected, nr, soft,
shadow; nmi: injected, pending, masked; sipi_vector; flags; smi: smm, pending, smm_inside_nmi,
latched_init; triple_fault pending; exception_has_payload; exception_payload."""
DEBUGREGS: Final = Struct("<4QQQQ72x")
"""db, dr6, dr7, flags."""
LAPIC_STATE_SIZE: Final = 1024
GUEST_DEBUG: Final = Struct("<I4x8Q")
"""control, debugreg."""
X86_MCE: Final = Struct("<QQQQB7x24x")
"""status, addr, misc, mcg_status, bank."""
TPR_ACCESS_CTL: Final = Struct("<II32x")
"""enabled, flags."""
VAPIC_ADDR: Final = Struct("<Q")
"""vapic_addr."""
U64_VALUE: Final = Struct("<Q")
"""A plain number."""
U64_PAIR: Final = Struct("<QQ")
"""Two, as struct kvm_pre_fault_memory begins: gpa, size."""

# --- struct kvm_run --------------------------------------------------------------------------

RUN_HEAD: Final = Struct("<BB6xIBBHQQ")
"""request_interrupt_window, immediate_exit, exit_reason, ready_for_interrupt_injection, if_flag,
flags, cr8, apic_base."""
RUN_SYNC: Final = Struct("<QQ")
"""kvm_valid_regs, kvm_dirty_regs, in front of struct kvm_sync_regs."""
RUN_SIZE: Final = 2352
