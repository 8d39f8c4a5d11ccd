/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef WORDS_H
#define WORDS_H

#include "kernel.h"

#define MAX_WORDS 6

struct words {
	u32 count;
	char *at[MAX_WORDS];
};

/* Cut a line into words, in place. */
bool_t split_words(char *line, struct words *w);

/* Word i as a number called name in complaints. */
bool_t argument(const struct words *w, u32 i, const char *name, u64 *out);
/* Word i as a side; without it the side that gpa has after boot. */
bool_t side_argument(const struct words *w, u32 i, u64 gpa, enum side *side);
bool_t vcpu_argument(const struct words *w, u32 i, u64 *vcpu);
/* Words i and i + 1 as a range inside RAM; keep: not where it would hurt ourselves.
 * The pages are accepted then. */
bool_t range_arguments(const struct words *w, u32 i, u64 *gpa, u64 *npages, bool_t keep);
/* Word 1 as the gpa of an 8-byte word. */
bool_t word_arguments(const struct words *w, u64 *gpa);

#endif
