// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Before the kernel moves: the stamp log is shared, RAM is private. Under a technology with
 * unaccepted memory only the kernel's own room is accepted here; the rest is the kernel's care.
 */
#include "boot.h"
#include "platform.h"
#include "serial.h"

#define CONVERT_CHUNK (LARGE_SIZE / PAGE_SIZE) /* pages per hypercall */
#define PROGRESS_STEPS 4

/* The part of a RAM range that is to be private: [start, end), empty if none. */
static void private_part(const struct boot_params *params, const struct ram_range *ram, u64 *start,
			 u64 *end)
{
	*start = ram->gpa < params->low_size ? params->low_size : ram->gpa;
	*end = ram->gpa + ram->size;
	if (!(ram->flags & RAM_PRIVATE_CAPABLE) || *end < *start)
		*end = *start;
}

static void convert_range(u64 start, u64 end)
{
	u64 pages = (end - start) >> PAGE_SHIFT, done = 0, next_report = 0;

	while (done < pages) {
		u64 n = pages - done < CONVERT_CHUNK ? pages - done : CONVERT_CHUNK;
		long ret = platform->set_private(start + (done << PAGE_SHIFT), n);

		if (ret) {
			print("panic: boot stage: KVM_HC_MAP_GPA_RANGE(%x, %u pages, private) "
			      "answered %d\n",
			      start + (done << PAGE_SHIFT), n, ret);
			boot_panic("conversion refused, errno", (u64)-ret);
		}
		done += n;
		if (done * PROGRESS_STEPS >= pages * next_report || done == pages) {
			print("private %x-%x: %u%%\n", start, end, done * 100 / pages);
			next_report = done * PROGRESS_STEPS / pages + 1;
		}
	}
}

/* What the host is to read and write: it was never accepted, so nothing is given up for it. */
static void share_log(const struct boot_params *params)
{
	long ret = platform->set_shared(params->log_gpa, params->log_size >> PAGE_SHIFT);

	if (ret)
		boot_panic("the stamp log cannot be shared, errno", (u64)-ret);
	zero_words(shared_at(params->log_gpa), params->log_size / 8);
}

static void accept_home(const struct boot_params *params, struct handoff *handoff, u64 start,
			u64 end)
{
	u64 last = ALIGN_UP(handoff->kernel_gpa + KERNEL_ROOM, LARGE_SIZE);
	struct accepted done = { 0 };
	enum acceptance how;

	for (u32 i = 0; i < params->measured_count; i++)
		if (params->measured[i].gpa < handoff->kernel_gpa + KERNEL_ROOM &&
		    params->measured[i].gpa + params->measured[i].size > handoff->kernel_gpa)
			boot_panic("a payload lies where the kernel goes",
				   params->measured[i].gpa);
	handoff->accepted = start;
	handoff->accepted_end = last < end ? last : end;
	how = accept_range(start, (handoff->accepted_end - start) >> PAGE_SHIFT, &done);
	if (how != ACCEPT_FINE) {
		print("panic: boot stage: accepting %x: %s, status %x\n", done.failed,
		      how == ACCEPT_ALREADY ? "already accepted" : "refused", platform_status);
		boot_panic("memory not accepted", done.failed);
	}
	print("accepted %x-%x: %u of 2 MiB, %u of 4 KiB\n", start, handoff->accepted_end,
	      done.large, done.small);
}

void prepare_memory(const struct boot_params *params, struct handoff *handoff)
{
	u64 start, end, total = 0, home = 0, home_end = 0;

	if (platform->confidential)
		share_log(params);
	for (u32 i = 0; i < params->ram_count; i++) {
		private_part(params, &params->ram[i], &start, &end);
		if (start == end)
			continue;
		if (!platform->confidential)
			convert_range(start, end);
		if (!home && end - start >= KERNEL_ROOM)
			home = start, home_end = end;
		total += end - start;
	}
	if (!home)
		boot_panic("no private-capable RAM range with room for the kernel", KERNEL_ROOM);
	handoff->kernel_gpa = home;
	open_private_window(home);
	if (platform->accepts)
		accept_home(params, handoff, home, home_end);
	print("private: %u KiB in all; kernel goes to %x\n", total >> 10, home);
}
