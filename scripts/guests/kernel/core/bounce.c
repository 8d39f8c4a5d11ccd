// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * `bounce`: private pages to a disk and back. A device cannot reach private memory, so what goes
 * out is copied to shared pages first, and what comes in is copied from them before it is used –
 * the host may change them at any time.
 */
#include "bounce.h"
#include "commands.h"
#include "string.h"

#define SECTORS (PAGE_SIZE / BOUNCE_SECTOR)

static bool_t ready;

static volatile struct bounce_ring *ring(void)
{
	return shared_at(params.bounce_gpa);
}

static volatile struct bounce_descriptor *descriptor(u16 index)
{
	volatile struct bounce_descriptor *all =
		shared_at(params.bounce_gpa + BOUNCE_DESCRIPTORS);

	return all + index % BOUNCE_ENTRIES;
}

static u64 buffer_gpa(u64 index)
{
	return params.bounce_gpa + (index + 1) * PAGE_SIZE;
}

/* On first use: the pages were private until now, if low memory starts so. */
static long prepare(void)
{
	long ret = 0;

	if (ready)
		return 0;
	if (platform->confidential)
		ret = platform->set_shared(params.bounce_gpa, params.bounce_size >> PAGE_SHIFT);
	if (ret)
		return ret;
	zero_words(shared_at(params.bounce_gpa), PAGE_SIZE / 8);
	ring()->magic = BOUNCE_MAGIC;
	ring()->entries = BOUNCE_ENTRIES;
	ready = 1;
	return 0;
}

long bounce_page(u64 *gpa)
{
	*gpa = buffer_gpa(0);
	return prepare();
}

static void offer(u64 index, u16 operation, u64 sector)
{
	volatile struct bounce_descriptor *d = descriptor((u16)(ring()->available + index));

	d->gpa = buffer_gpa(index);
	d->sector = sector;
	d->length = PAGE_SIZE;
	d->operation = operation;
	d->status = BOUNCE_PENDING;
}

/* Ring for pages that lie in the buffers (or will); BOUNCE_OK or the first complaint. */
static u32 run(u64 pages, u16 operation, u64 sector)
{
	u16 first = ring()->available, status = BOUNCE_OK;
	u32 result;

	for (u64 i = 0; i < pages; i++)
		offer(i, operation, sector + i * SECTORS);
	fence();
	ring()->available = (u16)(first + pages);
	platform->out(params.bounce_port + BOUNCE_DOORBELL, 4,
		      (u32)(params.bounce_gpa >> PAGE_SHIFT));
	result = platform->in(params.bounce_port + BOUNCE_RESULT, 4);
	fence();
	if (result)
		return result;
	if (ring()->used != ring()->available)
		return BOUNCE_PENDING;
	for (u64 i = 0; i < pages && status == BOUNCE_OK; i++)
		status = descriptor((u16)(first + i))->status;
	return status;
}

static u32 transfer(u64 gpa, u64 npages, u64 sector, bool_t write)
{
	u64 room = (params.bounce_size >> PAGE_SHIFT) - 1;
	u32 result = BOUNCE_OK;

	if (room > BOUNCE_ENTRIES)
		room = BOUNCE_ENTRIES;
	while (npages && result == BOUNCE_OK) {
		u64 n = npages < room ? npages : room, words = n * PAGE_SIZE / 8;

		if (write)
			copy_words(shared_at(buffer_gpa(0)), private_at(gpa), words);
		result = run(n, write ? BOUNCE_WRITE : BOUNCE_READ, sector);
		if (!write && result == BOUNCE_OK)
			copy_words(private_at(gpa), shared_at(buffer_gpa(0)), words);
		gpa += n << PAGE_SHIFT;
		sector += n * SECTORS;
		npages -= n;
	}
	return result;
}

static const char *complaint(u32 result)
{
	static const char *const names[] = {
		[BOUNCE_OK] = "fine",
		[BOUNCE_IOERR] = "the disk failed",
		[BOUNCE_UNSUPPORTED] = "not supported",
		[BOUNCE_BAD_RING] = "the device refused the ring",
		[BOUNCE_BAD_ADDRESS] = "the device refused the address",
		[BOUNCE_BAD_LENGTH] = "the device refused the length",
		[BOUNCE_BAD_SECTOR] = "outside the disk",
	};

	if (result < ARRAY_LEN(names))
		return names[result];
	return result == ~0U ? "there is no such device" : "not done";
}

void do_bounce(struct words *w)
{
	bool_t write = w->count > 1 && streq(w->at[1], "write");
	u64 gpa, npages, sector;
	u32 result;
	long ret;

	if (w->count < 2 || !(write || streq(w->at[1], "read"))) {
		say("error bounce: say read or write");
		return;
	}
	if (!range_arguments(w, 2, &gpa, &npages, 1) || !argument(w, 4, "SECTOR", &sector))
		return;
	ret = prepare();
	if (ret) {
		say("error bounce: buffers at %x not shared: the VMM answered %d",
		    params.bounce_gpa, ret);
		return;
	}
	result = transfer(gpa, npages, sector, write);
	if (result != BOUNCE_OK)
		say("error bounce: %s of %x, %u pages, sector %u: %s", w->at[1], gpa, npages,
		    sector, complaint(result));
	else
		say("ok bounce %s gpa=%x pages=%u sector=%u", w->at[1], gpa, npages, sector);
}
