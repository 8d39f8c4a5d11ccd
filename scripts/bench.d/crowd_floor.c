// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What it costs in C to tell a crowd something and hear from everyone, over SEQPACKET sockets.
 *
 *   crowd_floor users PATH USERS               connect so often, answer every record, print "ready"
 *   crowd_floor measure PATH USERS FILES [N]   take so many users; send a record to all of them for
 *                                              each of FILES at a time, N in all; print JSON
 *
 * A round is over when all users have answered; then the file's next one begins. Records that are
 * ready at the same time travel in one frame.
 */
#include <poll.h>

#include "record.h"

#define MAX_USERS 1024
#define MAX_FILES 256
#define WARM_UP 50

struct frame {
	unsigned char bytes[MAX_FILES * RECORD_SIZE];
	size_t length;
};

static struct pollfd line[MAX_USERS];
static size_t users, files;

static void send_frame(int fd, const struct frame *frame)
{
	if (frame->length && send(fd, frame->bytes, frame->length, MSG_NOSIGNAL) < 0)
		give_up("send");
}

/* Wait for frames; take one from each line that has some. Returns the lines that are left. */
static size_t take(void (*taken)(size_t user, struct frame *frame))
{
	static struct frame frame;
	size_t left = 0;

	if (poll(line, users, -1) < 0)
		give_up("poll");
	for (size_t user = 0; user < users; user++) {
		if (line[user].fd < 0)
			continue;
		left++;
		if (!line[user].revents)
			continue;
		ssize_t got = recv(line[user].fd, frame.bytes, sizeof(frame.bytes), 0);

		if (got <= 0) {
			close(line[user].fd);
			line[user].fd = -1;
			left--;
			continue;
		}
		frame.length = (size_t)got;
		taken(user, &frame);
	}
	return left;
}

static void answer(size_t user, struct frame *frame)
{
	send_frame(line[user].fd, frame);
}

static void be_users(const char *path)
{
	for (size_t user = 0; user < users; user++)
		line[user] = (struct pollfd){ .fd = connect_to(path), .events = POLLIN };
	puts("ready");
	fflush(stdout);
	while (take(answer))
		;
}

static size_t missing[MAX_FILES], begun, ended;
static uint64_t since[MAX_FILES], *samples;
static struct frame out;

static void begin(size_t file)
{
	memcpy(out.bytes + out.length, &file, sizeof(file));
	out.length += RECORD_SIZE;
	missing[file] = users;
	since[file] = now_ns();
	begun++;
}

static void hear(size_t user, struct frame *frame)
{
	(void)user;
	for (size_t at = 0; at < frame->length; at += RECORD_SIZE) {
		size_t file;

		memcpy(&file, frame->bytes + at, sizeof(file));
		if (file >= files || !missing[file]) {
			fprintf(stderr, "an answer that nobody asked for\n");
			exit(1);
		}
		if (--missing[file])
			continue;
		if (ended >= WARM_UP)
			samples[ended - WARM_UP] = now_ns() - since[file];
		ended++;
	}
}

static void measure(const char *path, size_t count)
{
	int listener = listen_at(path);
	uint64_t start = 0;

	puts("ready");
	fflush(stdout);
	for (size_t user = 0; user < users; user++) {
		line[user] = (struct pollfd){ .fd = accept(listener, NULL, NULL), .events = POLLIN };
		if (line[user].fd < 0)
			give_up(path);
	}
	unlink(path);
	samples = new_samples(count + files);
	while (ended < WARM_UP + count) {
		if (!start && ended >= WARM_UP)
			start = now_ns();
		out.length = 0;
		for (size_t file = 0; file < files; file++)
			if (!missing[file] && begun < WARM_UP + count)
				begin(file);
		for (size_t user = 0; user < users; user++)
			send_frame(line[user].fd, &out);
		take(hear);
	}
	printf("{\"per_second\": %.1f, ", (double)count * 1e9 / (double)(now_ns() - start));
	print_latency("round_trip", samples, count);
	printf("}\n");
}

int main(int argc, char **argv)
{
	users = argc > 3 ? number(argv[3]) : 0;
	files = argc > 4 ? number(argv[4]) : 1;
	if (users && users <= MAX_USERS && files <= MAX_FILES) {
		if (argc == 4 && !strcmp(argv[1], "users")) {
			be_users(argv[2]);
			return 0;
		}
		if ((argc == 5 || argc == 6) && !strcmp(argv[1], "measure")) {
			measure(argv[2], argc == 6 ? number(argv[5]) : 2000);
			return 0;
		}
	}
	fprintf(stderr, "usage: crowd_floor users PATH USERS | measure PATH USERS FILES [N]\n"
			"at most %d users and %d files\n", MAX_USERS, MAX_FILES);
	return 2;
}
