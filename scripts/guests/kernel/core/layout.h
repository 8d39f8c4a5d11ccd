/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Numbers that entry.S shares with C; kernel.h asserts that they agree. */
#ifndef LAYOUT_H
#define LAYOUT_H

#define STACK_SHIFT 14
#define MAX_VCPUS 16
#define SEL_CODE_ASM 0x08
#define SEL_DATA_ASM 0x10
#define GUARD_RSP 0
#define GUARD_RESULT 8
#define GUARD_ACTIVE 16

#endif
