// SPDX-License-Identifier: GPL-2.0-or-later
/* What the guest knows of the technology it runs under, what it has accepted, what it can prove. */
#include "commands.h"
#include "serial.h"
#include "string.h"

#define ROW 32 /* bytes of a report on a line */

static void put_field(const char *name, u64 value)
{
	print(" %s=%x", name, value);
}

static u64 describe(void *arg)
{
	(void)arg;
	platform->describe(put_field);
	return 0;
}

void do_tech(struct words *w)
{
	bool_t failed = 0;

	(void)w;
	console_lock();
	print("ok tech name=%s private_bit=%u shared_bit=%u accepts=%u", platform->name,
	      (u64)params.private_bit, (u64)params.shared_bit, (u64)platform->accepts);
	if (platform->describe)
		failed = guarded_call(describe, 0, &cpus[0].guard);
	print("%s\n", failed ? " incomplete=1" : "");
	console_unlock();
}

void do_accept(struct words *w)
{
	struct accepted done = { 0 };
	u64 gpa, npages, fresh;
	const char *why;

	if (!argument(w, 1, "GPA", &gpa) || !argument(w, 2, "NPAGES", &npages))
		return;
	why = platform->accepts ? range_error(gpa, npages, 1) : "no memory is accepted here";
	if (why) {
		say("error accept: range %x, %u pages: %s", gpa, npages, why);
		return;
	}
	switch (accept_again(gpa, npages, &done, &fresh)) {
	case ACCEPT_FINE:
		say("ok accept gpa=%x pages=%u accepted=%u lost=%u", gpa, npages,
		    fresh >> PAGE_SHIFT, done.large * (LARGE_SIZE / PAGE_SIZE) + done.small);
		break;
	case ACCEPT_ALREADY:
		say("error accept: page %x: already accepted", done.failed);
		break;
	default:
		say("error accept: page %x: refused, status %x", done.failed, platform_status);
	}
}

/* Two hex digits a byte; 0 if it is anything else or too long. */
static bool_t parse_hex(const char *text, u8 *out, u32 room)
{
	for (u32 i = 0; *text; i++) {
		u32 byte = 0;

		for (u32 n = 0; n < 2; n++, text++) {
			char c = *text | 0x20;
			bool_t letter = c >= 'a' && c <= 'f';

			if (!letter && !(*text >= '0' && *text <= '9'))
				return 0;
			byte = byte << 4 | (u32)(letter ? c - 'a' + 10 : *text - '0');
		}
		if (i == room)
			return 0;
		out[i] = (u8)byte;
	}
	return 1;
}

static void put_row(u64 offset, const u8 *bytes, u64 count)
{
	char text[2 * ROW + 1];

	for (u64 i = 0; i < count; i++) {
		text[2 * i] = "0123456789abcdef"[bytes[i] >> 4];
		text[2 * i + 1] = "0123456789abcdef"[bytes[i] & 15];
	}
	text[2 * count] = 0;
	say("report %x: %s", offset, text);
}

void do_report(struct words *w)
{
	static u8 data[REPORT_DATA] __attribute__((aligned(64)));
	static u8 out[REPORT_ROOM] __attribute__((aligned(4096)));
	long length;

	memset(data, 0, sizeof(data));
	if (w->count > 1 && !parse_hex(w->at[1], data, sizeof(data))) {
		say("error report: HEX must be up to %u bytes, two digits each",
		    (u64)REPORT_DATA);
		return;
	}
	if (!platform->report) {
		say("ok report kind=none bytes=0");
		return;
	}
	length = platform->report(data, out);
	if (length < 0) {
		say("error report: refused (%d), status %x", length, platform_status);
		return;
	}
	for (u64 at = 0; at < (u64)length; at += ROW)
		put_row(at, out + at, (u64)length - at < ROW ? (u64)length - at : ROW);
	say("ok report kind=%s bytes=%u", platform->report_name, (u64)length);
}
