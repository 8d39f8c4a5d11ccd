// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Unaccepted memory, as the UEFI table of that name has it: a bit for each 2 MiB. A unit is
 * accepted as a whole when one of its pages is first used, or all of them at boot. A page that
 * was accepted before without our doing is an attack – somebody took the page we know away and
 * put another in its place – or an error of ours: either way it is not used.
 */
#include "kernel.h"

#define MAX_UNITS 32768UL /* 64 GiB */

static u64 accepted[MAX_UNITS / 64];
static u64 accepted_bytes, unaccepted_bytes;

static bool_t test(u64 unit)
{
	return accepted[unit / 64] >> (unit % 64) & 1;
}

/* The part of [start, end) that is private-capable RAM of one range, above low memory. */
static void clamp(const struct ram_range *r, u64 *start, u64 *end)
{
	u64 first = r->gpa < params.low_size ? params.low_size : r->gpa;

	if (*start < first)
		*start = first;
	if (*end > r->gpa + r->size)
		*end = r->gpa + r->size;
	if (!(r->flags & RAM_PRIVATE_CAPABLE) || *end < *start)
		*end = *start;
}

void accept_init(void)
{
	u64 start, end;

	for (u32 i = 0; i < params.ram_count; i++) {
		start = 0, end = ~0UL;
		clamp(&params.ram[i], &start, &end);
		unaccepted_bytes += end - start;
	}
	if (!platform->accepts) {
		accepted_bytes = unaccepted_bytes;
		unaccepted_bytes = 0;
		return;
	}
	accepted_bytes = layout.accepted_end - layout.accepted;
	unaccepted_bytes -= accepted_bytes;
	for (u64 gpa = layout.accepted; gpa < layout.accepted_end; gpa += LARGE_SIZE)
		accepted[gpa / LARGE_SIZE / 64] |= 1UL << (gpa / LARGE_SIZE % 64);
}

static void accept_part(u64 start, u64 end)
{
	struct accepted done = { 0 };
	enum acceptance how = accept_range(start, (end - start) >> PAGE_SHIFT, &done);

	if (how == ACCEPT_FINE) {
		accepted_bytes += end - start;
		unaccepted_bytes -= end - start;
		return;
	}
	if (how == ACCEPT_ALREADY)
		say("panic: accepting %x: already accepted, and not by us", done.failed);
	else
		say("panic: accepting %x: refused, status %x", done.failed, platform_status);
	give_up("memory not accepted");
}

static void accept_unit(u64 unit)
{
	for (u32 i = 0; i < params.ram_count; i++) {
		u64 start = unit * LARGE_SIZE, end = start + LARGE_SIZE;

		clamp(&params.ram[i], &start, &end);
		if (start < end)
			accept_part(start, end);
	}
	accepted[unit / 64] |= 1UL << (unit % 64);
}

void accept_claim(u64 gpa, u64 npages)
{
	u64 end = gpa + (npages << PAGE_SHIFT);

	if (!platform->accepts)
		return;
	for (u64 unit = gpa / LARGE_SIZE; unit * LARGE_SIZE < end && unit < MAX_UNITS; unit++)
		if (!test(unit))
			accept_unit(unit);
}

void accept_everything(void)
{
	for (u32 i = 0; i < params.ram_count; i++)
		accept_claim(params.ram[i].gpa, params.ram[i].size >> PAGE_SHIFT);
	say("accepted all private memory: %u KiB", accepted_bytes >> 10);
}

enum acceptance accept_again(u64 gpa, u64 npages, struct accepted *done, u64 *fresh)
{
	u64 end = gpa + (npages << PAGE_SHIFT), next;
	enum acceptance how = ACCEPT_FINE;

	*fresh = 0;
	for (; gpa < end && how == ACCEPT_FINE; gpa = next) {
		u64 unit = gpa / LARGE_SIZE;

		next = (unit + 1) * LARGE_SIZE < end ? (unit + 1) * LARGE_SIZE : end;
		if (test(unit)) {
			how = accept_range(gpa, (next - gpa) >> PAGE_SHIFT, done);
		} else {
			u64 before = accepted_bytes;

			accept_unit(unit);
			*fresh += accepted_bytes - before;
		}
	}
	return how;
}

void accept_counts(u64 *done, u64 *left)
{
	*done = accepted_bytes;
	*left = unaccepted_bytes;
}
