// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The boot stage. It runs where the VMM has put it: in shared memory, or, under a technology that
 * measures what a guest starts with, in private memory. It sees to it that RAM is private and
 * moves the kernel there.
 */
#include "arch.h"
#include "boot.h"
#include "platform.h"
#include "serial.h"

NORETURN void enter_kernel(u64 index, const struct boot_params *params, struct handoff *handoff,
			   u64 cr3, u64 entry);

static struct gate idt[TRAP_VECTORS] __attribute__((aligned(16)));
static struct handoff handoff;
static const struct boot_params *params;

extern u8 boot_stacks[]; /* boot.ld: a page for each vCPU */

/* Nothing but its stack tells vCPUs apart here. */
u32 this_cpu(void)
{
	u64 rsp;

	asm("movq %%rsp, %0" : "=r"(rsp));
	return (u32)((rsp - 1 - (u64)boot_stacks) >> PAGE_SHIFT);
}

u64 gpa_of(const void *own)
{
	return (u64)own;
}

NORETURN void boot_panic(const char *what, u64 value)
{
	if (!platform)
		for (;;)
			asm volatile("ud2"); /* whom to tell is not known: a triple fault it is */
	print("panic: boot stage: %s (%x)\n", what, value);
	if (platform->fatal)
		platform->fatal(what);
	platform->out(params->exit_port, 4, EXIT_PANIC);
	for (;;)
		platform->halt();
}

void trap(struct trap_frame *f)
{
	u64 address = read_cr2();

	if (platform->exception && platform->exception(f, &address))
		return;
	print("panic: boot stage: %s, error %x, rip %x, address %x\n", trap_name(f->vector),
	      f->error, f->rip, address);
	boot_panic("unexpected exception", f->vector);
}

static void check_params(void)
{
	if (params->magic != BOOT_MAGIC)
		boot_panic("no boot-parameter page, magic", params->magic);
	if (params->version != BOOT_VERSION || params->size != sizeof(*params))
		boot_panic("unknown boot-parameter version", params->version);
	if (params->vcpus < 1 || params->vcpus > BOOT_MAX_VCPUS)
		boot_panic("impossible number of vCPUs", params->vcpus);
	if (params->ram_count < 1 || params->ram_count > BOOT_MAX_RAM)
		boot_panic("impossible number of RAM ranges", params->ram_count);
	if (params->measured_count > BOOT_MAX_MEASURED)
		boot_panic("impossible number of measured ranges", params->measured_count);
}

static void boot_vcpu(void)
{
	for (u32 v = 0; v < TRAP_VECTORS; v++)
		gate_set(&idt[v], trap_entries[v], 0);
	lidt(idt, sizeof(idt) - 1);
	open_low_windows();
	if (platform->start)
		platform->start(0, 1);
	serial_init(params->console_port);
	check_params();
	if (platform->confidential)
		print("kvmsim guest kernel, boot stage in private memory (%s): %u vCPUs\n",
		      platform->name, (u64)params->vcpus);
	else
		print("kvmsim guest kernel, boot stage in shared memory: %u vCPUs\n",
		      (u64)params->vcpus);
	prepare_memory(params, &handoff);
	build_kernel(params, &handoff);
	fence();
	handoff.ready = 1;
	for (u32 cpu = 1; cpu < params->vcpus; cpu++)
		kick_vcpu(cpu);
}

void boot_main(u64 index, const struct boot_params *page)
{
	params = page;
	/* Every vCPU chooses, as any may be the first; all choose the same. */
	if (page->magic != BOOT_MAGIC || page->version != BOOT_VERSION || !platform_choose(page))
		boot_panic("no boot parameters that this kernel knows", page->version);
	if (index == 0)
		boot_vcpu();
	while (!handoff.ready)
		platform->halt(); /* until the kick; a kick that came first ends it at once */
	enter_kernel(index, page, &handoff, handoff.cr3, handoff.entry);
}
