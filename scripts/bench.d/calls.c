// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What a caller waits for fstat, ftruncate, and punching and allocating one page.
 *
 *   calls PATH [N]    make PATH if need be, time N calls of each kind, print JSON
 *
 * Sizes are the same on every server: the file goes up from 1 MiB to 2 MiB and down again without a
 * page in the part that comes and goes; the page at 64 KiB is punched and allocated in turn.
 */
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "measure.h"

#define PAGE 4096
#define SMALL (1 << 20)
#define LARGE (2 << 20)
#define HOLE (64 << 10)
#define WARM_UP 50

enum call { FSTAT, TRUNCATE_UP, TRUNCATE_DOWN, PUNCH, ALLOCATE, CALLS };
static const char *const names[CALLS] = {
	"fstat", "ftruncate_up", "ftruncate_down", "punch", "allocate",
};

static int call(int fd, enum call which)
{
	struct stat st;

	switch (which) {
	case FSTAT:
		return fstat(fd, &st);
	case TRUNCATE_UP:
		return ftruncate(fd, LARGE);
	case TRUNCATE_DOWN:
		return ftruncate(fd, SMALL);
	case PUNCH:
		return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, HOLE, PAGE);
	default:
		return fallocate(fd, FALLOC_FL_KEEP_SIZE, HOLE, PAGE);
	}
}

int main(int argc, char **argv)
{
	/* Calls of one line are made in turn, so that each undoes the one before. */
	static const enum call turns[][2] = {
		{ FSTAT, FSTAT }, { TRUNCATE_UP, TRUNCATE_DOWN }, { PUNCH, ALLOCATE },
	};
	uint64_t *samples[CALLS];
	size_t count;
	int fd;

	if (argc < 2 || argc > 3) {
		fprintf(stderr, "usage: calls PATH [N]\n");
		return 2;
	}
	count = argc == 3 ? number(argv[2]) : 2000;
	fd = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, SMALL) || fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, SMALL))
		give_up(argv[1]);
	for (int which = 0; which < CALLS; which++)
		samples[which] = new_samples(count);

	for (size_t turn = 0; turn < sizeof(turns) / sizeof(turns[0]); turn++) {
		for (size_t i = 0; i < WARM_UP + count; i++) {
			for (int half = 0; half < 2; half++) {
				enum call which = turns[turn][half];
				uint64_t start = now_ns();

				if (call(fd, which))
					give_up(names[which]);
				if (i >= WARM_UP)
					samples[which][i - WARM_UP] = now_ns() - start;
			}
		}
	}

	printf("{\"calls\": %zu", count);
	for (int which = 0; which < CALLS; which++) {
		printf(", ");
		print_latency(names[which], samples[which], count);
	}
	printf("}\n");
	return 0;
}
