// SPDX-License-Identifier: GPL-2.0-or-later
/* What a freestanding gcc may call. */
#include "string.h"

void *memset(void *dst, int value, u64 n)
{
	u8 *d = dst;

	while (n--)
		*d++ = (u8)value;
	return dst;
}

void *memcpy(void *dst, const void *src, u64 n)
{
	u8 *d = dst;
	const u8 *s = src;

	while (n--)
		*d++ = *s++;
	return dst;
}

bool_t streq(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}
