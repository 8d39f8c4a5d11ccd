// SPDX-License-Identifier: GPL-2.0-or-later
/* Where a vCPU enters the kernel, now in private memory. */
#include "kernel.h"
#include "serial.h"

struct cpu cpus[MAX_VCPUS];
struct boot_params params;
struct handoff layout;

static volatile u32 kernel_up, arrived, low_gone;

static void boot_vcpu(const struct boot_params *p, const struct handoff *h)
{
	params = *p;
	layout = *h;
	platform_choose(&params);
	traps_init();
	traps_load(0);
	if (platform->start)
		platform->start(0, 0);
	serial_init(params.console_port);
	accept_init();
	if (!stamp_init()) {
		say("panic: the stamp log at %x has no room (%x bytes)", params.log_gpa,
		    params.log_size);
		stop_machine(EXIT_PANIC);
	}
	kernel_up = 1;
	while (arrived + 1 < params.vcpus)
		pause();
	memory_unmap_low();
	low_gone = 1;
	say("kernel in private memory %x-%x, shared bit %u, %u vCPUs up", layout.kernel_gpa,
	    layout.free_gpa, (u64)params.shared_bit, (u64)arrived + 1);
	if (params.flags & BOOT_FLAG_EAGER)
		accept_everything();
	if (params.flags & BOOT_FLAG_SELFTEST)
		selftest(0, 0);
	console_run();
}

static void secondary_vcpu(u32 cpu)
{
	while (!kernel_up)
		pause();
	traps_load(cpu);
	if (platform->start)
		platform->start(cpu, 0);
	__atomic_fetch_add(&arrived, 1, __ATOMIC_SEQ_CST);
	while (!low_gone)
		pause();
	write_cr3(read_cr3()); /* drop what was cached of the identity map */
	cpu_loop(cpu);
}

void kernel_main(u64 index, const struct boot_params *p, const struct handoff *h)
{
	if (index == 0)
		boot_vcpu(p, h);
	else
		secondary_vcpu((u32)index);
}
