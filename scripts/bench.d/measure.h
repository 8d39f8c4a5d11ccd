/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Time, percentiles, numbers from the command line, and one way to give up. */
#ifndef MEASURE_H
#define MEASURE_H

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static inline uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void give_up(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

/* A positive number, or the end of the program. */
static inline size_t number(const char *text)
{
	char *end;
	unsigned long value;

	errno = 0;
	value = strtoul(text, &end, 10);
	if (errno || *end || end == text || value == 0 || value > 1000000000) {
		fprintf(stderr, "%s: not a number from 1 to 1000000000\n", text);
		exit(2);
	}
	return value;
}

static inline uint64_t *new_samples(size_t count)
{
	uint64_t *samples = calloc(count, sizeof(*samples));

	if (!samples)
		give_up("samples");
	return samples;
}

static inline int compare_samples(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static inline void sort_samples(uint64_t *samples, size_t count)
{
	qsort(samples, count, sizeof(*samples), compare_samples);
}

/* The sample that percent of all are not above; the samples are sorted. */
static inline uint64_t percentile(const uint64_t *samples, size_t count, unsigned percent)
{
	return samples[(count - 1) * percent / 100];
}

/* Print "name": {"p50_ns": ..., "p99_ns": ...} and free the samples. */
static inline void print_latency(const char *name, uint64_t *samples, size_t count)
{
	sort_samples(samples, count);
	printf("\"%s\": {\"p50_ns\": %llu, \"p99_ns\": %llu}", name,
	       (unsigned long long)percentile(samples, count, 50),
	       (unsigned long long)percentile(samples, count, 99));
	free(samples);
}

#endif
