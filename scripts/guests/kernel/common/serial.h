/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A polled 16550 and printf-like output, used by both stages. */
#ifndef SERIAL_H
#define SERIAL_H

#include "types.h"

void serial_init(u16 port);
bool_t serial_ready(void);
u8 serial_read(void);
void serial_write(const char *text, u64 length);

/* Formats %s, %c, %u (unsigned long), %x (unsigned long, with 0x), %d (long), %%. */
void print(const char *format, ...);
u64 format_line(char *out, u64 room, const char *format, __builtin_va_list args);

const char *trap_name(u64 vector);

#endif
