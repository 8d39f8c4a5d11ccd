/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KERNEL_H
#define KERNEL_H

#include "arch.h"
#include "bootparams.h"
#include "layout.h"
#include "payload.h"
#include "platform.h"
#include "stamplog.h"

#define EXIT_OK 0
#define EXIT_PANIC 0x7f

/* guarded_call (entry.S): what an exception inside the call looked like. */
struct guard {
	u64 rsp;
	u64 result;
	volatile u32 active;
	u32 reserved;
	u64 vector, error, rip, cr2;
};
_Static_assert(__builtin_offsetof(struct guard, rsp) == GUARD_RSP, "entry.S");
_Static_assert(__builtin_offsetof(struct guard, result) == GUARD_RESULT, "entry.S");
_Static_assert(__builtin_offsetof(struct guard, active) == GUARD_ACTIVE, "entry.S");
_Static_assert(MAX_VCPUS == BOOT_MAX_VCPUS, "entry.S");
_Static_assert(SEL_CODE == SEL_CODE_ASM && SEL_DATA == SEL_DATA_ASM, "entry.S");

bool_t guarded_call(u64 (*fn)(void *), void *arg, struct guard *guard);
void guard_resume(void);
void load_segments(const struct table_register *gdt, u64 tss_selector);

enum mode { MODE_IDLE, MODE_SPIN, MODE_STAMP, MODE_CALL, MODE_DEAD };

struct work {
	u64 gpa;
	u64 npages;
	u64 random;  /* generator state, never 0 */
	u32 pattern; /* enum pattern */
	u32 generation;
	u64 next; /* for PATTERN_SEQ */
	void (*call)(u32 cpu, void *arg);
	void *arg;
};

enum pattern { PATTERN_RANDOM, PATTERN_SEQ, PATTERN_READ, PATTERN_WRITE };

struct cpu {
	volatile u32 want; /* enum mode: what the boot vCPU asks for */
	volatile u32 mode; /* enum mode: what this vCPU does */
	struct work work;
	struct guard guard;
};

extern struct cpu cpus[MAX_VCPUS];
extern struct boot_params params; /* a private copy */
extern struct handoff layout;	  /* likewise */

u32 this_cpu(void);

/* traps.c */
void traps_init(void);
void traps_load(u32 cpu);
NORETURN void stop_machine(u32 status);
NORETURN void give_up(const char *what); /* the panic has been printed */

/* console.c */
void say(const char *format, ...); /* one whole line */
void console_lock(void);	   /* around a line that is printed in parts */
void console_unlock(void);
void console_run(void);		   /* the boot vCPU's loop */

/* command.c */
void command_run(char *line);

/* memory.c */
enum side { SIDE_PRIVATE, SIDE_SHARED };
void *gpa_address(u64 gpa, enum side side);
volatile u64 *page_word(u64 gfn); /* the first word of a private page */
const char *side_name(enum side side);
const char *range_error(u64 gpa, u64 npages, bool_t keep_kernel); /* 0 if fine */
bool_t memory_peek(u64 gpa, enum side side, u64 *value);
bool_t memory_touch(u64 gpa, enum side side, u64 *value); /* … without accepting the page */
bool_t memory_poke(u64 gpa, enum side side, u64 value);
bool_t memory_fill(u64 gpa, u64 npages, u64 value);
bool_t memory_sum(u64 gpa, u64 npages, u64 *sum);
bool_t memory_jump(u64 gpa, enum side side, u64 *result);
/* 0, an errno of the VMM, or what the processor said of accepting the pages. */
#define CONVERT_ALREADY 1L
#define CONVERT_FAILED 2L
long memory_convert(u64 gpa, u64 npages, enum side side);
enum side side_at_boot(u64 gpa);
void memory_unmap_low(void);

/* accept.c: what is accepted, by units of 2 MiB; only the boot vCPU asks */
void accept_init(void);
void accept_claim(u64 gpa, u64 npages); /* before pages are used */
void accept_everything(void);
/* Accept pages whatever the bits say; fresh: bytes of units that were not accepted before. */
enum acceptance accept_again(u64 gpa, u64 npages, struct accepted *done, u64 *fresh);
void accept_counts(u64 *accepted, u64 *unaccepted); /* bytes */

/* smp.c */
void cpu_loop(u32 cpu);			       /* a secondary vCPU, for ever */
bool_t work_step(u32 cpu);		       /* a slice of the vCPU's work; 0 if idle */
bool_t work_start(u32 cpu, enum mode mode);    /* cpus[cpu].work is filled in */
bool_t work_stop(u32 cpu);		       /* waits until it idles */
bool_t call_everywhere(void (*call)(u32, void *), void *arg); /* and wait for all */
bool_t any_mode(enum mode mode);

/* stamp.c, spin.c */
bool_t stamp_init(void);
bool_t stamp_window(u64 gpa);
bool_t stamp_covers(u64 gpa, u64 npages);
void stamp_forget(u64 gpa, u64 npages);
void stamp_slice(u32 cpu);
void spin_slice(u32 cpu);
volatile struct stamp_vcpu *stamp_stats(u32 cpu);
volatile struct stamp_header *stamp_head(void);
u64 next_random(u64 *state);
u32 next_generation(struct work *w);
u64 make_stamp(u64 gfn, u32 cpu, u32 epoch, u32 generation);

/* selftest.c */
bool_t selftest(u64 gpa, u64 npages); /* npages 0: all private memory behind the kernel */

#endif
