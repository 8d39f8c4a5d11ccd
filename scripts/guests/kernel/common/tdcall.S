/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * void tdcall(struct tdcall *regs): TDCALL with all of its registers (Intel GHCI 1.5, 2.4).
 * RBP and RSP are never passed, so RBP keeps the structure's address.
 */
	.text
	.globl	tdcall
tdcall:
	.irp	r,rbx,rbp,r12,r13,r14,r15
	pushq	%\r
	.endr
	movq	%rdi, %rbp
	movq	0(%rbp), %rax
	movq	8(%rbp), %rbx
	movq	16(%rbp), %rcx
	movq	24(%rbp), %rdx
	movq	32(%rbp), %rsi
	movq	40(%rbp), %rdi
	.set	at, 48
	.irp	r,r8,r9,r10,r11,r12,r13,r14,r15
	movq	at(%rbp), %\r
	.set	at, at + 8
	.endr
	.byte	0x66, 0x0f, 0x01, 0xcc
	movq	%rax, 0(%rbp)
	movq	%rbx, 8(%rbp)
	movq	%rcx, 16(%rbp)
	movq	%rdx, 24(%rbp)
	movq	%rsi, 32(%rbp)
	movq	%rdi, 40(%rbp)
	.set	at, 48
	.irp	r,r8,r9,r10,r11,r12,r13,r14,r15
	movq	%\r, at(%rbp)
	.set	at, at + 8
	.endr
	.irp	r,r15,r14,r13,r12,rbp,rbx
	popq	%\r
	.endr
	ret

	.section .note.GNU-stack,"",@progbits
