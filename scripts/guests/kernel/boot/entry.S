/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Entry of every vCPU: 64-bit mode, identity page tables, interrupts off,
 * rdi = vCPU index, rsi = gpa of the boot-parameter page, rsp = top of a stack of its own.
 */
	.section .text.start, "ax"
	.globl	_start
_start:
	cli
	cld
	xorl	%ebp, %ebp
	call	boot_main
1:	hlt
	jmp	1b

/* NORETURN void enter_kernel(u64 index, params, handoff, u64 cr3, u64 entry)
 * The kernel's tables keep this page mapped where it is, so the next fetch succeeds. */
	.text
	.globl	enter_kernel
enter_kernel:
	movq	%rcx, %cr3
	jmpq	*%r8

	.section .rodata
	.balign	4096
	.globl	payload_start, payload_end
payload_start:
	.incbin	PAYLOAD
payload_end:

	.section .note.GNU-stack,"",@progbits
