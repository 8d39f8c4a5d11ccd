// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The VMM's boot tables map the first GiB at its own address. They get windows here, at the
 * addresses where the kernel's own tables will show the same memory.
 */
#include "arch.h"
#include "boot.h"
#include "platform.h"

#define GIB 0x40000000UL
#define TABLE __attribute__((aligned(4096)))

static u64 private_pdpt[512] TABLE, private_low[512] TABLE, private_pd[2][512] TABLE;
static u64 shared_pdpt[512] TABLE, shared_low[512] TABLE;

/* The boot tables lie on the side on which the VMM put all of low memory. */
static u64 low_mask(void)
{
	return platform->confidential ? private_mask : shared_mask;
}

static u64 table(const void *own)
{
	return (u64)own | low_mask() | PTE_TABLE;
}

static void fill(u64 *pd, u64 gpa, u64 mask)
{
	for (u64 i = 0; i < 512; i++)
		pd[i] = (gpa + i * LARGE_SIZE) | mask | PTE_RW | PTE_LARGE;
}

void open_low_windows(void)
{
	u64 *pml4 = (u64 *)(read_cr3() & PTE_ADDRESS & ~low_mask());

	fill(private_low, 0, private_mask);
	fill(shared_low, 0, shared_mask);
	private_pdpt[0] = table(private_low);
	shared_pdpt[0] = table(shared_low);
	pml4[PRIVATE_VA >> 39 & 511] = table(private_pdpt);
	pml4[SHARED_VA >> 39 & 511] = table(shared_pdpt);
	write_cr3(read_cr3());
}

void open_private_window(u64 gpa)
{
	u64 first = gpa / GIB;

	for (u64 i = 0; i < 2; i++) {
		if (!(first + i))
			continue; /* low memory's */
		fill(private_pd[i], (first + i) * GIB, private_mask);
		private_pdpt[(first + i) & 511] = table(private_pd[i]);
	}
	write_cr3(read_cr3());
}
