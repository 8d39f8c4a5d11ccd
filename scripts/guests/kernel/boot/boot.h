/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef BOOT_H
#define BOOT_H

#include "bootparams.h"
#include "payload.h"

#define KERNEL_ROOM 0x400000UL /* image, page tables and a first bit of free memory */
#define EXIT_PANIC 0x7f

NORETURN void boot_panic(const char *what, u64 value);

/* memory.c: make RAM private, or take what is private already; fills in where the kernel goes
 * and opens the window to it. */
void prepare_memory(const struct boot_params *params, struct handoff *handoff);

/* windows.c: PRIVATE_VA and SHARED_VA show low memory, PRIVATE_VA also 2 GiB from gpa's on. */
void open_low_windows(void);
void open_private_window(u64 gpa);

/* build.c: copy the kernel to private memory at handoff->kernel_gpa, build its page tables. */
void build_kernel(const struct boot_params *params, struct handoff *handoff);

#endif
