// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * How fast C touches fresh pages: a new memfd, mapped shared, one byte written to each page.
 *
 *   touch_floor [--allocated] [PAGES [ROUNDS]]    print the median of the rounds as JSON
 *
 * --allocated: the pages are in the file already (fallocate), so a touch only maps.
 */
#include <fcntl.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <unistd.h>

#include "measure.h"

#define PAGE 4096

static uint64_t touch(size_t pages, bool allocated)
{
	int fd = memfd_create("touch_floor", MFD_CLOEXEC);
	volatile char *memory;
	uint64_t start, took;

	if (fd < 0 || ftruncate(fd, (off_t)(pages * PAGE)))
		give_up("memfd");
	if (allocated && fallocate(fd, 0, 0, (off_t)(pages * PAGE)))
		give_up("fallocate");
	memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		give_up("mmap");
	/* One fault for each page: no huge pages. Fails only where there are none. */
	madvise((void *)memory, pages * PAGE, MADV_NOHUGEPAGE);
	start = now_ns();
	for (size_t page = 0; page < pages; page++)
		memory[page * PAGE] = 1;
	took = now_ns() - start;
	munmap((void *)memory, pages * PAGE);
	close(fd);
	return took;
}

int main(int argc, char **argv)
{
	bool allocated = argc > 1 && !strcmp(argv[1], "--allocated");
	uint64_t *samples, median;
	size_t pages, rounds;

	argc -= allocated;
	argv += allocated;
	if (argc > 3) {
		fprintf(stderr, "usage: touch_floor [--allocated] [PAGES [ROUNDS]]\n");
		return 2;
	}
	pages = argc > 1 ? number(argv[1]) : 65536;
	rounds = argc > 2 ? number(argv[2]) : 5;
	samples = new_samples(rounds);
	for (size_t round = 0; round < rounds; round++)
		samples[round] = touch(pages, allocated);
	sort_samples(samples, rounds);
	median = percentile(samples, rounds, 50);
	printf("{\"pages\": %zu, \"rounds\": %zu, \"pages_per_second\": %.0f, \"ns_per_page\": %.1f}\n",
	       pages, rounds, (double)pages * 1e9 / (double)median, (double)median / (double)pages);
	free(samples);
	return 0;
}
