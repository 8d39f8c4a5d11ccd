/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef STRING_H
#define STRING_H

#include "types.h"

void *memset(void *dst, int value, u64 n);
void *memcpy(void *dst, const void *src, u64 n);
bool_t streq(const char *a, const char *b);

#endif
