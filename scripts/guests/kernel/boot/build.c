// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Moving to private memory. Two sets of page tables are touched: the VMM's boot tables (shared,
 * reached at their own address) get a private window, through which the kernel and its own
 * tables are written; the kernel's tables lie in private memory, so their entries and CR3
 * carry no shared bit.
 */
#include "arch.h"
#include "boot.h"
#include "string.h"

extern const u8 payload_start[], payload_end[];

#define GIB 0x40000000UL
#define MAX_GIB 64UL

static u64 window_pdpt[512] __attribute__((aligned(4096)));
static u64 window_pd[512] __attribute__((aligned(4096)));

static u64 shared_bit;	/* as a mask */
static u64 kernel_gpa;	/* the window shows [window_gpa, window_gpa + 1 GiB) */
static u64 window_gpa;
static u64 next_table; /* gpa of the next free table page */

static u32 slot(u64 va, u32 level)
{
	return va >> (12 + 9 * level) & 511;
}

/* Where the boot stage sees a private gpa. */
static void *window(u64 gpa)
{
	return (void *)(PRIVATE_VA + (gpa - window_gpa));
}

static void open_window(void)
{
	u64 *pml4 = (u64 *)(read_cr3() & ~shared_bit & ~(PAGE_SIZE - 1));

	for (u64 i = 0; i < 512; i++)
		window_pd[i] = (window_gpa + i * LARGE_SIZE) | PTE_RW | PTE_LARGE;
	window_pdpt[0] = (u64)window_pd | shared_bit | PTE_TABLE;
	pml4[slot(PRIVATE_VA, 3)] = (u64)window_pdpt | shared_bit | PTE_TABLE;
	write_cr3(read_cr3());
}

static u64 new_table(void)
{
	u64 gpa = next_table;

	next_table += PAGE_SIZE;
	if (next_table > kernel_gpa + KERNEL_ROOM)
		boot_panic("no room for page tables", next_table);
	memset(window(gpa), 0, PAGE_SIZE);
	return gpa;
}

/* The entry for va at a level (0: 4 KiB, 1: 2 MiB) of the tables under root. */
static u64 *entry(u64 root, u64 va, u32 level)
{
	u64 *table = window(root);

	for (u32 l = 3; l > level; l--) {
		u64 *e = &table[slot(va, l)];

		if (!*e)
			*e = new_table() | PTE_TABLE;
		table = window(*e & ~(PAGE_SIZE - 1) & ~PTE_NX);
	}
	return &table[slot(va, level)];
}

static u64 map_image(u64 root, const struct payload_header *h)
{
	for (u64 at = 0; at < h->end; at += PAGE_SIZE) {
		u64 prot = at < h->rodata ? PTE_RX : at < h->data ? PTE_RO : PTE_RW;

		*entry(root, KERNEL_VA + at, 0) = (kernel_gpa + at) | prot;
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

	shared_bit = 1UL << params->shared_bit;
	kernel_gpa = handoff->kernel_gpa;
	window_gpa = ALIGN_DOWN(kernel_gpa, LARGE_SIZE);
	open_window();
	memcpy(window(kernel_gpa), payload_start, h->file_end);
	memset(window(kernel_gpa + h->file_end), 0, h->end - h->file_end);

	next_table = ALIGN_UP(kernel_gpa + h->end, PAGE_SIZE);
	root = new_table();
	handoff->entry = map_image(root, h);
	for (u64 gpa = 0; gpa < top; gpa += LARGE_SIZE) {
		/* Low memory stays shared: a private alias of it would only invite accidents. */
		if (gpa >= params->low_size)
			*entry(root, PRIVATE_VA + gpa, 1) = gpa | PTE_RW | PTE_LARGE;
		*entry(root, SHARED_VA + gpa, 1) = gpa | shared_bit | PTE_RW | PTE_LARGE;
	}
	/* Where this code runs now, until the kernel takes it away. */
	*entry(root, 0, 1) = shared_bit | PTE_TABLE | PTE_LARGE | PTE_DIRTY;
	(void)entry(root, JUMP_VA, 1);

	handoff->cr3 = root;
	handoff->free_gpa = next_table;
	handoff->mapped_end = top;
}
