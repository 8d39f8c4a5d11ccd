// SPDX-License-Identifier: GPL-2.0-or-later
/* Whole lines in and out of the serial port. Only the boot vCPU reads. */
#include "kernel.h"
#include "serial.h"

#define LINE 256
#define WORK_PER_POLL 32 /* a look at the port is an exit, far dearer than a slice of work */

#define LOCK_PATIENCE (1UL << 26) /* then a vCPU died with the lock: better mixed than mute */

static volatile u32 lock;
static char line[LINE];
static u32 used;
static bool_t too_long;

void console_lock(void)
{
	for (u64 i = 0; i < LOCK_PATIENCE; i++) {
		if (!__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE))
			return;
		pause();
	}
}

void console_unlock(void)
{
	__atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
}

void say(const char *format, ...)
{
	char text[1024];
	__builtin_va_list args;
	u64 n;

	__builtin_va_start(args, format);
	n = format_line(text, sizeof(text) - 1, format, args);
	__builtin_va_end(args);
	text[n++] = '\n';
	console_lock();
	serial_write(text, n);
	console_unlock();
}

static void prompt(void)
{
	console_lock();
	serial_write("> ", 2);
	console_unlock();
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
		u32 worked = 0;

		while (serial_ready())
			take((char)serial_read());
		while (worked < WORK_PER_POLL && work_step(0))
			worked++;
		if (!worked)
			platform->halt(); /* input asserts the serial line, which ends it or forbids it */
	}
}
