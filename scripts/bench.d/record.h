/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A SEQPACKET connection that carries records of the channel's size, 40 bytes. */
#ifndef RECORD_H
#define RECORD_H

#include <stdbool.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "measure.h"

#define RECORD_SIZE 40

static inline struct sockaddr_un socket_address(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	if (strlen(path) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		give_up(path);
	}
	strcpy(address.sun_path, path);
	return address;
}

static inline int new_socket(void)
{
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	if (fd < 0)
		give_up("socket");
	return fd;
}

static inline int listen_at(const char *path)
{
	struct sockaddr_un address = socket_address(path);
	int fd = new_socket();

	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 1024))
		give_up(path);
	return fd;
}

static inline int connect_to(const char *path)
{
	struct sockaddr_un address = socket_address(path);
	int fd = new_socket();

	if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
		give_up(path);
	return fd;
}

/* Whole records only; false at the end of the connection. */
static inline bool send_record(int fd, const unsigned char *record)
{
	return send(fd, record, RECORD_SIZE, MSG_NOSIGNAL) == RECORD_SIZE;
}

static inline bool receive_record(int fd, unsigned char *record)
{
	return recv(fd, record, RECORD_SIZE, 0) == RECORD_SIZE;
}

#endif
