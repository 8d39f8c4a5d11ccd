/* SPDX-License-Identifier: GPL-2.0-or-later */
/* KVM hypercalls: number in rax, arguments in rbx, rcx, rdx, rsi, result in rax
 * (Documentation/virt/kvm/x86/hypercalls.rst). */
#ifndef HYPERCALL_H
#define HYPERCALL_H

#include "bootparams.h"

#define KVM_HC_KICK_CPU 5
#define KVM_HC_MAP_GPA_RANGE 12
#define KVM_MAP_GPA_RANGE_ENCRYPTED (1UL << 4)

static inline long hypercall3(u32 kind, u64 nr, u64 a0, u64 a1, u64 a2)
{
	long ret;

	if (kind == HYPERCALL_VMCALL)
		asm volatile("vmcall" : "=a"(ret) : "a"(nr), "b"(a0), "c"(a1), "d"(a2) : "memory");
	else
		asm volatile("vmmcall" : "=a"(ret) : "a"(nr), "b"(a0), "c"(a1), "d"(a2) : "memory");
	return ret;
}

/* Ask the VMM to make npages from gpa private (or shared). 0 or a negative errno. */
static inline long map_gpa_range(u32 kind, u64 gpa, u64 npages, bool_t private)
{
	return hypercall3(kind, KVM_HC_MAP_GPA_RANGE, gpa, npages,
			  private ? KVM_MAP_GPA_RANGE_ENCRYPTED : 0);
}

/* End the HLT of a vCPU, or make its next HLT return at once. */
static inline long kick_vcpu(u32 kind, u32 vcpu)
{
	return hypercall3(kind, KVM_HC_KICK_CPU, 0, vcpu, 0);
}

#endif
