// SPDX-License-Identifier: GPL-2.0-or-later
/* `spin`: write stamps and read pages without looking at punches; zeroes are only counted. */
#include "kernel.h"

#define SLICE 256

u64 next_random(u64 *state)
{
	u64 x = *state; /* xorshift64*, Marsaglia 2003, Vigna 2016 */

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	*state = x;
	return (x * 0x2545f4914f6cdd1dUL) >> 16;
}

u32 next_generation(struct work *w)
{
	w->generation = (w->generation + 1) & STAMP_FIELD_MASK;
	if (!w->generation)
		w->generation = 1;
	return w->generation;
}

u64 make_stamp(u64 gfn, u32 cpu, u32 epoch, u32 generation)
{
	return (gfn & STAMP_FIELD_MASK) << STAMP_GFN_SHIFT | (u64)cpu << STAMP_VCPU_SHIFT |
	       (epoch & STAMP_FIELD_MASK) << STAMP_EPOCH_SHIFT | (u64)generation << STAMP_GEN_SHIFT;
}

static bool_t plausible(u64 value, u64 gfn)
{
	u64 writer = value >> STAMP_VCPU_SHIFT & STAMP_VCPU_MASK;
	u64 generation = value >> STAMP_GEN_SHIFT;

	return generation && writer < params.vcpus &&
	       value == make_stamp(gfn, (u32)writer, 0, (u32)generation);
}

void spin_slice(u32 cpu)
{
	struct work *w = &cpus[cpu].work;
	volatile struct stamp_vcpu *stats = stamp_stats(cpu);

	for (u32 i = 0; i < SLICE; i++) {
		u64 page = w->pattern == PATTERN_SEQ ? w->next++ : next_random(&w->random);
		u64 gfn = (w->gpa >> PAGE_SHIFT) + page % w->npages;

		if (w->pattern != PATTERN_WRITE) {
			u64 value = *page_word(gfn);

			stats->reads++;
			if (!value)
				stats->zeros++;
			else if (!plausible(value, gfn))
				stats->mismatches++;
		}
		if (w->pattern != PATTERN_READ) {
			*page_word(gfn) = make_stamp(gfn, cpu, 0, next_generation(w));
			stats->writes++;
		}
	}
	stats->loops += SLICE;
}
