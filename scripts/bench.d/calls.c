// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What a caller waits for fstat, ftruncate, and punching and allocating one page.
 *
 *   calls PATH [N [GROUP]]    make PATH if need be, time N calls of each kind, print JSON
 *
 * GROUP is fstat, ftruncate (up and down) or fallocate (punch and allocate); without it, all three.
 * Sizes are the same on every server: the file goes up from 1 MiB to 2 MiB and down again without a
 * page in the part that comes and goes; the page at 64 KiB is punched and allocated in turn.
 */
#include <fcntl.h>
#include <stdbool.h>
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

/* Calls of one group are made in turn, so that each undoes the one before. */
static const struct group {
	const char *name;
	enum call turn[2];
} groups[] = {
	{ "fstat", { FSTAT, FSTAT } },
	{ "ftruncate", { TRUNCATE_UP, TRUNCATE_DOWN } },
	{ "fallocate", { PUNCH, ALLOCATE } },
};
#define GROUPS (sizeof(groups) / sizeof(groups[0]))

static bool wanted(const struct group *group, const char *only)
{
	return !only || !strcmp(group->name, only);
}

int main(int argc, char **argv)
{
	const char *only = argc == 4 ? argv[3] : NULL;
	uint64_t *samples[CALLS] = { NULL };
	bool known = false;
	size_t count;
	int fd;

	for (size_t g = 0; g < GROUPS; g++)
		known |= wanted(&groups[g], only);
	if (argc < 2 || argc > 4 || !known) {
		fprintf(stderr, "usage: calls PATH [N [fstat|ftruncate|fallocate]]\n");
		return 2;
	}
	count = argc > 2 ? number(argv[2]) : 2000;
	fd = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, SMALL) || fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, SMALL))
		give_up(argv[1]);

	for (size_t g = 0; g < GROUPS; g++) {
		if (!wanted(&groups[g], only))
			continue;
		for (int half = 0; half < 2; half++)
			if (!samples[groups[g].turn[half]])
				samples[groups[g].turn[half]] = new_samples(count);
		for (size_t i = 0; i < WARM_UP + count; i++) {
			for (int half = 0; half < 2; half++) {
				enum call which = groups[g].turn[half];
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
		if (!samples[which])
			continue;
		printf(", ");
		print_latency(names[which], samples[which], count);
	}
	printf("}\n");
	return 0;
}
