/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The few instructions whose effects a #VE or #VC handler brings about: IN, OUT and MOV to or
 * from memory (AMD APM vol. 3, chapter 3 and appendix A).
 */
#ifndef INSTRUCTION_H
#define INSTRUCTION_H

#include "arch.h"

struct instruction {
	u32 length; /* bytes; 0: none of those known here */
	u32 size;   /* of the access, in bytes */
	bool_t write;
	u64 address;	   /* linear, of a memory access */
	u64 value;	   /* what a store writes */
	u32 destination;   /* number of the register that a load fills … */
	u32 width;	   /* … as one of so many bytes */
	bool_t high_byte;  /* AH, CH, DH, BH */
	bool_t sign;	   /* MOVSX */
	u16 port;
};

/* The port access at f->rip; length 0 if there is none. */
struct instruction decode_port(const struct trap_frame *f);
/* The memory access at f->rip. */
struct instruction decode_mov(struct trap_frame *f);
/* Put what was read into the register that the instruction names. */
void finish_load(struct trap_frame *f, const struct instruction *i, u64 value);

#endif
