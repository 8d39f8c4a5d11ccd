/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Commands that have rooms of their own, outside command.c. */
#ifndef COMMANDS_H
#define COMMANDS_H

#include "kernel.h"
#include "words.h"

/* The answer to an access that ended with an exception. */
void trapped(const struct words *w, u64 gpa, enum side side);

/* inspect.c */
void do_watch(struct words *w);
void do_jump(struct words *w);
void do_touch(struct words *w);
void do_port(struct words *w);
void do_cpuid(struct words *w);
void do_rdmsr(struct words *w);

/* evidence.c */
void do_tech(struct words *w);
void do_accept(struct words *w);
void do_report(struct words *w);

/* batch.c */
void do_batch(struct words *w);

/* bounce.c */
void do_bounce(struct words *w);
/* A shared page for a moment's use: its gpa, and 0; or a negative errno. */
long bounce_page(u64 *gpa);

#endif
