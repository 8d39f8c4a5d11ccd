// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * `batch`: many ranges converted by one call, where the VMM allows it. The list lies in a shared
 * page; the answer is how many of its entries are done, from the first on, or a negative errno.
 */
#include "commands.h"

#define KVMSIM_HC_MAP_GPA_RANGES 0x6b760001UL
#define MAX_RANGES 170

struct range {
	u64 gpa, npages, attributes;
};

struct batch {
	u64 gpa, npages, stride, count; /* pages; ranges */
	enum side side;
};

static u64 range_gpa(const struct batch *b, u64 i)
{
	return b->gpa + (i * b->stride << PAGE_SHIFT);
}

/* What must be given up before the host may have it. */
static bool_t release_all(const struct batch *b)
{
	for (u64 i = 0; platform->release && i < b->count; i++)
		for (u64 page = 0; page < b->npages; page++)
			if (platform->release(range_gpa(b, i) + (page << PAGE_SHIFT)) ==
			    ACCEPT_FAILED)
				return 0;
	return 1;
}

static bool_t accept_first(const struct batch *b, u64 count)
{
	struct accepted done = { 0 };

	for (u64 i = 0; platform->accepts && i < count; i++)
		if (accept_range(range_gpa(b, i), b->npages, &done) != ACCEPT_FINE)
			return 0;
	return 1;
}

static long convert_all(const struct batch *b, u64 list)
{
	volatile struct range *ranges = shared_at(list);
	u64 attributes = b->side == SIDE_PRIVATE ? KVM_MAP_GPA_RANGE_ENCRYPTED : 0;

	for (u64 i = 0; i < b->count; i++) {
		ranges[i].gpa = range_gpa(b, i);
		ranges[i].npages = b->npages;
		ranges[i].attributes = attributes;
	}
	fence();
	return platform->call(KVMSIM_HC_MAP_GPA_RANGES, list, b->count, 0);
}

static bool_t may_convert(const struct batch *b)
{
	if (!b->count || b->count > MAX_RANGES) {
		say("error batch: %u ranges, 1 to %u in a call", b->count, (u64)MAX_RANGES);
		return 0;
	}
	if (b->npages > b->stride) {
		say("error batch: ranges of %u pages overlap, %u pages apart", b->npages, b->stride);
		return 0;
	}
	if (platform->confidential && !platform->accepts) {
		say("error batch: %s converts page by page", platform->name);
		return 0;
	}
	return 1;
}

void do_batch(struct words *w)
{
	struct batch b;
	u64 list, last;
	long ret;

	if (!argument(w, 1, "GPA", &b.gpa) || !argument(w, 2, "NPAGES", &b.npages) ||
	    !argument(w, 3, "STRIDE", &b.stride) || !argument(w, 4, "COUNT", &b.count))
		return;
	if (w->count < 6) {
		say("error batch: say private or shared");
		return;
	}
	if (!side_argument(w, 5, b.gpa, &b.side) || !may_convert(&b))
		return;
	last = range_gpa(&b, b.count - 1) + (b.npages << PAGE_SHIFT);
	if (b.gpa < layout.free_gpa && last > layout.kernel_gpa) {
		say("error batch: ranges %x-%x: the kernel lives there", b.gpa, last);
		return;
	}
	ret = bounce_page(&list);
	if (ret) {
		say("error batch: no shared page for the list: the VMM answered %d", ret);
		return;
	}
	if (platform->accepts)
		accept_claim(b.gpa, (last - b.gpa) >> PAGE_SHIFT);
	if (b.side == SIDE_SHARED && !release_all(&b)) {
		say("error batch: the processor answered %x", platform_status);
		return;
	}
	ret = convert_all(&b, list);
	if (ret > 0 && b.side == SIDE_PRIVATE && !accept_first(&b, (u64)ret)) {
		say("error batch: the processor answered %x", platform_status);
		return;
	}
	if (ret < 0)
		say("error batch: %u ranges of %u pages at %x to %s: the VMM answered %d", b.count,
		    b.npages, b.gpa, side_name(b.side), ret);
	else
		say("ok batch gpa=%x pages=%u stride=%u ranges=%u done=%d side=%s", b.gpa, b.npages,
		    b.stride, b.count, ret, side_name(b.side));
}
