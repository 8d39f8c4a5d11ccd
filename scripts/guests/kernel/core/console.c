// SPDX-License-Identifier: GPL-2.0-or-later
/* Whole lines in and out of the serial port. Only the boot vCPU reads. */
#include "kernel.h"
#include "serial.h"

#define LINE 256

static volatile u32 lock;
static char line[LINE];
static u32 used;
static bool_t too_long;

void say(const char *format, ...)
{
	char text[2048];
	__builtin_va_list args;
	u64 n;

	__builtin_va_start(args, format);
	n = format_line(text, sizeof(text) - 1, format, args);
	__builtin_va_end(args);
	text[n++] = '\n';
	while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE))
		pause();
	serial_write(text, n);
	__atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
}

static void prompt(void)
{
	serial_write("> ", 2);
}

static void finish_line(void)
{
	line[used] = 0;
	if (too_long)
		say("error line: longer than %u characters, ignored", (u64)LINE - 1);
	else
		command_run(line);
	used = 0;
	too_long = 0;
	prompt();
}

static void take(char c)
{
	if (params.flags & BOOT_FLAG_ECHO)
		serial_write(c == '\r' ? "\n" : &c, 1);
	if (c == '\n' || c == '\r') {
		finish_line();
	} else if (c == '\b' || c == 0x7f) {
		used -= used > 0;
	} else if (used < LINE - 1) {
		line[used++] = c;
	} else {
		too_long = 1;
	}
}

void console_run(void)
{
	prompt();
	for (;;) {
		while (serial_ready())
			take((char)serial_read());
		if (!work_step(0) && !serial_ready())
			halt_once(); /* until the serial line is asserted */
	}
}
