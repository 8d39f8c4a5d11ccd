// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What a round trip of one 40-byte record costs in C, over a SEQPACKET socket.
 *
 *   echo_floor serve PATH          listen, answer one connection until it ends
 *   echo_floor user PATH           connect, answer until the connection ends (a user of fuse_floor)
 *   echo_floor measure PATH [N]    connect, time N round trips, print JSON
 *
 * serve and user print "ready" when they listen or are connected.
 */
#include "record.h"

#define WARM_UP 200

static void answer(int fd)
{
	unsigned char record[RECORD_SIZE];

	while (receive_record(fd, record) && send_record(fd, record))
		;
	close(fd);
}

static int say_ready(int fd)
{
	puts("ready");
	fflush(stdout);
	return fd;
}

static void serve(const char *path)
{
	int listener = say_ready(listen_at(path));
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

	unlink(path);
	if (fd < 0)
		give_up(path);
	answer(fd);
}

static void measure(const char *path, size_t count)
{
	int fd = connect_to(path);
	uint64_t *samples = new_samples(count);
	unsigned char sent[RECORD_SIZE] = { 0 }, received[RECORD_SIZE];

	for (size_t i = 0; i < WARM_UP + count; i++) {
		uint64_t start = now_ns();

		memcpy(sent, &i, sizeof(i));
		if (!send_record(fd, sent) || !receive_record(fd, received))
			give_up("round trip");
		if (memcmp(sent, received, RECORD_SIZE)) {
			fprintf(stderr, "round trip: another record came back\n");
			exit(1);
		}
		if (i >= WARM_UP)
			samples[i - WARM_UP] = now_ns() - start;
	}
	printf("{\"calls\": %zu, ", count);
	print_latency("round_trip", samples, count);
	printf("}\n");
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "serve"))
		serve(argv[2]);
	else if (argc == 3 && !strcmp(argv[1], "user"))
		answer(say_ready(connect_to(argv[2])));
	else if ((argc == 3 || argc == 4) && !strcmp(argv[1], "measure"))
		measure(argv[2], argc == 4 ? number(argv[3]) : 20000);
	else {
		fprintf(stderr, "usage: echo_floor serve|user PATH | measure PATH [N]\n");
		return 2;
	}
	return 0;
}
