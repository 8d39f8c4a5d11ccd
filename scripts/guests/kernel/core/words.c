// SPDX-License-Identifier: GPL-2.0-or-later
/* The words of a command line, and what they must be. A check that fails has answered already. */
#include "words.h"
#include "string.h"

bool_t split_words(char *line, struct words *w)
{
	for (char *at = line; *at;) {
		while (*at == ' ' || *at == '\t')
			*at++ = 0;
		if (!*at)
			break;
		if (w->count == MAX_WORDS) {
			say("error line: more than %u words", (u64)MAX_WORDS);
			return 0;
		}
		w->at[w->count++] = at;
		while (*at && *at != ' ' && *at != '\t')
			at++;
	}
	return 1;
}

static bool_t number(const char *text, u64 *out)
{
	u64 base = 10, v = 0;

	if (text[0] == '0' && (text[1] == 'x' || text[1] == 'X')) {
		base = 16;
		text += 2;
	}
	if (!*text)
		return 0;
	for (; *text; text++) {
		u64 digit = *text >= '0' && *text <= '9'   ? (u64)(*text - '0')
			    : *text >= 'a' && *text <= 'f' ? (u64)(*text - 'a' + 10)
			    : *text >= 'A' && *text <= 'F' ? (u64)(*text - 'A' + 10)
							   : 16;

		if (digit >= base || v > (~0UL - digit) / base)
			return 0;
		v = v * base + digit;
	}
	*out = v;
	return 1;
}

bool_t argument(const struct words *w, u32 i, const char *name, u64 *out)
{
	if (i < w->count && number(w->at[i], out))
		return 1;
	say("error %s: %s must be a number (decimal or 0x...), see help", w->at[0], name);
	return 0;
}

bool_t side_argument(const struct words *w, u32 i, u64 gpa, enum side *side)
{
	*side = side_at_boot(gpa);
	if (i >= w->count)
		return 1;
	if (streq(w->at[i], "private") || streq(w->at[i], "shared")) {
		*side = w->at[i][0] == 's' ? SIDE_SHARED : SIDE_PRIVATE;
		return 1;
	}
	say("error %s: side must be private or shared, not %s", w->at[0], w->at[i]);
	return 0;
}

bool_t vcpu_argument(const struct words *w, u32 i, u64 *vcpu)
{
	if (!argument(w, i, "VCPU", vcpu))
		return 0;
	if (*vcpu < params.vcpus)
		return 1;
	say("error %s: no vcpu %u, there are %u", w->at[0], *vcpu, (u64)params.vcpus);
	return 0;
}

bool_t range_arguments(const struct words *w, u32 i, u64 *gpa, u64 *npages, bool_t keep)
{
	const char *why;

	if (!argument(w, i, "GPA", gpa) || !argument(w, i + 1, "NPAGES", npages))
		return 0;
	why = range_error(*gpa, *npages, keep);
	if (why)
		say("error %s: range %x, %u pages: %s", w->at[0], *gpa, *npages, why);
	else
		accept_claim(*gpa, *npages);
	return !why;
}

bool_t word_arguments(const struct words *w, u64 *gpa)
{
	if (!argument(w, 1, "GPA", gpa))
		return 0;
	if (!(*gpa & 7) && *gpa < 1UL << 39)
		return 1;
	say("error %s: gpa %x must be a multiple of 8 below 2^39", w->at[0], *gpa);
	return 0;
}
