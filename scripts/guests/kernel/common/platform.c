// SPDX-License-Identifier: GPL-2.0-or-later
/* The choice of a technology, and the two that need no more than KVM's hypercalls. */
#include "platform.h"

const struct platform *platform;
u64 private_mask, shared_mask;
volatile u64 platform_status;

static const struct boot_params *params;

static const struct platform *const platforms[] = {
	[TECH_SHARED_BIT] = &plain_platform, [TECH_SW_PROTECTED] = &sw_platform,
	[TECH_TDX] = &tdx_platform,	     [TECH_SNP] = &snp_platform,
	[TECH_PKVM] = &pkvm_platform,
};

bool_t platform_choose(const struct boot_params *page)
{
	if (page->technology >= ARRAY_LEN(platforms))
		return 0;
	params = page;
	private_mask = page->private_bit ? 1UL << page->private_bit : 0;
	shared_mask = page->shared_bit ? 1UL << page->shared_bit : 0;
	platform = platforms[page->technology];
	return 1;
}

const struct boot_params *platform_params(void)
{
	return params;
}

static bool_t measured(u64 gpa, u64 size)
{
	for (u32 i = 0; i < params->measured_count; i++) {
		const struct measured_range *m = &params->measured[i];

		if (gpa < m->gpa + m->size && m->gpa < gpa + size)
			return 1;
	}
	return 0;
}

/* What a guest hands out is zero, if the processor has not seen to it already. */
static enum acceptance accept_one(u64 gpa, bool_t large)
{
	enum acceptance how = platform->accept(gpa, large);

	if (how == ACCEPT_FINE && !platform->accept_zeroes)
		zero_words(private_at(gpa), (large ? LARGE_SIZE : PAGE_SIZE) / 8);
	return how;
}

static enum acceptance accept_small(u64 gpa, u64 end, struct accepted *done)
{
	for (; gpa < end; gpa += PAGE_SIZE) {
		enum acceptance how;

		if (measured(gpa, PAGE_SIZE))
			continue;
		how = accept_one(gpa, 0);
		if (how != ACCEPT_FINE) {
			done->failed = gpa;
			return how;
		}
		done->small++;
	}
	return ACCEPT_FINE;
}

enum acceptance accept_range(u64 gpa, u64 npages, struct accepted *done)
{
	u64 end = gpa + (npages << PAGE_SHIFT), next;
	enum acceptance how = ACCEPT_FINE;

	for (; gpa < end && how == ACCEPT_FINE; gpa = next) {
		next = ALIGN_DOWN(gpa, LARGE_SIZE) + LARGE_SIZE;
		if (next > end)
			next = end;
		how = ACCEPT_SIZE;
		if (next - gpa == LARGE_SIZE && !measured(gpa, LARGE_SIZE))
			how = accept_one(gpa, 1);
		if (how == ACCEPT_SIZE)
			how = accept_small(gpa, next, done);
		else if (how == ACCEPT_FINE)
			done->large++;
		else
			done->failed = gpa;
	}
	return how;
}

/* --- KVM's hypercalls: number in rax, arguments in rbx, rcx, rdx, rsi, result in rax --------- */

long plain_call(u64 nr, u64 a0, u64 a1, u64 a2)
{
	long ret;

	if (params->hypercall == HYPERCALL_VMCALL)
		asm volatile("vmcall" : "=a"(ret) : "a"(nr), "b"(a0), "c"(a1), "d"(a2) : "memory");
	else
		asm volatile("vmmcall" : "=a"(ret) : "a"(nr), "b"(a0), "c"(a1), "d"(a2) : "memory");
	return ret;
}

u32 plain_in(u16 port, u32 size)
{
	return raw_in(port, size);
}

void plain_out(u16 port, u32 size, u32 value)
{
	raw_out(port, size, value);
}

static long plain_private(u64 gpa, u64 npages)
{
	return plain_call(KVM_HC_MAP_GPA_RANGE, gpa, npages, KVM_MAP_GPA_RANGE_ENCRYPTED);
}

static long plain_shared(u64 gpa, u64 npages)
{
	return plain_call(KVM_HC_MAP_GPA_RANGE, gpa, npages, 0);
}

const struct platform plain_platform = {
	.name = "shared-bit",
	.in = plain_in,
	.out = plain_out,
	.call = plain_call,
	.halt = halt_once,
	.set_private = plain_private,
	.set_shared = plain_shared,
};

const struct platform sw_platform = {
	.name = "sw-protected",
	.in = plain_in,
	.out = plain_out,
	.call = plain_call,
	.halt = halt_once,
	.set_private = plain_private,
	.set_shared = plain_shared,
};
