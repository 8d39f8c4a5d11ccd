/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The bounce-buffer device: a ring of descriptors in a shared page, as virtio has it, and a
 * doorbell. The device reads and writes shared pages only. kvmsim/vmm/bounce.py has the same
 * layout (compared by a test).
 *
 * Port + 0, written (4 bytes): the gfn of the ring; the device does what is available.
 * Port + 4, read (4 bytes): what became of the ring at the last doorbell.
 */
#ifndef BOUNCE_H
#define BOUNCE_H

#include "types.h"

#define BOUNCE_MAGIC 0x45434e42 /* "BNCE" in memory order */
#define BOUNCE_ENTRIES 64
#define BOUNCE_DESCRIPTORS 64 /* offset of the first descriptor */
#define BOUNCE_SECTOR 512
#define BOUNCE_DOORBELL 0
#define BOUNCE_RESULT 4

#define BOUNCE_READ 0  /* disk to memory */
#define BOUNCE_WRITE 1 /* memory to disk */

/* The device's answers: the ring's, and each descriptor's status. */
#define BOUNCE_OK 0
#define BOUNCE_IOERR 1
#define BOUNCE_UNSUPPORTED 2
#define BOUNCE_BAD_RING 3
#define BOUNCE_BAD_ADDRESS 4
#define BOUNCE_BAD_LENGTH 5
#define BOUNCE_BAD_SECTOR 6
#define BOUNCE_PENDING 0xffff /* the guest's: not done yet */

struct bounce_ring {
	u32 magic;
	u16 entries;
	u16 available; /* descriptors offered, modulo 2^16; the guest's */
	u16 used;      /* descriptors done; the device's */
	u16 reserved;
};

struct bounce_descriptor {
	u64 gpa;
	u64 sector;
	u32 length; /* bytes, whole sectors */
	u16 operation;
	u16 status;
	u64 reserved;
};

#endif
