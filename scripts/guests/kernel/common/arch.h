/* SPDX-License-Identifier: GPL-2.0-or-later */
/* x86-64 instructions and table formats (AMD APM vol. 2: 4.8 descriptors, 5.3 paging). */
#ifndef ARCH_H
#define ARCH_H

#include "types.h"

#define PTE_PRESENT 0x1UL
#define PTE_WRITE 0x2UL
#define PTE_ACCESSED 0x20UL
#define PTE_DIRTY 0x40UL
#define PTE_LARGE 0x80UL
#define PTE_NX (1UL << 63)
#define PTE_ADDRESS 0x000ffffffffff000UL
#define PTE_TABLE (PTE_PRESENT | PTE_WRITE | PTE_ACCESSED)
#define PTE_RW (PTE_PRESENT | PTE_WRITE | PTE_ACCESSED | PTE_DIRTY | PTE_NX)
#define PTE_RO (PTE_PRESENT | PTE_ACCESSED | PTE_NX)
#define PTE_RX (PTE_PRESENT | PTE_ACCESSED)

#define SEL_CODE 0x08
#define SEL_DATA 0x10
#define SEL_TSS 0x18 /* 16 bytes per vCPU */

/* The virtual map that the boot stage builds for the kernel. */
#define PRIVATE_VA 0xffff800000000000UL /* gpa + PRIVATE_VA: the private side */
#define SHARED_VA 0xffffc00000000000UL	/* gpa + SHARED_VA: the shared side */
#define KERNEL_VA 0xffffffff80000000UL
#define JUMP_VA 0xffffffff90000000UL /* an executable window of 2 MiB for `jump` */

struct table_register {
	u16 limit;
	u64 base;
} __attribute__((packed));

struct gate {
	u16 offset_low, selector;
	u8 ist, type;
	u16 offset_mid;
	u32 offset_high, reserved;
};

struct trap_frame {
	u64 r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
	u64 vector, error, rip, cs, rflags, rsp, ss;
};

#define TRAP_VECTORS 32
#define TRAP_VE 20 /* Intel: virtualization exception */
#define TRAP_VC 29 /* AMD: VMM communication exception */
extern const u64 trap_entries[TRAP_VECTORS]; /* vectors.S */
void trap(struct trap_frame *frame);

static inline void gate_set(struct gate *g, u64 handler, u8 ist)
{
	g->offset_low = (u16)handler;
	g->selector = SEL_CODE;
	g->ist = ist;
	g->type = 0x8e; /* present, 64-bit interrupt gate */
	g->offset_mid = (u16)(handler >> 16);
	g->offset_high = (u32)(handler >> 32);
	g->reserved = 0;
}

/* The instructions themselves; a driver asks the platform (platform.h). */
static inline u32 raw_in(u16 port, u32 size)
{
	u32 v = 0;

	if (size == 1)
		asm volatile("inb %1, %b0" : "+a"(v) : "d"(port));
	else if (size == 2)
		asm volatile("inw %1, %w0" : "+a"(v) : "d"(port));
	else
		asm volatile("inl %1, %0" : "=a"(v) : "d"(port));
	return v;
}

static inline void raw_out(u16 port, u32 size, u32 v)
{
	if (size == 1)
		asm volatile("outb %b0, %1" : : "a"(v), "d"(port));
	else if (size == 2)
		asm volatile("outw %w0, %1" : : "a"(v), "d"(port));
	else
		asm volatile("outl %0, %1" : : "a"(v), "d"(port));
}

static inline u64 read_cr2(void)
{
	u64 v;

	asm volatile("mov %%cr2, %0" : "=r"(v));
	return v;
}

static inline u64 read_cr3(void)
{
	u64 v;

	asm volatile("mov %%cr3, %0" : "=r"(v));
	return v;
}

static inline void write_cr3(u64 v)
{
	asm volatile("mov %0, %%cr3" : : "r"(v) : "memory");
}

static inline void invlpg(u64 va)
{
	asm volatile("invlpg (%0)" : : "r"(va) : "memory");
}

static inline void lidt(const void *base, u16 limit)
{
	struct table_register r = { limit, (u64)base };

	asm volatile("lidt %0" : : "m"(r));
}

static inline u64 rdmsr(u32 index)
{
	u32 low, high;

	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index) : "memory");
	return (u64)high << 32 | low;
}

static inline void wrmsr(u32 index, u64 v)
{
	asm volatile("wrmsr" : : "c"(index), "a"((u32)v), "d"((u32)(v >> 32)) : "memory");
}

static inline void cpuid(u32 leaf, u32 subleaf, u32 out[4])
{
	asm volatile("cpuid"
		     : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3])
		     : "a"(leaf), "c"(subleaf));
}

static inline void zero_words(void *at, u64 words)
{
	asm volatile("rep stosq" : "+D"(at), "+c"(words) : "a"(0UL) : "memory");
}

static inline void copy_words(void *to, const void *from, u64 words)
{
	asm volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
}

static inline void pause(void)
{
	asm volatile("pause" : : : "memory");
}

static inline void halt_once(void)
{
	asm volatile("hlt" : : : "memory");
}

static inline void fence(void)
{
	asm volatile("mfence" : : : "memory");
}

#endif
