/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The boot-parameter page: what the VMM tells the guest kernel.
 * kvmsim/vmm/bootparams.py holds the same layout; tests/unit/test_vmm_bootparams.py compares
 * every offset and constant of the two.
 */
#ifndef BOOTPARAMS_H
#define BOOTPARAMS_H

#include "types.h"

#define BOOT_MAGIC 0x50424d49534d564bUL /* "KVMSIMBP" in memory order */
#define BOOT_VERSION 2
#define BOOT_MAX_RAM 16
#define BOOT_MAX_VCPUS 16
#define BOOT_MAX_MEASURED 8

/* boot_params.flags */
#define BOOT_FLAG_SELFTEST 0x1UL /* run the memory self-test before the first prompt */
#define BOOT_FLAG_ECHO 0x2UL     /* echo console input, for a terminal in raw mode */
#define BOOT_FLAG_EAGER 0x4UL    /* accept all private memory before the first prompt */

/* ram_range.flags */
#define RAM_PRIVATE_CAPABLE 0x1 /* the memslot has a private side (KVM_MEM_GUEST_MEMFD) */

/* boot_params.hypercall */
#define HYPERCALL_VMMCALL 1 /* 0f 01 d9, AMD */
#define HYPERCALL_VMCALL 2  /* 0f 01 c1, Intel */

/* boot_params.technology: what makes memory private, and how the host is called */
#define TECH_SHARED_BIT 0   /* a bit of the gpa; KVM's hypercalls, nothing else is protected */
#define TECH_SW_PROTECTED 1 /* the attribute of the gfn (KVM_X86_SW_PROTECTED_VM) */
#define TECH_TDX 2	    /* Intel TDX: shared bit, TDCALL, #VE */
#define TECH_SNP 3	    /* AMD SEV-SNP: C-bit, PVALIDATE, GHCB, #VC */
#define TECH_PKVM 4	    /* protected KVM: all memory is the guest's own, until it is shared */

struct ram_range {
	u64 gpa;
	u64 size;
	u32 flags;
	u32 reserved;
};

/* Pages above low memory that were loaded, and so accepted, before the guest ran. */
struct measured_range {
	u64 gpa;
	u64 size;
};

struct boot_params {
	u64 magic;
	u32 version;
	u32 size; /* sizeof(struct boot_params) */
	u32 vcpus;
	u32 shared_bit; /* page-table bit that selects the shared side of a gfn; 0: none does */
	u32 hypercall;
	u16 console_port;
	u16 exit_port;
	u64 flags;
	u64 low_size; /* [0, low_size) holds boot data and what is shared for ever */
	u64 log_gpa;  /* struct stamp_log, in low memory, shared */
	u64 log_size;
	u32 ram_count;
	u32 technology;
	u32 private_bit; /* page-table bit of encrypted pages (SNP's C-bit); 0: none */
	u16 bounce_port; /* doorbell of the bounce-buffer device */
	u16 reserved;
	u64 ghcb_gpa;	 /* SNP: a GHCB per vCPU, then two pages for guest requests; shared */
	u64 bounce_gpa;	 /* the ring and its buffers; shared from their first use on */
	u64 bounce_size;
	u64 secrets_gpa; /* SNP: the secrets page of the firmware; else 0 */
	u64 cpuid_gpa;	 /* SNP: the CPUID page of the firmware; else 0 */
	u32 measured_count;
	u32 reserved2;
	struct measured_range measured[BOOT_MAX_MEASURED];
	struct ram_range ram[BOOT_MAX_RAM];
};

#endif
