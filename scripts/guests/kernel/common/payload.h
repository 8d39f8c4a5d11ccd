/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How the boot stage finds its way in the kernel's flat image (written by core/kernel.ld). */
#ifndef PAYLOAD_H
#define PAYLOAD_H

#define PAYLOAD_MAGIC 0x444c5950

#ifndef __ASSEMBLER__
#include "types.h"

struct payload_header {
	u32 magic;
	u32 entry;  /* offsets from the start of the image, all but entry page-aligned */
	u32 rodata; /* [0, rodata) is executed */
	u32 data;   /* [rodata, data) is read */
	u32 file_end;
	u32 end; /* [data, end) is written; [file_end, end) starts as zeroes */
};

/* Handed from the boot stage to kernel_main through low memory. */
struct handoff {
	u64 cr3;
	u64 entry;
	u64 kernel_gpa; /* private */
	u64 free_gpa;	/* first private byte behind kernel and page tables */
	u64 mapped_end; /* the direct maps cover [0, mapped_end) */
	u64 accepted;	/* [accepted, accepted_end) has been accepted already, empty if none */
	u64 accepted_end;
	volatile u32 ready;
};
#endif

#endif
