/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef BOOT_H
#define BOOT_H

#include "bootparams.h"
#include "payload.h"

#define KERNEL_ROOM 0x400000UL /* image, page tables and a first bit of free memory */
#define EXIT_PANIC 0x7f

NORETURN void boot_panic(const char *what, u64 value);

/* Copy the kernel to private memory at handoff->kernel_gpa and build its page tables there. */
void build_kernel(const struct boot_params *params, struct handoff *handoff);

#endif
