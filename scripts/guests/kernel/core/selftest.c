// SPDX-License-Identifier: GPL-2.0-or-later
/* The memory self-test: all vCPUs write address-derived patterns, each checks its neighbour's. */
#include "kernel.h"

#define WORDS (PAGE_SIZE / 8)
#define STRIDE 8 /* one word per cache line */
#define INCREMENTS 20000

struct test {
	u64 gpa, npages; /* npages 0: everything private behind the kernel */
	volatile u64 counter;
	volatile u64 pages, errors;
	volatile u64 first_error;
};

static u64 pattern(u64 gpa)
{
	return gpa * 0x9e3779b97f4a7c15UL ^ 0x5a5a5a5a5a5a5a5aUL;
}

/* Calls each() on every page of the test that belongs to a share; answers their number. */
static u64 for_share(struct test *t, u32 share, void (*each)(struct test *, u64 gpa))
{
	u64 pages = 0;

	for (u32 i = 0; i < params.ram_count; i++) {
		u64 start = params.ram[i].gpa, end = start + params.ram[i].size;

		if (!(params.ram[i].flags & RAM_PRIVATE_CAPABLE))
			continue;
		if (start < params.low_size)
			start = params.low_size;
		if (start >= layout.kernel_gpa && start < layout.free_gpa)
			start = layout.free_gpa;
		if (t->npages) {
			if (start < t->gpa)
				start = t->gpa;
			if (end > t->gpa + (t->npages << PAGE_SHIFT))
				end = t->gpa + (t->npages << PAGE_SHIFT);
		}
		for (u64 gpa = start; gpa < end; gpa += PAGE_SIZE)
			if ((gpa >> PAGE_SHIFT) % params.vcpus == share) {
				each(t, gpa);
				pages++;
			}
	}
	return pages;
}

static void write_one(struct test *t, u64 gpa)
{
	volatile u64 *word = gpa_address(gpa, SIDE_PRIVATE);

	(void)t;
	for (u64 i = 0; i < WORDS; i += STRIDE)
		word[i] = pattern(gpa + i * 8);
}

static void check_one(struct test *t, u64 gpa)
{
	volatile u64 *word = gpa_address(gpa, SIDE_PRIVATE);

	for (u64 i = 0; i < WORDS; i += STRIDE) {
		if (word[i] != pattern(gpa + i * 8)) {
			u64 none = 0;

			__atomic_fetch_add(&t->errors, 1, __ATOMIC_SEQ_CST);
			__atomic_compare_exchange_n(&t->first_error, &none, gpa + i * 8, 0,
						    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
		}
		word[i] = 0; /* leave the memory as it is born */
	}
}

static void write_phase(u32 cpu, void *arg)
{
	for_share(arg, cpu, write_one);
}

static void check_phase(u32 cpu, void *arg)
{
	struct test *t = arg;
	u64 pages = for_share(t, (cpu + 1) % params.vcpus, check_one);

	__atomic_fetch_add(&t->pages, pages, __ATOMIC_SEQ_CST);
}

static void count_phase(u32 cpu, void *arg)
{
	struct test *t = arg;

	(void)cpu;
	for (u32 i = 0; i < INCREMENTS; i++)
		asm volatile("lock incq %0" : "+m"(t->counter));
}

bool_t selftest(u64 gpa, u64 npages)
{
	struct test t = { .gpa = gpa, .npages = npages };
	u64 expected = (u64)INCREMENTS * params.vcpus;

	if (!npages)
		for (u32 i = 0; i < params.ram_count; i++)
			accept_claim(params.ram[i].gpa, params.ram[i].size >> PAGE_SHIFT);
	if (!call_everywhere(write_phase, &t) || !call_everywhere(check_phase, &t) ||
	    !call_everywhere(count_phase, &t)) {
		say("error test: not every vCPU is idle and alive; stop them first");
		return 0;
	}
	if (t.errors || t.counter != expected) {
		say("error test: FAIL pages=%u errors=%u first=%x counter=%u expected=%u", t.pages,
		    t.errors, t.first_error, t.counter, expected);
		return 0;
	}
	say("ok test pages=%u errors=0 counter=%u expected=%u vcpus=%u", t.pages, t.counter,
	    expected, (u64)params.vcpus);
	return 1;
}
