// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * How many million instructions a second the processor itself runs of two loops (x86-64):
 * "count" is dec, jnz; "memory" is load, add, store, dec, jnz on one word.
 *
 *   cpu_floor [ITERATIONS [ROUNDS]]    print the median of the rounds as JSON
 */
#include "measure.h"

#define COUNT_INSTRUCTIONS 2
#define MEMORY_INSTRUCTIONS 5

static void count_loop(uint64_t iterations)
{
	__asm__ volatile("1: dec %0\n\t"
			 "jnz 1b"
			 : "+r"(iterations)
			 :
			 : "cc");
}

static void memory_loop(uint64_t iterations)
{
	uint64_t word = 0, scratch;

	__asm__ volatile("1: mov %[word], %[scratch]\n\t"
			 "add $1, %[scratch]\n\t"
			 "mov %[scratch], %[word]\n\t"
			 "dec %[left]\n\t"
			 "jnz 1b"
			 : [left] "+r"(iterations), [scratch] "=&r"(scratch), [word] "+m"(word)
			 :
			 : "cc");
}

static double mips(void (*loop)(uint64_t), unsigned instructions, size_t iterations, size_t rounds)
{
	uint64_t *samples = new_samples(rounds), median;

	for (size_t round = 0; round < rounds; round++) {
		uint64_t start = now_ns();

		loop(iterations);
		samples[round] = now_ns() - start;
	}
	sort_samples(samples, rounds);
	median = percentile(samples, rounds, 50);
	free(samples);
	return (double)iterations * instructions * 1e3 / (double)median;
}

int main(int argc, char **argv)
{
	size_t iterations = argc > 1 ? number(argv[1]) : 50000000;
	size_t rounds = argc > 2 ? number(argv[2]) : 5;

	if (argc > 3) {
		fprintf(stderr, "usage: cpu_floor [ITERATIONS [ROUNDS]]\n");
		return 2;
	}
	printf("{\"iterations\": %zu, \"rounds\": %zu, \"count_mips\": %.0f, \"memory_mips\": %.0f}\n",
	       iterations, rounds, mips(count_loop, COUNT_INSTRUCTIONS, iterations, rounds),
	       mips(memory_loop, MEMORY_INSTRUCTIONS, iterations, rounds));
	return 0;
}
