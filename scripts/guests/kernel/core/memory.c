// SPDX-License-Identifier: GPL-2.0-or-later
/* Guest-physical memory as the console sees it: both sides, with exceptions as answers. */
#include "kernel.h"

#define GPA_LIMIT (1UL << 39)

struct access {
	volatile u64 *at;
	u64 words;
	u64 value;
};

void *gpa_address(u64 gpa, enum side side)
{
	return side == SIDE_SHARED ? shared_at(gpa) : private_at(gpa);
}

volatile u64 *page_word(u64 gfn)
{
	return gpa_address(gfn << PAGE_SHIFT, SIDE_PRIVATE);
}

const char *side_name(enum side side)
{
	return side == SIDE_SHARED ? "shared" : "private";
}

static bool_t in_ram(u64 gpa, u64 end)
{
	for (u32 i = 0; i < params.ram_count; i++) {
		struct ram_range *r = &params.ram[i];

		if (gpa >= r->gpa && end <= r->gpa + r->size)
			return 1;
	}
	return 0;
}

const char *range_error(u64 gpa, u64 npages, bool_t keep_kernel)
{
	u64 end = gpa + (npages << PAGE_SHIFT);

	if (gpa & (PAGE_SIZE - 1))
		return "gpa is not a multiple of 4096";
	if (!npages || npages > GPA_LIMIT >> PAGE_SHIFT || end > GPA_LIMIT)
		return "impossible number of pages";
	if (!in_ram(gpa, end))
		return "not inside one RAM range";
	if (keep_kernel && gpa < params.low_size)
		return "low memory is shared and holds boot data and the stamp log";
	if (keep_kernel && gpa < layout.free_gpa && end > layout.kernel_gpa)
		return "the kernel lives there";
	return 0;
}

static bool_t guarded(u64 (*fn)(void *), void *arg)
{
	return !guarded_call(fn, arg, &cpus[this_cpu()].guard);
}

static u64 do_read(void *arg)
{
	return *((struct access *)arg)->at;
}

static u64 do_write(void *arg)
{
	struct access *a = arg;

	*a->at = a->value;
	return 0;
}

static u64 do_fill(void *arg)
{
	struct access *a = arg;

	for (u64 i = 0; i < a->words; i++)
		a->at[i] = a->value;
	return 0;
}

static u64 do_sum(void *arg)
{
	struct access *a = arg;
	u64 sum = 0;

	for (u64 i = 0; i < a->words; i++)
		sum += a->at[i];
	return sum;
}

/* A page of RAM is accepted before its private side is used. */
static void claim_page(u64 gpa, enum side side)
{
	if (side == SIDE_PRIVATE && !range_error(ALIGN_DOWN(gpa, PAGE_SIZE), 1, 0))
		accept_claim(ALIGN_DOWN(gpa, PAGE_SIZE), 1);
}

bool_t memory_peek(u64 gpa, enum side side, u64 *value)
{
	claim_page(gpa, side);
	return memory_touch(gpa, side, value);
}

bool_t memory_touch(u64 gpa, enum side side, u64 *value)
{
	struct access a = { gpa_address(gpa, side), 1, 0 };
	bool_t fine = guarded(do_read, &a);

	*value = cpus[this_cpu()].guard.result;
	return fine;
}

bool_t memory_poke(u64 gpa, enum side side, u64 value)
{
	struct access a = { gpa_address(gpa, side), 1, value };

	claim_page(gpa, side);
	return guarded(do_write, &a);
}

bool_t memory_fill(u64 gpa, u64 npages, u64 value)
{
	struct access a = { gpa_address(gpa, SIDE_PRIVATE), npages * PAGE_SIZE / 8, value };

	return guarded(do_fill, &a);
}

bool_t memory_sum(u64 gpa, u64 npages, u64 *sum)
{
	struct access a = { gpa_address(gpa, SIDE_PRIVATE), npages * PAGE_SIZE / 8, 0 };
	bool_t fine = guarded(do_sum, &a);

	*sum = cpus[this_cpu()].guard.result;
	return fine;
}

static u64 *table_at(u64 gpa)
{
	return private_at(gpa & PTE_ADDRESS & ~private_mask);
}

static u64 *jump_entry(void)
{
	u64 *pdpt = table_at(table_at(read_cr3())[JUMP_VA >> 39 & 511]);

	return &table_at(pdpt[JUMP_VA >> 30 & 511])[JUMP_VA >> 21 & 511];
}

static u64 do_jump(void *arg)
{
	return ((u64(*)(void))((struct access *)arg)->at)();
}

bool_t memory_jump(u64 gpa, enum side side, u64 *result)
{
	struct access a = { (void *)(JUMP_VA + (gpa & (LARGE_SIZE - 1))), 0, 0 };
	u64 frame = ALIGN_DOWN(gpa, LARGE_SIZE);
	u64 *entry = jump_entry();
	bool_t fine;

	claim_page(gpa, side);
	frame |= side == SIDE_SHARED ? shared_mask : private_mask;
	*entry = frame | PTE_RX | PTE_LARGE;
	invlpg(JUMP_VA);
	fine = guarded(do_jump, &a);
	*result = cpus[this_cpu()].guard.result;
	*entry = 0;
	invlpg(JUMP_VA);
	return fine;
}

enum side side_at_boot(u64 gpa)
{
	bool_t shared = gpa < params.low_size;

	if (platform->confidential)
		shared = gpa - params.log_gpa < params.log_size;
	return shared ? SIDE_SHARED : SIDE_PRIVATE;
}

/* Where pages must be accepted: they are when they become private, and given up before they
 * become shared. What is no range of RAM is left to the VMM to refuse. */
static long convert_accepted(u64 gpa, u64 npages, enum side side)
{
	struct accepted done = { 0 };
	long ret;

	accept_claim(gpa, npages);
	if (side == SIDE_SHARED) {
		for (u64 i = 0; platform->release && i < npages; i++)
			if (platform->release(gpa + (i << PAGE_SHIFT)) == ACCEPT_FAILED)
				return CONVERT_FAILED;
		return platform->set_shared(gpa, npages);
	}
	ret = platform->set_private(gpa, npages);
	if (ret)
		return ret;
	switch (accept_range(gpa, npages, &done)) {
	case ACCEPT_FINE:
		return 0;
	case ACCEPT_ALREADY:
		return CONVERT_ALREADY;
	default:
		return CONVERT_FAILED;
	}
}

long memory_convert(u64 gpa, u64 npages, enum side side)
{
	if (platform->accepts && !range_error(gpa, npages, 0))
		return convert_accepted(gpa, npages, side);
	return side == SIDE_PRIVATE ? platform->set_private(gpa, npages)
				    : platform->set_shared(gpa, npages);
}

void memory_unmap_low(void)
{
	table_at(read_cr3())[0] = 0;
	write_cr3(read_cr3());
}
