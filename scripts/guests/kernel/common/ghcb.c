// SPDX-License-Identifier: GPL-2.0-or-later
/* Speaking to the host through the GHCB and its MSR (AMD publication 56421). */
#include "ghcb.h"
#include "platform.h"

u64 ghcb_gpa(void)
{
	return platform_params()->ghcb_gpa + this_cpu() * PAGE_SIZE;
}

u8 *ghcb(void)
{
	return shared_at(ghcb_gpa());
}

static void vmgexit(void)
{
	asm volatile(".byte 0xf3, 0x0f, 0x01, 0xd9" : : : "memory");
}

u64 ghcb_msr(u64 request)
{
	wrmsr(MSR_GHCB, request);
	vmgexit();
	return rdmsr(MSR_GHCB);
}

NORETURN void ghcb_terminate(u64 reason)
{
	for (;;) {
		wrmsr(MSR_GHCB, GHCB_MSR_TERMINATE | reason << 16);
		vmgexit();
		halt_once();
	}
}

void ghcb_put(u32 offset, u64 value)
{
	*(volatile u64 *)(ghcb() + offset) = value;
	ghcb()[GHCB_VALID + offset / 64] |= (u8)(1 << (offset / 8 & 7));
}

u64 ghcb_get(u32 offset)
{
	return *(volatile u64 *)(ghcb() + offset);
}

void ghcb_begin(void)
{
	zero_words(ghcb() + GHCB_VALID, 2);
	*(volatile u16 *)(ghcb() + GHCB_VERSION) = 2;
	*(volatile u32 *)(ghcb() + GHCB_USAGE) = 0;
}

u64 ghcb_exit(u64 code, u64 info1, u64 info2)
{
	ghcb_put(GHCB_EXIT_CODE, code);
	ghcb_put(GHCB_EXIT_INFO_1, info1);
	ghcb_put(GHCB_EXIT_INFO_2, info2);
	vmgexit();
	return ghcb_get(GHCB_EXIT_INFO_1) & 0xffffffff;
}
