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
#define BOOT_VERSION 1
#define BOOT_MAX_RAM 16
#define BOOT_MAX_VCPUS 16

/* boot_params.flags */
#define BOOT_FLAG_SELFTEST 0x1UL /* run the memory self-test before the first prompt */
#define BOOT_FLAG_ECHO 0x2UL     /* echo console input, for a terminal in raw mode */

/* ram_range.flags */
#define RAM_PRIVATE_CAPABLE 0x1 /* the memslot has a private side (KVM_MEM_GUEST_MEMFD) */

/* boot_params.hypercall */
#define HYPERCALL_VMMCALL 1 /* 0f 01 d9, AMD */
#define HYPERCALL_VMCALL 2  /* 0f 01 c1, Intel */

struct ram_range {
	u64 gpa;
	u64 size;
	u32 flags;
	u32 reserved;
};

struct boot_params {
	u64 magic;
	u32 version;
	u32 size; /* sizeof(struct boot_params) */
	u32 vcpus;
	u32 shared_bit; /* page-table bit that selects the shared side of a gfn */
	u32 hypercall;
	u16 console_port;
	u16 exit_port;
	u64 flags;
	u64 low_size; /* [0, low_size) stays shared for ever */
	u64 log_gpa;  /* struct stamp_log, in low memory */
	u64 log_size;
	u32 ram_count;
	u32 reserved;
	struct ram_range ram[BOOT_MAX_RAM];
};

#endif
