// SPDX-License-Identifier: GPL-2.0-or-later
/* GDT, TSS, IDT, and what happens on an exception (APM vol. 2, 4.7, 8.9, 12.2). */
#include "kernel.h"
#include "serial.h"

#define IST_DOUBLE_FAULT 1
#define FAULT_STACK 8192

struct tss {
	u32 reserved0;
	u64 rsp[3];
	u64 reserved1;
	u64 ist[7];
	u64 reserved2;
	u16 reserved3, iomap;
} __attribute__((packed));

static u64 gdt[3 + 2 * MAX_VCPUS] __attribute__((aligned(16)));
static struct tss tss[MAX_VCPUS] __attribute__((aligned(16)));
static struct gate idt[TRAP_VECTORS] __attribute__((aligned(16)));
static u8 fault_stacks[MAX_VCPUS][FAULT_STACK] __attribute__((aligned(16)));

void traps_init(void)
{
	gdt[1] = 0x00af9b000000ffffUL; /* 64-bit code, ring 0 */
	gdt[2] = 0x00cf93000000ffffUL; /* data */
	for (u32 i = 0; i < MAX_VCPUS; i++) {
		u64 base = (u64)&tss[i], limit = sizeof(struct tss) - 1;

		tss[i].ist[IST_DOUBLE_FAULT - 1] = (u64)fault_stacks[i] + FAULT_STACK;
		tss[i].iomap = sizeof(struct tss);
		gdt[3 + 2 * i] = limit | (base & 0xffffff) << 16 | 0x89UL << 40 |
				 (base >> 24 & 0xff) << 56;
		gdt[4 + 2 * i] = base >> 32;
	}
	for (u32 v = 0; v < TRAP_VECTORS; v++)
		gate_set(&idt[v], trap_entries[v], v == 8 ? IST_DOUBLE_FAULT : 0);
}

void traps_load(u32 cpu)
{
	struct table_register r = { sizeof(gdt) - 1, (u64)gdt };

	load_segments(&r, SEL_TSS + 16 * cpu);
	lidt(idt, sizeof(idt) - 1);
}

u64 gpa_of(const void *own)
{
	return (u64)own - KERNEL_VA + layout.kernel_gpa;
}

/* The task register names the vCPU: it is the one thing that differs without using memory. */
u32 this_cpu(void)
{
	u64 selector;

	asm("str %0" : "=r"(selector));
	return (u32)((selector & 0xffff) - SEL_TSS) / 16;
}

NORETURN void stop_machine(u32 status)
{
	platform->out(params.exit_port, 4, status);
	for (;;)
		platform->halt();
}

NORETURN void give_up(const char *what)
{
	if (platform->fatal)
		platform->fatal(what);
	stop_machine(EXIT_PANIC);
}

void trap(struct trap_frame *f)
{
	u32 cpu = this_cpu();
	struct guard *g = &cpus[cpu].guard;
	u64 address = read_cr2();

	if (platform->exception && platform->exception(f, &address))
		return;
	if (g->active) {
		g->vector = f->vector;
		g->error = f->error;
		g->rip = f->rip;
		g->cr2 = address;
		f->rip = (u64)guard_resume;
		f->rsp = g->rsp;
		return;
	}
	say("panic: vcpu %u: %s, error %x, rip %x, rsp %x, cr2 %x", (u64)cpu, trap_name(f->vector),
	    f->error, f->rip, f->rsp, address);
	if (cpu == 0)
		stop_machine(EXIT_PANIC);
	cpus[cpu].mode = MODE_DEAD;
	for (;;)
		platform->halt();
}
