/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What differs between the technologies that a guest may run under: one table of operations for
 * each, chosen by boot_params.technology. Both stages use it; each says which vCPU it is on and
 * where its own data lie.
 */
#ifndef PLATFORM_H
#define PLATFORM_H

#include "arch.h"
#include "bootparams.h"

enum acceptance {
	ACCEPT_FINE,
	ACCEPT_SIZE,	/* the page is mapped in another size: try 4 KiB */
	ACCEPT_ALREADY, /* nothing changed: it had been accepted before */
	ACCEPT_FAILED,
};

#define REPORT_ROOM 4096
#define REPORT_DATA 64

struct platform {
	const char *name;
	bool_t confidential;  /* starts in private memory that the host has measured */
	bool_t accepts;	      /* private pages are accepted before their first use */
	bool_t accept_zeroes; /* … and are zero then */
	/* Ready this vCPU, as far as the technology needs it; first: it is the machine's first. */
	void (*start)(u32 cpu, bool_t first);
	u32 (*in)(u16 port, u32 size);
	void (*out)(u16 port, u32 size, u32 value);
	/* A hypercall of KVM: what it answered. */
	long (*call)(u64 nr, u64 a0, u64 a1, u64 a2);
	void (*halt)(void);
	/* Tell the host what pages are to be. 0 or a negative errno. */
	long (*set_private)(u64 gpa, u64 npages);
	long (*set_shared)(u64 gpa, u64 npages);
	/* Accept one page of 4 KiB or 2 MiB; and give one of 4 KiB up again, before set_shared. */
	enum acceptance (*accept)(u64 gpa, bool_t large);
	enum acceptance (*release)(u64 gpa);
	/* Give pages back to the host, for good, as a balloon does: the next use finds others. */
	long (*relinquish)(u64 gpa, u64 npages);
	/* Evidence about this guest with 64 bytes of its choice: its length, or a negative errno.
	 * data: aligned to 64, out: to 4096, REPORT_ROOM bytes, both private. */
	long (*report)(const u8 *data, u8 *out);
	const char *report_name;
	/* An exception that only the technology has: 1 if the instruction has been emulated. Else
	 * error and address may say more of it. */
	bool_t (*exception)(struct trap_frame *f, u64 *address);
	/* Tell the host, through a channel that needs no device, that the guest has given up. */
	void (*fatal)(const char *text);
	/* What the guest can find out about where it runs, as name=value words. */
	void (*describe)(void (*put)(const char *name, u64 value));
};

extern const struct platform *platform;
extern u64 private_mask, shared_mask; /* what a page-table entry carries for either side */

extern const struct platform plain_platform, sw_platform, tdx_platform, snp_platform,
	pkvm_platform;

/* Choose by the boot parameters, which stay where they are. 0: there is no such technology. */
bool_t platform_choose(const struct boot_params *params);
const struct boot_params *platform_params(void);

/* The raw status of the last acceptance or conversion that failed, for a message. */
extern volatile u64 platform_status;

#define KVM_HC_KICK_CPU 5
#define KVM_HC_MAP_GPA_RANGE 12
#define KVM_MAP_GPA_RANGE_ENCRYPTED (1UL << 4)

#define INVALID_ARGUMENT (-22L) /* -EINVAL */
#define NO_SUCH_CALL (-38L) /* -ENOSYS */
#define IO_ERROR (-5L) /* -EIO */

/* KVM's own call (Documentation/virt/kvm/x86/hypercalls.rst). */
long plain_call(u64 nr, u64 a0, u64 a1, u64 a2);
u32 plain_in(u16 port, u32 size);
void plain_out(u16 port, u32 size, u32 value);

/* End the HLT of a vCPU, or make its next HLT return at once. */
static inline long kick_vcpu(u32 vcpu)
{
	return platform->call(KVM_HC_KICK_CPU, 0, vcpu, 0);
}

/* Both stages map both sides so. */
static inline void *private_at(u64 gpa)
{
	return (void *)(PRIVATE_VA + gpa);
}

static inline void *shared_at(u64 gpa)
{
	return (void *)(SHARED_VA + gpa);
}

/* Given by each stage. */
u32 this_cpu(void);
u64 gpa_of(const void *own); /* of the stage's own data */

/* Accept pages, large where they can be, and see that they are zero; pages that were loaded
 * before the guest ran are left alone. */
struct accepted {
	u64 large, small; /* pages of 2 MiB and of 4 KiB accepted */
	u64 failed;	  /* the gpa at which it ended */
};
enum acceptance accept_range(u64 gpa, u64 npages, struct accepted *done);

#endif
