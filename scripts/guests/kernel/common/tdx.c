// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Intel TDX, the guest's side: TDCALL and its leaves (TDX module ABI, "TDG" leaves), TDVMCALL
 * (Guest-Hypervisor Communication Interface 1.5, chapter 3) and the virtualization exception.
 */
#include "instruction.h"
#include "platform.h"
#include "string.h"

struct tdcall {
	u64 rax, rbx, rcx, rdx, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15;
};

void tdcall(struct tdcall *regs); /* tdcall.S */

#define TDG_VP_VMCALL 0
#define TDG_VP_INFO 1
#define TDG_VP_VEINFO_GET 3
#define TDG_MR_REPORT 4
#define TDG_MEM_PAGE_ACCEPT 6

/* The upper half of a status says what happened, the lower about which operand. */
#define STATUS_CODE(status) ((status) & 0xffffffff00000000UL)
#define TDX_INTERRUPTED_RESTARTABLE 0x8000000400000000UL
#define TDX_OPERAND_BUSY 0x8000020000000000UL
#define TDX_PAGE_ALREADY_ACCEPTED 0x00000b0a00000000UL
#define TDX_PAGE_SIZE_MISMATCH 0xc0000b0b00000000UL

#define VMCALL_R10_R15 0xfc00 /* RCX of TDG.VP.VMCALL: the registers that are passed */
#define VMCALL_MESSAGE 0xffcc /* … and RBX, RDI, RSI, R8, R9, RDX */
#define VMCALL_CPUID 10
#define VMCALL_HLT 12
#define VMCALL_IO 30
#define VMCALL_RDMSR 31
#define VMCALL_WRMSR 32
#define VMCALL_MMIO 48
#define VMCALL_MAP_GPA 0x10001
#define VMCALL_REPORT_FATAL_ERROR 0x10003

#define VMCALL_SUCCESS 0
#define VMCALL_RETRY 1
#define VMCALL_INVALID_OPERAND 0x8000000000000000UL
#define VMCALL_ALIGN_ERROR 0x8000000000000002UL

/* Exit reasons in VE information (SDM vol. 3, appendix C). */
#define EXIT_CPUID 10
#define EXIT_HLT 12
#define EXIT_IO 30
#define EXIT_RDMSR 31
#define EXIT_WRMSR 32
#define EXIT_EPT_VIOLATION 48

/* TDG.VP.VMCALL. A failing TDCALL itself means that nothing can be trusted any more. */
static void vmcall(struct tdcall *r)
{
	r->rax = TDG_VP_VMCALL;
	if (!r->rcx)
		r->rcx = VMCALL_R10_R15;
	tdcall(r);
	if (r->rax)
		for (;;)
			asm volatile("ud2");
}

static u32 tdx_in(u16 port, u32 size)
{
	struct tdcall r = { .r11 = VMCALL_IO, .r12 = size, .r13 = 0, .r14 = port };

	vmcall(&r);
	return r.r10 ? ~0U : (u32)r.r11;
}

static void tdx_out(u16 port, u32 size, u32 value)
{
	struct tdcall r = { .r11 = VMCALL_IO, .r12 = size, .r13 = 1, .r14 = port, .r15 = value };

	vmcall(&r);
}

/* KVM's hypercalls: a number other than 0 in R10 (tdx_emulate_vmcall() of arch/x86/kvm/vmx). */
static long tdx_call(u64 nr, u64 a0, u64 a1, u64 a2)
{
	struct tdcall r = { .r10 = nr, .r11 = a0, .r12 = a1, .r13 = a2 };

	vmcall(&r);
	return (long)r.r10;
}

static void tdx_halt(void)
{
	struct tdcall r = { .r11 = VMCALL_HLT, .r12 = 1 };

	vmcall(&r);
}

static long map_gpa(u64 gpa, u64 size, u64 side)
{
	if (!size)
		return INVALID_ARGUMENT;
	for (;;) {
		struct tdcall r = { .r11 = VMCALL_MAP_GPA, .r12 = gpa | side, .r13 = size };
		u64 next;

		vmcall(&r);
		if (r.r10 == VMCALL_SUCCESS)
			return 0;
		platform_status = r.r10;
		if (r.r10 == VMCALL_INVALID_OPERAND || r.r10 == VMCALL_ALIGN_ERROR)
			return INVALID_ARGUMENT;
		next = r.r11 & ~shared_mask;
		/* A host that makes no progress, or goes elsewhere, is not followed. */
		if (r.r10 != VMCALL_RETRY || next <= gpa || next >= gpa + size)
			return IO_ERROR;
		size -= next - gpa;
		gpa = next;
	}
}

static long tdx_private(u64 gpa, u64 npages)
{
	return map_gpa(gpa, npages << PAGE_SHIFT, 0);
}

static long tdx_shared(u64 gpa, u64 npages)
{
	return map_gpa(gpa, npages << PAGE_SHIFT, shared_mask);
}

static enum acceptance tdx_accept(u64 gpa, bool_t large)
{
	struct tdcall r;

	/* A page of 2 MiB may take several calls: the module counts what it has done of it. */
	do {
		r = (struct tdcall){ .rax = TDG_MEM_PAGE_ACCEPT, .rcx = gpa | (large ? 1 : 0) };
		tdcall(&r);
	} while (STATUS_CODE(r.rax) == TDX_INTERRUPTED_RESTARTABLE ||
		 STATUS_CODE(r.rax) == TDX_OPERAND_BUSY);
	if (!r.rax)
		return ACCEPT_FINE;
	platform_status = r.rax;
	switch (STATUS_CODE(r.rax)) {
	case TDX_PAGE_ALREADY_ACCEPTED:
		return ACCEPT_ALREADY;
	case TDX_PAGE_SIZE_MISMATCH:
		return ACCEPT_SIZE;
	default:
		return ACCEPT_FAILED;
	}
}

#define TDREPORT_SIZE 1024

static long tdx_report(const u8 *data, u8 *out)
{
	struct tdcall r = { .rax = TDG_MR_REPORT, .rcx = gpa_of(out), .rdx = gpa_of(data) };

	tdcall(&r);
	platform_status = r.rax;
	return r.rax ? IO_ERROR : TDREPORT_SIZE;
}

/* A device access through the shared side; private memory without a page is never one. */
static u32 do_mmio(struct trap_frame *f, u64 gpa)
{
	struct tdcall r = { .r11 = VMCALL_MMIO, .r14 = gpa & ~shared_mask };
	struct instruction i;

	/* First, since the page that is missing may be the one with the instruction. */
	if (!(gpa & shared_mask))
		return 0;
	i = decode_mov(f);
	if (!i.length)
		return 0;
	r.r12 = i.size;
	r.r13 = i.write;
	r.r15 = i.write ? i.value : 0;
	vmcall(&r);
	if (r.r10)
		return 0;
	if (!i.write)
		finish_load(f, &i, r.r11);
	return i.length;
}

static u32 do_io(struct trap_frame *f, u64 qualification, u32 length, bool_t told)
{
	u32 size = (u32)(qualification & 7) + 1;
	u16 port = (u16)(qualification >> 16);
	struct instruction i = { .size = size, .width = size };

	if (!told)
		length = decode_port(f).length;
	if (qualification & 1 << 4)
		return 0; /* INS, OUTS: nobody here uses them */
	if (qualification & 1 << 3)
		finish_load(f, &i, tdx_in(port, size));
	else
		tdx_out(port, size, (u32)f->rax);
	return length;
}

static u32 do_cpuid(struct trap_frame *f, u32 length)
{
	struct tdcall r = { .r11 = VMCALL_CPUID, .r12 = (u32)f->rax, .r13 = (u32)f->rcx };

	vmcall(&r);
	if (r.r10)
		return 0;
	f->rax = (u32)r.r12;
	f->rbx = (u32)r.r13;
	f->rcx = (u32)r.r14;
	f->rdx = (u32)r.r15;
	return length;
}

static u32 do_msr(struct trap_frame *f, bool_t write, u32 length)
{
	struct tdcall r = { .r11 = write ? VMCALL_WRMSR : VMCALL_RDMSR, .r12 = (u32)f->rcx,
			    .r13 = f->rdx << 32 | (u32)f->rax };

	vmcall(&r);
	if (r.r10)
		return 0;
	if (!write) {
		f->rax = (u32)r.r11;
		f->rdx = r.r11 >> 32;
	}
	return length;
}

/* #VE: until the information is fetched another #VE would be a double fault. */
static bool_t tdx_exception(struct trap_frame *f, u64 *address)
{
	struct tdcall info = { .rax = TDG_VP_VEINFO_GET };
	u32 length, used;

	if (f->vector != TRAP_VE)
		return 0;
	tdcall(&info);
	if (info.rax)
		return 0;
	length = (u32)info.r10;
	if (!length) /* not told: these four have one length, and a port access is read below */
		length = (u32)info.rcx == EXIT_HLT ? 1 : 2;
	f->error = (u32)info.rcx;
	*address = info.r8;
	switch ((u32)info.rcx) {
	case EXIT_IO:
		used = do_io(f, info.rdx, length, (u32)info.r10 != 0);
		break;
	case EXIT_CPUID:
		used = do_cpuid(f, length);
		break;
	case EXIT_RDMSR:
	case EXIT_WRMSR:
		used = do_msr(f, (u32)info.rcx == EXIT_WRMSR, length);
		break;
	case EXIT_HLT:
		tdx_halt();
		used = length;
		break;
	case EXIT_EPT_VIOLATION:
		used = do_mmio(f, info.r9);
		break;
	default:
		used = 0;
	}
	f->rip += used;
	return used != 0;
}

static void tdx_fatal(const char *text)
{
	u64 words[8] = { 0 };
	u8 *bytes = (u8 *)words;
	struct tdcall r = { .r11 = VMCALL_REPORT_FATAL_ERROR, .rcx = VMCALL_MESSAGE };

	for (u32 i = 0; i < sizeof(words) && text[i]; i++)
		bytes[i] = (u8)text[i];
	r.r14 = words[0];
	r.r15 = words[1];
	r.rbx = words[2];
	r.rdi = words[3];
	r.rsi = words[4];
	r.r8 = words[5];
	r.r9 = words[6];
	r.rdx = words[7];
	vmcall(&r);
}

static void tdx_describe(void (*put)(const char *name, u64 value))
{
	struct tdcall r = { .rax = TDG_VP_INFO };

	tdcall(&r);
	put("status", r.rax);
	put("gpaw", r.rcx & 0x3f);
	put("attributes", r.rdx);
	put("td_vcpus", (u32)r.r8);
	put("td_max_vcpus", r.r8 >> 32);
	put("vcpu_index", (u32)r.r9);
}

const struct platform tdx_platform = {
	.name = "tdx",
	.confidential = 1,
	.accepts = 1,
	.accept_zeroes = 1,
	.in = tdx_in,
	.out = tdx_out,
	.call = tdx_call,
	.halt = tdx_halt,
	.set_private = tdx_private,
	.set_shared = tdx_shared,
	.accept = tdx_accept,
	.report = tdx_report,
	.report_name = "tdreport",
	.exception = tdx_exception,
	.fatal = tdx_fatal,
	.describe = tdx_describe,
};
