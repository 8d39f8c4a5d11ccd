// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * How fast C touches fresh pages: a new memfd, mapped shared, one byte written to each page.
 *
 *   touch_floor [PAGES [ROUNDS]]    print the median of the rounds as JSON
 */
#include <sys/mman.h>
#include <unistd.h>

#include "measure.h"

#define PAGE 4096

static uint64_t touch(size_t pages)
{
	int fd = memfd_create("touch_floor", MFD_CLOEXEC);
	volatile char *memory;
	uint64_t start, took;

	if (fd < 0 || ftruncate(fd, (off_t)(pages * PAGE)))
		give_up("memfd");
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
	size_t pages = argc > 1 ? number(argv[1]) : 65536;
	size_t rounds = argc > 2 ? number(argv[2]) : 5;
	uint64_t *samples = new_samples(rounds), median;

	if (argc > 3) {
		fprintf(stderr, "usage: touch_floor [PAGES [ROUNDS]]\n");
		return 2;
	}
	for (size_t round = 0; round < rounds; round++)
		samples[round] = touch(pages);
	sort_samples(samples, rounds);
	median = percentile(samples, rounds, 50);
	printf("{\"pages\": %zu, \"rounds\": %zu, \"pages_per_second\": %.0f, \"ns_per_page\": %.1f}\n",
	       pages, rounds, (double)pages * 1e9 / (double)median, (double)median / (double)pages);
	free(samples);
	return 0;
}
