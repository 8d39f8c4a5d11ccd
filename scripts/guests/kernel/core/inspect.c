// SPDX-License-Identifier: GPL-2.0-or-later
/* Commands that look closely: wait for a change, run what lies in memory, execute instructions
 * that a technology hands to the guest's own exception handler. */
#include "commands.h"
#include "serial.h"

#define WATCH_POLL 65536 /* reads between two looks at the console */

void trapped(const struct words *w, u64 gpa, enum side side)
{
	struct guard *g = &cpus[0].guard;

	say("error %s: gpa %x (%s): %s, error %x, address %x, rip %x", w->at[0], gpa,
	    side_name(side), trap_name(g->vector), g->error, g->cr2, g->rip);
}

void do_watch(struct words *w)
{
	u64 gpa, before, now, reads = 0;
	enum side side;

	if (!word_arguments(w, &gpa) || !side_argument(w, 2, gpa, &side))
		return;
	if (!memory_peek(gpa, side, &before)) {
		trapped(w, gpa, side);
		return;
	}
	say("watching gpa=%x side=%s value=%x", gpa, side_name(side), before);
	do {
		now = *(volatile u64 *)gpa_address(gpa, side);
		if (++reads % WATCH_POLL == 0 && serial_ready()) {
			say("error watch: ended by input after %u reads, value still %x", reads,
			    before);
			return;
		}
	} while (now == before);
	say("ok watch gpa=%x before=%x after=%x reads=%u", gpa, before, now, reads);
}

void do_jump(struct words *w)
{
	enum side side;
	u64 gpa, result;

	if (!argument(w, 1, "GPA", &gpa) || !side_argument(w, 2, gpa, &side))
		return;
	if (gpa >= 1UL << 39)
		say("error jump: gpa %x must be below 2^39", gpa);
	else if (memory_jump(gpa, side, &result))
		say("ok jump gpa=%x returned=%x", gpa, result);
	else
		trapped(w, gpa, side);
}

void do_touch(struct words *w)
{
	u64 gpa, value;

	if (!word_arguments(w, &gpa))
		return;
	if (memory_touch(gpa, SIDE_PRIVATE, &value))
		say("ok touch gpa=%x value=%x", gpa, value);
	else
		trapped(w, gpa, SIDE_PRIVATE);
}

struct request {
	u32 index, subindex;
	u32 out[4];
	bool_t write;
};

/* The instruction itself, with an exception as its answer. */
static bool_t executed(const struct words *w, u64 (*fn)(void *), struct request *r)
{
	struct guard *g = &cpus[0].guard;

	if (!guarded_call(fn, r, g))
		return 1;
	say("error %s: %s, error %x, rip %x", w->at[0], trap_name(g->vector), g->error, g->rip);
	return 0;
}

static u64 raw_port(void *arg)
{
	struct request *r = arg;

	if (r->write)
		raw_out((u16)r->index, 1, r->subindex);
	else
		r->out[0] = raw_in((u16)r->index, 1);
	return 0;
}

void do_port(struct words *w)
{
	u64 port, value = 0;
	struct request r = { .write = w->count > 2 };

	if (!argument(w, 1, "PORT", &port) || (r.write && !argument(w, 2, "VALUE", &value)))
		return;
	if (port > 0xffff || value > 0xff) {
		say("error port: port %x, value %x: 16 bits and 8 bits", port, value);
		return;
	}
	r.index = (u32)port;
	r.subindex = (u32)value;
	if (!executed(w, raw_port, &r))
		return;
	if (r.write)
		say("ok port port=%x written=%x", port, value);
	else
		say("ok port port=%x value=%x", port, (u64)r.out[0]);
}

static u64 raw_cpuid(void *arg)
{
	struct request *r = arg;

	cpuid(r->index, r->subindex, r->out);
	return 0;
}

void do_cpuid(struct words *w)
{
	u64 leaf, subleaf = 0;
	struct request r = { 0 };

	if (!argument(w, 1, "LEAF", &leaf) ||
	    (w->count > 2 && !argument(w, 2, "SUBLEAF", &subleaf)))
		return;
	r.index = (u32)leaf;
	r.subindex = (u32)subleaf;
	if (executed(w, raw_cpuid, &r))
		say("ok cpuid leaf=%x subleaf=%x eax=%x ebx=%x ecx=%x edx=%x", (u64)r.index,
		    (u64)r.subindex, (u64)r.out[0], (u64)r.out[1], (u64)r.out[2], (u64)r.out[3]);
}

static u64 raw_rdmsr(void *arg)
{
	return rdmsr(((struct request *)arg)->index);
}

void do_rdmsr(struct words *w)
{
	u64 index;
	struct request r = { 0 };

	if (!argument(w, 1, "INDEX", &index))
		return;
	r.index = (u32)index;
	if (executed(w, raw_rdmsr, &r))
		say("ok rdmsr index=%x value=%x", (u64)r.index, cpus[0].guard.result);
}
