// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * `stamp`: catch a read of memory that a punch had already taken away. The argument why this
 * gives no false alarm is in docs/guest.md, "The stamp protocol"; the order of the loads and
 * stores below is that argument, so keep it.
 */
#include "kernel.h"

#define SLICE 64

/* What is known of a page. Only the vCPU that holds the lock touches it. */
struct page_state {
	u64 value; /* written last, or 0 if read as 0 since */
	u32 epoch; /* begin epoch that held before and after that write */
	u8 known;
	u8 windowed; /* a punch was running when it was written: that punch may erase it */
	volatile u8 lock;
};

static struct page_state pages[STAMP_WINDOW];
static volatile struct stamp_header *head;
static volatile struct stamp_epoch *epochs;

static volatile void *log_at(u64 offset)
{
	return (u8 *)gpa_address(params.log_gpa, SIDE_SHARED) + offset;
}

bool_t stamp_init(void)
{
	if (params.log_size < STAMP_LOG_SIZE || params.log_gpa + params.log_size > params.low_size)
		return 0;
	head = log_at(0);
	epochs = log_at(STAMP_EPOCHS);
	head->vcpus = params.vcpus;
	head->ring = STAMP_RING;
	head->window_gfn = layout.kernel_gpa >> PAGE_SHIFT;
	head->window_pages = STAMP_WINDOW;
	head->magic = STAMP_MAGIC;
	return 1;
}

volatile struct stamp_header *stamp_head(void)
{
	return head;
}

volatile struct stamp_vcpu *stamp_stats(u32 cpu)
{
	return (volatile struct stamp_vcpu *)log_at(STAMP_VCPUS) + cpu;
}

bool_t stamp_covers(u64 gpa, u64 npages)
{
	u64 first = gpa >> PAGE_SHIFT;

	return first >= head->window_gfn &&
	       first + npages <= head->window_gfn + STAMP_WINDOW;
}

void stamp_forget(u64 gpa, u64 npages)
{
	u64 first = (gpa >> PAGE_SHIFT) - head->window_gfn;

	for (u64 i = first; i < first + npages; i++)
		pages[i].known = 0;
}

bool_t stamp_window(u64 gpa)
{
	if (any_mode(MODE_STAMP))
		return 0;
	head->window_gfn = gpa >> PAGE_SHIFT;
	stamp_forget(gpa, STAMP_WINDOW);
	return 1;
}

static u32 judge(const struct page_state *s, u64 value, u32 done, u32 begin)
{
	if (!s->known)
		return VERDICT_FRESH;
	if (value == s->value)
		return value && s->epoch < done ? VERDICT_STALE : VERDICT_SAME;
	if (value)
		return VERDICT_MISMATCH;
	return begin > s->epoch || s->windowed ? VERDICT_PUNCHED : VERDICT_LOST;
}

static void count(volatile struct stamp_vcpu *stats, u32 verdict, bool_t decisive)
{
	stats->reads++;
	switch (verdict) {
	case VERDICT_PUNCHED:
		stats->punched++;
		stats->decisive += decisive;
		break;
	case VERDICT_STALE:
		stats->stale++;
		break;
	case VERDICT_LOST:
		stats->lost++;
		break;
	case VERDICT_MISMATCH:
		stats->mismatches++;
		break;
	}
}

/* The host may read at any time: seq is 0 while the rest changes. */
static void publish(volatile struct stamp_record *to, const struct stamp_record *r)
{
	to->seq = 0;
	to->value = r->value;
	to->expect = r->expect;
	to->page = r->page;
	to->begin = r->begin;
	to->done = r->done;
	to->expect_epoch = r->expect_epoch;
	to->flags = r->flags;
	to->verdict = r->verdict;
	to->generation = r->generation;
	to->vcpu = r->vcpu;
	to->seq = r->seq;
}

static void log_read(struct stamp_record *r)
{
	volatile struct stamp_record *rings = log_at(STAMP_RINGS);
	volatile struct stamp_vcpu *stats = stamp_stats(r->vcpu);

	r->seq = stats->head + 1;
	publish(&rings[r->vcpu * STAMP_RING + r->seq % STAMP_RING], r);
	if (r->verdict >= VERDICT_STALE && !stats->first_bad.seq)
		publish(&stats->first_bad, r);
	stats->head = r->seq;
}

/* Write a stamp whose epoch is certain: no punch began between the first load and the last. */
static void write_page(u32 cpu, struct work *w, struct page_state *s, u64 gfn,
		       volatile struct stamp_epoch *e)
{
	u32 begin, done;
	u64 stamp;

	do {
		begin = e->begin;
		done = e->done;
		stamp = make_stamp(gfn, cpu, begin, next_generation(w));
		*page_word(gfn) = stamp;
		fence();
	} while (e->begin != begin);
	s->value = stamp;
	s->epoch = begin;
	s->windowed = done != begin;
	s->known = 1;
	stamp_stats(cpu)->writes++;
	stamp_stats(cpu)->windowed += s->windowed;
}

static void visit(u32 cpu, struct work *w, u64 gfn)
{
	u32 page = (u32)(gfn - head->window_gfn);
	volatile struct stamp_epoch *e = &epochs[page];
	volatile struct stamp_vcpu *stats = stamp_stats(cpu);
	struct page_state *s = &pages[page];
	u32 done, begin, verdict;
	u64 value;

	if (__atomic_exchange_n(&s->lock, 1, __ATOMIC_ACQUIRE)) {
		stats->busy++; /* its holder may wait for this very page: do not wait for it */
		return;
	}
	done = e->done;
	value = *page_word(gfn);
	begin = e->begin;
	verdict = judge(s, value, done, begin);
	stats->zeros += !value;
	count(stats, verdict, s->known && s->value && s->epoch < done);
	log_read(&(struct stamp_record){
		.value = value,
		.expect = s->value,
		.page = page,
		.begin = begin,
		.done = done,
		.expect_epoch = s->epoch,
		.flags = (s->known ? STAMP_KNOWN : 0) | (s->windowed ? STAMP_WINDOWED : 0),
		.verdict = verdict,
		.generation = w->generation,
		.vcpu = cpu,
	});
	/* Of the punches that are seen running, every second one finds the page left alone. A
	 * write now could not be told from one after the free, so it would hide a stale page. */
	if (begin != done && (begin ^ page) & 1) {
		stats->skipped++;
		if (!value) {
			s->value = 0;
			s->known = 1;
		}
	} else {
		write_page(cpu, w, s, gfn, e);
	}
	__atomic_store_n(&s->lock, 0, __ATOMIC_RELEASE);
}

void stamp_slice(u32 cpu)
{
	struct work *w = &cpus[cpu].work;

	for (u32 i = 0; i < SLICE; i++)
		visit(cpu, w, (w->gpa >> PAGE_SHIFT) + next_random(&w->random) % w->npages);
	stamp_stats(cpu)->loops += SLICE;
}
