// SPDX-License-Identifier: GPL-2.0-or-later
#include "serial.h"
#include "arch.h"
#include "platform.h"

#define RBR 0 /* receive buffer; THR on write */
#define IER 1
#define FCR 2
#define LCR 3
#define MCR 4
#define LSR 5
#define LSR_DATA_READY 0x01
#define LSR_THR_EMPTY 0x20

static u16 port;

void serial_init(u16 console_port)
{
	port = console_port;
	platform->out(port + LCR, 1, 0x03); /* 8n1, divisor latch closed */
	platform->out(port + FCR, 1, 0x01); /* FIFOs on */
	platform->out(port + MCR, 1, 0x0b); /* DTR, RTS, OUT2 */
	platform->out(port + IER, 1, 0x01); /* received data asserts the line that ends our HLT */
}

bool_t serial_ready(void)
{
	return platform->in(port + LSR, 1) & LSR_DATA_READY;
}

u8 serial_read(void)
{
	return (u8)platform->in(port + RBR, 1);
}

void serial_write(const char *text, u64 length)
{
	for (u64 i = 0; i < length; i++) {
		while (!(platform->in(port + LSR, 1) & LSR_THR_EMPTY))
			pause();
		platform->out(port, 1, (u8)text[i]);
	}
}

struct sink {
	char *out;
	u64 room, used;
};

static void put(struct sink *s, char c)
{
	if (s->used < s->room)
		s->out[s->used++] = c;
}

static void put_number(struct sink *s, u64 v, u32 base)
{
	char digits[20];
	u32 n = 0;

	do {
		digits[n++] = "0123456789abcdef"[v % base];
		v /= base;
	} while (v);
	while (n)
		put(s, digits[--n]);
}

u64 format_line(char *out, u64 room, const char *format, __builtin_va_list args)
{
	struct sink s = { out, room, 0 };

	for (const char *f = format; *f; f++) {
		if (*f != '%') {
			put(&s, *f);
			continue;
		}
		switch (*++f) {
		case 's':
			for (const char *t = __builtin_va_arg(args, const char *); *t; t++)
				put(&s, *t);
			break;
		case 'c':
			put(&s, (char)__builtin_va_arg(args, int));
			break;
		case 'x':
			put(&s, '0');
			put(&s, 'x');
			put_number(&s, __builtin_va_arg(args, u64), 16);
			break;
		case 'd': {
			long v = __builtin_va_arg(args, long);

			if (v < 0)
				put(&s, '-');
			put_number(&s, v < 0 ? -(u64)v : (u64)v, 10);
			break;
		}
		case 'u':
			put_number(&s, __builtin_va_arg(args, u64), 10);
			break;
		default:
			put(&s, *f);
		}
	}
	return s.used;
}

void print(const char *format, ...)
{
	char line[1024];
	__builtin_va_list args;

	__builtin_va_start(args, format);
	serial_write(line, format_line(line, sizeof(line), format, args));
	__builtin_va_end(args);
}

/* APM vol. 2, table 8-1; #VE: SDM vol. 3, table 6-1. */
static const char *const names[TRAP_VECTORS] = {
	[0] = "#DE divide error",
	[1] = "#DB debug",
	[2] = "NMI",
	[3] = "#BP breakpoint",
	[4] = "#OF overflow",
	[5] = "#BR bound range",
	[6] = "#UD invalid opcode",
	[7] = "#NM device not available",
	[8] = "#DF double fault",
	[10] = "#TS invalid TSS",
	[11] = "#NP segment not present",
	[12] = "#SS stack",
	[13] = "#GP general protection",
	[14] = "#PF page fault",
	[16] = "#MF x87 floating point",
	[17] = "#AC alignment check",
	[18] = "#MC machine check",
	[19] = "#XF SIMD floating point",
	[20] = "#VE virtualization",
	[21] = "#CP control protection",
	[28] = "#HV hypervisor injection",
	[29] = "#VC VMM communication",
	[30] = "#SX security",
};

const char *trap_name(u64 vector)
{
	const char *name = vector < TRAP_VECTORS ? names[vector] : 0;

	return name ? name : "reserved vector";
}
