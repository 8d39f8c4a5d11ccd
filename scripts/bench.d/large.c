// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What a caller waits for when it punches a whole large file.
 *
 *   large PATH GIB [resident]    make PATH that large, with resident allocate all of it; time one
 *                                punch of everything, print JSON; the file is empty afterwards
 */
#include <fcntl.h>
#include <stdbool.h>
#include <unistd.h>

#include "measure.h"

#define GIB (1LL << 30)

int main(int argc, char **argv)
{
	bool resident = argc == 4 && !strcmp(argv[3], "resident");
	uint64_t start, took;
	off_t size;
	int fd;

	if (argc < 3 || argc > 4 || (argc == 4 && !resident)) {
		fprintf(stderr, "usage: large PATH GIB [resident]\n");
		return 2;
	}
	size = (off_t)number(argv[2]) * GIB;
	fd = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, size))
		give_up(argv[1]);
	for (off_t at = 0; resident && at < size; at += GIB)
		if (fallocate(fd, FALLOC_FL_KEEP_SIZE, at, GIB))
			give_up("fallocate");
	start = now_ns();
	if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, size))
		give_up("punch");
	took = now_ns() - start;
	printf("{\"punch_ns\": %llu}\n", (unsigned long long)took);
	return 0;
}
