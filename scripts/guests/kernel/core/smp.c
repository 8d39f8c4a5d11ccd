// SPDX-License-Identifier: GPL-2.0-or-later
/* Work for vCPUs: the boot vCPU posts it in a mailbox and ends the other's HLT with a kick. */
#include "kernel.h"

#define PATIENCE (1UL << 30) /* polls before a vCPU counts as lost */

bool_t work_step(u32 cpu)
{
	struct cpu *c = &cpus[cpu];

	if (c->mode == MODE_CALL) {
		c->work.call(cpu, c->work.arg);
		c->want = MODE_IDLE;
	}
	c->mode = c->want;
	switch (c->mode) {
	case MODE_SPIN:
		spin_slice(cpu);
		return 1;
	case MODE_STAMP:
		stamp_slice(cpu);
		return 1;
	case MODE_CALL:
		return 1;
	default:
		return 0;
	}
}

void cpu_loop(u32 cpu)
{
	for (;;)
		if (!work_step(cpu))
			platform->halt(); /* a kick between the check and the HLT ends it at once */
}

static void post(u32 cpu, enum mode mode)
{
	__atomic_store_n(&cpus[cpu].want, mode, __ATOMIC_SEQ_CST);
	if (cpu != this_cpu())
		kick_vcpu(cpu);
}

static bool_t wait_idle(u32 cpu)
{
	for (u64 i = 0; i < PATIENCE; i++) {
		if (cpu == this_cpu())
			work_step(cpu);
		if (cpus[cpu].mode == MODE_DEAD)
			return 0;
		if (cpus[cpu].want == MODE_IDLE && cpus[cpu].mode == MODE_IDLE)
			return 1;
		pause();
	}
	return 0;
}

bool_t work_stop(u32 cpu)
{
	post(cpu, MODE_IDLE);
	return wait_idle(cpu);
}

bool_t work_start(u32 cpu, enum mode mode)
{
	if (cpus[cpu].mode != MODE_IDLE)
		return 0;
	post(cpu, mode);
	return 1;
}

bool_t call_everywhere(void (*call)(u32, void *), void *arg)
{
	bool_t fine = 1;

	for (u32 cpu = 0; cpu < params.vcpus; cpu++)
		if (cpus[cpu].mode != MODE_IDLE || cpus[cpu].want != MODE_IDLE)
			return 0;
	for (u32 cpu = params.vcpus; cpu-- > 0;) {
		cpus[cpu].work.call = call;
		cpus[cpu].work.arg = arg;
		post(cpu, MODE_CALL);
	}
	for (u32 cpu = 0; cpu < params.vcpus; cpu++)
		fine &= wait_idle(cpu);
	return fine;
}

bool_t any_mode(enum mode mode)
{
	for (u32 cpu = 0; cpu < params.vcpus; cpu++)
		if (cpus[cpu].mode == mode || cpus[cpu].want == mode)
			return 1;
	return 0;
}
