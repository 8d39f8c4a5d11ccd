/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The stamp log: a shared area through which a host program watches the guest's private pages.
 * docs/guest.md has the protocol; kvmsim/vmm/stamplog.py the same layout (compared by a test).
 *
 *	offset 0        struct stamp_header
 *	STAMP_VCPUS     struct stamp_vcpu [BOOT_MAX_VCPUS], written by the guest
 *	STAMP_EPOCHS    struct stamp_epoch[STAMP_WINDOW], written by the host
 *	STAMP_RINGS     struct stamp_record[BOOT_MAX_VCPUS][STAMP_RING], written by the guest
 */
#ifndef STAMPLOG_H
#define STAMPLOG_H

#include "types.h"

#define STAMP_MAGIC 0x474f4c504d415453UL /* "STAMPLOG" in memory order */
#define STAMP_WINDOW 16384	       /* pages that have an epoch entry */
#define STAMP_RING 256		       /* records per vCPU */
#define STAMP_VCPUS 0x1000UL
#define STAMP_EPOCHS 0x10000UL
#define STAMP_RINGS 0x40000UL
#define STAMP_LOG_SIZE 0x80000UL

/* A stamp: what the guest writes into the first word of a page. Never 0 (generation > 0). */
#define STAMP_GFN_SHIFT 0 /* low 20 bits of the gfn */
#define STAMP_VCPU_SHIFT 20
#define STAMP_EPOCH_SHIFT 24 /* low 20 bits of the begin epoch */
#define STAMP_GEN_SHIFT 44
#define STAMP_FIELD_MASK 0xfffffUL
#define STAMP_VCPU_MASK 0xfUL

/* stamp_record.verdict */
#define VERDICT_FRESH 0	   /* nothing known of the page yet: not judged */
#define VERDICT_SAME 1	   /* the value that was written last */
#define VERDICT_PUNCHED 2  /* 0, and a punch can explain it */
#define VERDICT_STALE 3	   /* the last value, but a later punch had already returned */
#define VERDICT_LOST 4	   /* 0, and no punch can explain it */
#define VERDICT_MISMATCH 5 /* any other value: an older one, another page's, poison */

/* stamp_record.flags: what was known of the page before the read */
#define STAMP_KNOWN 0x1	 /* expect is meaningful */
#define STAMP_WINDOWED 0x2 /* the last write fell between begin and return of a punch */

struct stamp_header {
	u64 magic;
	u32 vcpus;
	u32 ring;
	u64 window_gfn; /* the gfn of epoch entry 0 */
	u64 window_pages;
};

struct stamp_epoch {
	u32 begin; /* the host adds 1 before it calls punch */
	u32 done;  /* the host stores begin after punch has returned success */
};

struct stamp_record {
	u64 seq; /* 1, 2, 3 …; 0 while the record is being written */
	u64 value;
	u64 expect;
	u32 page;   /* index in the window */
	u32 begin;  /* begin epoch, loaded after the value */
	u32 done;   /* done epoch, loaded before the value */
	u32 expect_epoch;
	u32 flags;
	u32 verdict;
	u32 generation;
	u32 vcpu;
	u64 reserved;
};

struct stamp_vcpu {
	u64 loops;
	u64 reads;
	u64 writes;
	u64 zeros;    /* reads that returned 0 */
	u64 punched;  /* zeros that a punch explains */
	u64 decisive; /* … of a punch that had returned before the read: a stale page would show */
	u64 windowed; /* writes between begin and return of a punch */
	u64 skipped;  /* pages left unwritten because a punch was running */
	u64 busy;     /* pages whose lock another vCPU held */
	u64 stale;
	u64 lost;
	u64 mismatches;
	u64 head; /* seq of the newest record */
	u64 reserved[3];
	struct stamp_record first_bad; /* seq 0: none so far */
};

#endif
