/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "layout.h"

/* From the boot stage: rdi = vCPU index, rsi = boot parameters, rdx = handoff (both at their
 * own address until the identity map goes away). */
	.text
	.globl	kernel_entry
kernel_entry:
	leaq	1(%rdi), %rax
	shlq	$STACK_SHIFT, %rax
	leaq	stacks(%rip), %rsp
	addq	%rax, %rsp
	xorl	%ebp, %ebp
	call	kernel_main
1:	hlt
	jmp	1b

/* void load_segments(const struct table_register *gdt, u64 tss_selector) */
	.globl	load_segments
load_segments:
	lgdt	(%rdi)
	movl	$SEL_DATA_ASM, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	pushq	$SEL_CODE_ASM
	leaq	1f(%rip), %rax
	pushq	%rax
	lretq
1:	ltr	%si
	ret

/*
 * bool guarded_call(u64 (*fn)(void *), void *arg, struct guard *guard)
 * Calls fn; an exception in it ends it and answers 1 (trap() fills in what happened).
 */
	.globl	guarded_call, guard_resume
guarded_call:
	.irp	r,rbx,rbp,r12,r13,r14,r15,rdx
	pushq	%\r
	.endr
	movq	%rsp, GUARD_RSP(%rdx)
	movl	$1, GUARD_ACTIVE(%rdx)
	movq	%rdi, %rax
	movq	%rsi, %rdi
	call	*%rax
	movq	(%rsp), %rdx
	movq	%rax, GUARD_RESULT(%rdx)
	xorl	%eax, %eax
	jmp	1f
guard_resume:
	cld
	movl	$1, %eax
1:	popq	%rdx
	movl	$0, GUARD_ACTIVE(%rdx)
	.irp	r,r15,r14,r13,r12,rbp,rbx
	popq	%\r
	.endr
	ret

	.bss
	.balign	4096
	.globl	stacks
stacks:
	.skip	MAX_VCPUS << STACK_SHIFT

	.section .note.GNU-stack,"",@progbits
