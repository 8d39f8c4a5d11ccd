// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Protected KVM: all memory is the guest's own until it shares a page with the host, and what is
 * in it stays (Documentation/virt/kvm/arm/hypercalls.rst). HVC is VMCALL here: function in rax,
 * gpa in rbx, result in rax.
 */
#include "platform.h"

#define HVC_HYP_MEMINFO 0xc6000002UL
#define HVC_MEM_SHARE 0xc6000003UL
#define HVC_MEM_UNSHARE 0xc6000004UL
#define HVC_MEM_RELINQUISH 0xc6000009UL
#define SMCCC_RET_INVALID_PARAMETER (-3L)

static long each_page(u64 function, u64 gpa, u64 npages)
{
	if (gpa & (PAGE_SIZE - 1) || !npages || npages > 1UL << (39 - PAGE_SHIFT))
		return INVALID_ARGUMENT;
	for (u64 i = 0; i < npages; i++) {
		long ret = plain_call(function, gpa + (i << PAGE_SHIFT), 0, 0);

		if (ret) {
			platform_status = (u64)ret;
			return ret == SMCCC_RET_INVALID_PARAMETER ? INVALID_ARGUMENT : ret;
		}
	}
	return 0;
}

static long pkvm_private(u64 gpa, u64 npages)
{
	return each_page(HVC_MEM_UNSHARE, gpa, npages);
}

static long pkvm_shared(u64 gpa, u64 npages)
{
	return each_page(HVC_MEM_SHARE, gpa, npages);
}

static long pkvm_relinquish(u64 gpa, u64 npages)
{
	return each_page(HVC_MEM_RELINQUISH, gpa, npages);
}

static void pkvm_describe(void (*put)(const char *name, u64 value))
{
	put("granule", (u64)plain_call(HVC_HYP_MEMINFO, 0, 0, 0));
}

const struct platform pkvm_platform = {
	.name = "pkvm",
	.confidential = 1,
	.in = plain_in,
	.out = plain_out,
	.call = plain_call,
	.halt = halt_once,
	.set_private = pkvm_private,
	.set_shared = pkvm_shared,
	.relinquish = pkvm_relinquish,
	.describe = pkvm_describe,
};
