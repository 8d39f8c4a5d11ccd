// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The boot stage. It runs in shared memory, as everything does when a confidential guest
 * starts, makes the rest of RAM private and moves the kernel there.
 */
#include "arch.h"
#include "boot.h"
#include "hypercall.h"
#include "serial.h"
#include "string.h"

#define CONVERT_CHUNK (LARGE_SIZE / PAGE_SIZE) /* pages per hypercall */
#define PROGRESS_STEPS 4

NORETURN void enter_kernel(u64 index, const struct boot_params *params, struct handoff *handoff,
			   u64 cr3, u64 entry);

static struct gate idt[TRAP_VECTORS] __attribute__((aligned(16)));
static struct handoff handoff;
static const struct boot_params *params;

NORETURN void boot_panic(const char *what, u64 value)
{
	print("panic: boot stage: %s (%x)\n", what, value);
	if (params)
		out32(params->exit_port, EXIT_PANIC);
	for (;;)
		halt_once();
}

void trap(struct trap_frame *f)
{
	print("panic: boot stage: %s, error %x, rip %x, cr2 %x\n", trap_name(f->vector), f->error,
	      f->rip, read_cr2());
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
}

/* The part of a RAM range that becomes private: [start, end), empty if none. */
static void private_part(const struct ram_range *ram, u64 *start, u64 *end)
{
	*start = ram->gpa < params->low_size ? params->low_size : ram->gpa;
	*end = ram->gpa + ram->size;
	if (!(ram->flags & RAM_PRIVATE_CAPABLE) || *end < *start)
		*end = *start;
}

static void convert_range(u64 start, u64 end)
{
	u64 pages = (end - start) >> PAGE_SHIFT, done = 0, next_report = 0;

	while (done < pages) {
		u64 n = pages - done < CONVERT_CHUNK ? pages - done : CONVERT_CHUNK;
		long ret = map_gpa_range(params->hypercall, start + (done << PAGE_SHIFT), n, 1);

		if (ret) {
			print("panic: boot stage: KVM_HC_MAP_GPA_RANGE(%x, %u pages, private) "
			      "answered %d\n",
			      start + (done << PAGE_SHIFT), n, ret);
			boot_panic("conversion refused, errno", (u64)-ret);
		}
		done += n;
		if (done * PROGRESS_STEPS >= pages * next_report || done == pages) {
			print("private %x-%x: %u%%\n", start, end, done * 100 / pages);
			next_report = done * PROGRESS_STEPS / pages + 1;
		}
	}
}

static void convert_memory(void)
{
	u64 start, end, total = 0, home = 0;

	for (u32 i = 0; i < params->ram_count; i++) {
		private_part(&params->ram[i], &start, &end);
		if (start == end)
			continue;
		convert_range(start, end);
		if (!home && end - start >= KERNEL_ROOM)
			home = start;
		total += end - start;
	}
	if (!home)
		boot_panic("no private-capable RAM range with room for the kernel", KERNEL_ROOM);
	handoff.kernel_gpa = home;
	print("private: %u KiB in all; kernel goes to %x\n", total >> 10, home);
}

void boot_main(u64 index, const struct boot_params *page)
{
	if (index == 0) {
		params = page;
		serial_init(params->console_port);
		for (u32 v = 0; v < TRAP_VECTORS; v++)
			gate_set(&idt[v], trap_entries[v], 0);
		lidt(idt, sizeof(idt) - 1);
		check_params();
		print("kvmsim guest kernel, boot stage in shared memory: %u vCPUs\n",
		      (u64)params->vcpus);
		convert_memory();
		build_kernel(params, &handoff);
		fence();
		handoff.ready = 1;
		for (u32 cpu = 1; cpu < params->vcpus; cpu++)
			kick_vcpu(params->hypercall, cpu);
	}
	while (!handoff.ready)
		halt_once(); /* until the kick; a kick that came first ends it at once */
	enter_kernel(index, page, &handoff, handoff.cr3, handoff.entry);
}
