// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * AMD SEV-SNP, the guest's side: PVALIDATE (APM vol. 3), the GHCB and its MSR protocol (AMD
 * publication 56421) and the VMM communication exception (APM vol. 2, 15.35).
 */
#include "ghcb.h"
#include "instruction.h"
#include "platform.h"
#include "snp.h"
#include "string.h"

#define FAIL_SIZEMISMATCH 6
#define IO_IN 1UL /* EXITINFO1 of IOIO (APM vol. 2, 15.10.2) */

static bool_t spoken; /* a GHCB is in use: before, only the MSR can speak */

/* --- pages ----------------------------------------------------------------------------------- */

/* PVALIDATE names the page by a linear address of its private mapping. */
static enum acceptance pvalidate(u64 gpa, bool_t large, bool_t valid)
{
	u64 status = (u64)private_at(gpa);
	bool_t unchanged;

	asm volatile(".byte 0xf2, 0x0f, 0x01, 0xff"
		     : "+a"(status), "=@ccc"(unchanged)
		     : "c"((u64)large), "d"((u64)valid)
		     : "memory");
	platform_status = status;
	if (status == FAIL_SIZEMISMATCH)
		return ACCEPT_SIZE;
	if (status)
		return ACCEPT_FAILED;
	return unchanged ? ACCEPT_ALREADY : ACCEPT_FINE;
}

static enum acceptance snp_accept(u64 gpa, bool_t large)
{
	return pvalidate(gpa, large, 1);
}

static enum acceptance snp_release(u64 gpa)
{
	return pvalidate(gpa, 0, 0);
}

static long msr_change(u64 gpa, u64 npages, u64 operation)
{
	for (u64 i = 0; i < npages; i++) {
		u64 page = gpa + (i << PAGE_SHIFT);
		u64 answer = ghcb_msr(GHCB_MSR_PSC | page | operation << 52);

		if ((answer & GHCB_MSR_INFO) != GHCB_MSR_PSC_DONE || answer >> 32)
			return IO_ERROR;
	}
	return 0;
}

struct psc {
	u16 current, last;
	u32 reserved;
	u64 entry[PSC_ENTRIES];
};

/* One list; the host may stop in the middle and is asked again as long as it makes progress. */
static long list_change(volatile struct psc *list)
{
	u32 before;

	ghcb_begin();
	ghcb_put(GHCB_SCRATCH, ghcb_gpa() + GHCB_BUFFER);
	while (list->current <= list->last) {
		before = list->current * 4096U + (u32)(list->entry[list->current] & 0xfff);
		if (ghcb_exit(NAE_PSC, 0, 0))
			return INVALID_ARGUMENT;
		platform_status = ghcb_get(GHCB_EXIT_INFO_2);
		if (platform_status)
			return INVALID_ARGUMENT;
		if (list->current > PSC_ENTRIES)
			return IO_ERROR;
		if (list->current <= list->last &&
		    list->current * 4096U + (u32)(list->entry[list->current] & 0xfff) <= before)
			return IO_ERROR;
	}
	return 0;
}

/* Page state changes by lists, 2 MiB an entry where that is possible. */
static long change(u64 gpa, u64 npages, u64 operation)
{
	volatile struct psc *list = (void *)(ghcb() + GHCB_BUFFER);
	u64 end = gpa + (npages << PAGE_SHIFT);
	long ret = 0;

	if (gpa & (PAGE_SIZE - 1) || !npages || npages > 1UL << (39 - PAGE_SHIFT) ||
	    end > 1UL << 39)
		return INVALID_ARGUMENT;
	if (!spoken)
		return msr_change(gpa, npages, operation);
	while (!ret && gpa < end) {
		u32 n = 0;

		for (; n < PSC_ENTRIES && gpa < end; n++) {
			bool_t large = !(gpa & (LARGE_SIZE - 1)) && end - gpa >= LARGE_SIZE;

			list->entry[n] = gpa | operation << 52 | (u64)large << 56;
			gpa += large ? LARGE_SIZE : PAGE_SIZE;
		}
		list->current = 0;
		list->last = (u16)(n - 1);
		list->reserved = 0;
		ret = list_change(list);
	}
	return ret;
}

static long snp_private(u64 gpa, u64 npages)
{
	return change(gpa, npages, PSC_PRIVATE);
}

static long snp_shared(u64 gpa, u64 npages)
{
	return change(gpa, npages, PSC_SHARED);
}

/* The GHCBs were never validated, so nothing has to be given up before they are shared. */
static void snp_start(u32 cpu, bool_t first)
{
	u64 gpa = platform_params()->ghcb_gpa + cpu * PAGE_SIZE;
	u64 answer;

	if (first) {
		if (snp_shared(platform_params()->ghcb_gpa, SNP_GHCB_PAGES))
			ghcb_terminate(TERMINATE_PROTOCOL);
		zero_words(shared_at(platform_params()->ghcb_gpa), SNP_GHCB_PAGES * PAGE_SIZE / 8);
	}
	answer = ghcb_msr(GHCB_MSR_REGISTER | gpa);
	if (answer != (GHCB_MSR_REGISTERED | gpa))
		ghcb_terminate(TERMINATE_PROTOCOL);
	wrmsr(MSR_GHCB, gpa);
	spoken = 1;
}

/* --- what the host emulates ------------------------------------------------------------------ */

static u32 snp_in(u16 port, u32 size)
{
	if (!spoken)
		ghcb_terminate(TERMINATE_GENERAL);
	ghcb_begin();
	ghcb_put(GHCB_RAX, 0);
	if (ghcb_exit(SVM_EXIT_IOIO, (u64)port << 16 | (u64)size << 4 | IO_IN, 0))
		return ~0U;
	return (u32)ghcb_get(GHCB_RAX);
}

static void snp_out(u16 port, u32 size, u32 value)
{
	if (!spoken)
		ghcb_terminate(TERMINATE_GENERAL);
	ghcb_begin();
	ghcb_put(GHCB_RAX, value);
	ghcb_exit(SVM_EXIT_IOIO, (u64)port << 16 | (u64)size << 4, 0);
}

static long snp_call(u64 nr, u64 a0, u64 a1, u64 a2)
{
	ghcb_begin();
	ghcb_put(GHCB_RAX, nr);
	ghcb_put(GHCB_CPL, 0);
	ghcb_put(GHCB_RBX, a0);
	ghcb_put(GHCB_RCX, a1);
	ghcb_put(GHCB_RDX, a2);
	ghcb_put(GHCB_RSI, 0);
	if (ghcb_exit(SVM_EXIT_VMMCALL, 0, 0))
		return NO_SUCH_CALL;
	return (long)ghcb_get(GHCB_RAX);
}

/* The firmware has checked its CPUID page; without one the host is asked and believed. */
static bool_t from_page(u32 leaf, u32 subleaf, u32 out[4])
{
	const struct snp_cpuid *table = private_at(platform_params()->cpuid_gpa);

	if (!platform_params()->cpuid_gpa || !table->count || table->count > SNP_CPUID_ENTRIES)
		return 0;
	memset(out, 0, 16);
	for (u32 i = 0; i < table->count; i++)
		if (table->entry[i].leaf == leaf && table->entry[i].subleaf == subleaf)
			memcpy(out, table->entry[i].out, 16);
	return 1;
}

static u32 do_cpuid(struct trap_frame *f)
{
	u32 out[4];

	if (!from_page((u32)f->rax, (u32)f->rcx, out)) {
		ghcb_begin();
		ghcb_put(GHCB_RAX, (u32)f->rax);
		ghcb_put(GHCB_RCX, (u32)f->rcx);
		ghcb_put(GHCB_XCR0, 1);
		if (ghcb_exit(SVM_EXIT_CPUID, 0, 0))
			return 0;
		out[0] = (u32)ghcb_get(GHCB_RAX);
		out[1] = (u32)ghcb_get(GHCB_RBX);
		out[2] = (u32)ghcb_get(GHCB_RCX);
		out[3] = (u32)ghcb_get(GHCB_RDX);
	}
	f->rax = out[0];
	f->rbx = out[1];
	f->rcx = out[2];
	f->rdx = out[3];
	return 2;
}

static u32 do_msr(struct trap_frame *f)
{
	bool_t write = ((const u8 *)f->rip)[1] == 0x30;

	ghcb_begin();
	ghcb_put(GHCB_RCX, (u32)f->rcx);
	if (write) {
		ghcb_put(GHCB_RAX, (u32)f->rax);
		ghcb_put(GHCB_RDX, (u32)f->rdx);
	}
	if (ghcb_exit(SVM_EXIT_MSR, write, 0))
		return 0;
	if (!write) {
		f->rax = (u32)ghcb_get(GHCB_RAX);
		f->rdx = (u32)ghcb_get(GHCB_RDX);
	}
	return 2;
}

static u32 do_io(struct trap_frame *f)
{
	struct instruction i = decode_port(f);

	if (!i.length)
		return 0;
	if (i.write)
		snp_out(i.port, i.size, (u32)i.value);
	else
		finish_load(f, &i, snp_in(i.port, i.size));
	return i.length;
}

static u32 do_mmio(struct trap_frame *f)
{
	struct instruction i = decode_mov(f);
	u64 buffer = ghcb_gpa() + GHCB_BUFFER;
	u64 gpa = i.address - SHARED_VA;

	/* Only the shared map can reach a device. */
	if (!i.length || i.address < SHARED_VA || gpa >= 1UL << 39)
		return 0;
	ghcb_begin();
	ghcb_put(GHCB_SCRATCH, buffer);
	if (i.write)
		*(volatile u64 *)(ghcb() + GHCB_BUFFER) = i.value;
	if (ghcb_exit(i.write ? NAE_MMIO_WRITE : NAE_MMIO_READ, gpa, i.size))
		return 0;
	if (!i.write)
		finish_load(f, &i, *(volatile u64 *)(ghcb() + GHCB_BUFFER));
	return i.length;
}

static u32 do_call(struct trap_frame *f)
{
	f->rax = (u64)snp_call(f->rax, f->rbx, f->rcx, f->rdx);
	return 3;
}

/* #VC: the error code is the exit code of what could not be done without the host. */
static bool_t snp_exception(struct trap_frame *f, u64 *address)
{
	u32 used = 0;

	(void)address;
	if (f->vector != TRAP_VC || !spoken)
		return 0;
	switch (f->error) {
	case SVM_EXIT_IOIO:
		used = do_io(f);
		break;
	case SVM_EXIT_CPUID:
		used = do_cpuid(f);
		break;
	case SVM_EXIT_MSR:
		used = do_msr(f);
		break;
	case SVM_EXIT_VMMCALL:
		used = do_call(f);
		break;
	case SVM_EXIT_NPF:
		used = do_mmio(f);
		break;
	}
	f->rip += used;
	return used != 0;
}

static void snp_fatal(const char *text)
{
	(void)text; /* the protocol has room for a number only */
	ghcb_terminate(TERMINATE_GENERAL);
}

static void snp_describe(void (*tell)(const char *name, u64 value))
{
	u32 out[4];

	cpuid(0x8000001f, 0, out);
	tell("features", out[0]);
	tell("c_bit", out[1] & 0x3f);
	tell("sev_status", rdmsr(MSR_SEV_STATUS));
	ghcb_begin();
	if (!ghcb_exit(NAE_HV_FEATURES, 0, 0))
		tell("hv_features", ghcb_get(GHCB_EXIT_INFO_2));
}

/* The request lies in the two shared pages behind the GHCBs (SNP firmware ABI, chapter 8). */
long snp_guest_request(const u8 *request, u8 *response)
{
	u64 pages = platform_params()->ghcb_gpa + BOOT_MAX_VCPUS * PAGE_SIZE;

	copy_words(shared_at(pages), request, PAGE_SIZE / 8);
	ghcb_begin();
	if (ghcb_exit(NAE_GUEST_REQUEST, pages, pages + PAGE_SIZE))
		return IO_ERROR;
	platform_status = ghcb_get(GHCB_EXIT_INFO_2);
	if (platform_status)
		return IO_ERROR;
	copy_words(response, shared_at(pages + PAGE_SIZE), PAGE_SIZE / 8);
	return 0;
}

const struct platform snp_platform = {
	.name = "snp",
	.confidential = 1,
	.accepts = 1,
	.start = snp_start,
	.in = snp_in,
	.out = snp_out,
	.call = snp_call,
	.halt = halt_once,
	.set_private = snp_private,
	.set_shared = snp_shared,
	.accept = snp_accept,
	.release = snp_release,
	.report = snp_report,
	.report_name = "snp-report",
	.exception = snp_exception,
	.fatal = snp_fatal,
	.describe = snp_describe,
};
