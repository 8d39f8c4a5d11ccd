// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Moving to private memory. The kernel and its page tables are written through the private window
 * of the boot tables; their entries, and CR3, carry what marks the private side.
 */
#include "arch.h"
#include "boot.h"
#include "platform.h"
#include "string.h"

extern const u8 payload_start[], payload_end[];

#define GIB 0x40000000UL
#define MAX_GIB 64UL

static u64 kernel_gpa;
static u64 next_table; /* gpa of the next free table page */

static u32 slot(u64 va, u32 level)
{
	return va >> (12 + 9 * level) & 511;
}

static u64 new_table(void)
{
	u64 gpa = next_table;

	next_table += PAGE_SIZE;
	if (next_table > kernel_gpa + KERNEL_ROOM)
		boot_panic("no room for page tables", next_table);
	zero_words(private_at(gpa), PAGE_SIZE / 8);
	return gpa;
}

/* The entry for va at a level (0: 4 KiB, 1: 2 MiB) of the tables under root. */
static u64 *entry(u64 root, u64 va, u32 level)
{
	u64 *table = private_at(root);

	for (u32 l = 3; l > level; l--) {
		u64 *e = &table[slot(va, l)];

		if (!*e)
			*e = new_table() | private_mask | PTE_TABLE;
		table = private_at(*e & PTE_ADDRESS & ~private_mask);
	}
	return &table[slot(va, level)];
}

static u64 map_image(u64 root, const struct payload_header *h)
{
	for (u64 at = 0; at < h->end; at += PAGE_SIZE) {
		u64 prot = at < h->rodata ? PTE_RX : at < h->data ? PTE_RO : PTE_RW;

		*entry(root, KERNEL_VA + at, 0) = (kernel_gpa + at) | private_mask | prot;
	}
	return KERNEL_VA + h->entry;
}

void build_kernel(const struct boot_params *params, struct handoff *handoff)
{
	const struct payload_header *h = (const void *)payload_start;
	u64 top = 0, root;

	if (h->magic != PAYLOAD_MAGIC || h->file_end != (u64)(payload_end - payload_start))
		boot_panic("damaged payload, magic", h->magic);
	for (u32 i = 0; i < params->ram_count; i++)
		if (params->ram[i].gpa + params->ram[i].size > top)
			top = params->ram[i].gpa + params->ram[i].size;
	top = ALIGN_UP(top, GIB);
	if (top > MAX_GIB * GIB)
		boot_panic("RAM ends above 64 GiB", top);

	kernel_gpa = handoff->kernel_gpa;
	memcpy(private_at(kernel_gpa), payload_start, h->file_end);
	memset(private_at(kernel_gpa + h->file_end), 0, h->end - h->file_end);

	next_table = ALIGN_UP(kernel_gpa + h->end, PAGE_SIZE);
	root = new_table();
	handoff->entry = map_image(root, h);
	for (u64 gpa = 0; gpa < top; gpa += LARGE_SIZE) {
		/* Where low memory is shared, a private alias of it would only invite accidents. */
		if (gpa >= params->low_size || platform->confidential)
			*entry(root, PRIVATE_VA + gpa, 1) =
				gpa | private_mask | PTE_RW | PTE_LARGE;
		*entry(root, SHARED_VA + gpa, 1) = gpa | shared_mask | PTE_RW | PTE_LARGE;
	}
	/* Where this code runs now, until the kernel takes it away. */
	*entry(root, 0, 1) = (platform->confidential ? private_mask : shared_mask) | PTE_TABLE |
			     PTE_LARGE | PTE_DIRTY;
	(void)entry(root, JUMP_VA, 1);

	handoff->cr3 = root | private_mask;
	handoff->free_gpa = next_table;
	handoff->mapped_end = top;
}
