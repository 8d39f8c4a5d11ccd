/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Entry points of the 32 exception vectors; each builds a struct trap_frame and calls trap(). */

	.text

	.macro entry vector has_error
trap_entry_\vector:
	.if \has_error == 0
	pushq	$0
	.endif
	pushq	$\vector
	jmp	trap_common
	.endm

	/* vectors that push an error code: 8, 10-14, 17, 21, 29, 30 (APM vol. 2, 8.2) */
	.irp	v,0,1,2,3,4,5,6,7,9,15,16,18,19,20,22,23,24,25,26,27,28,31
	entry	\v 0
	.endr
	.irp	v,8,10,11,12,13,14,17,21,29,30
	entry	\v 1
	.endr

trap_common:
	cld
	.irp	r,rax,rbx,rcx,rdx,rsi,rdi,rbp,r8,r9,r10,r11,r12,r13,r14,r15
	pushq	%\r
	.endr
	movq	%rsp, %rdi
	movq	%rsp, %rbp
	andq	$-16, %rsp
	call	trap
	movq	%rbp, %rsp
	.irp	r,r15,r14,r13,r12,r11,r10,r9,r8,rbp,rdi,rsi,rdx,rcx,rbx,rax
	popq	%\r
	.endr
	addq	$16, %rsp
	iretq

	.section .rodata
	.balign	8
	.globl	trap_entries
trap_entries:
	.irp	v,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
	.quad	trap_entry_\v
	.endr

	.section .note.GNU-stack,"",@progbits
