/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The guest-hypervisor communication block and its MSR protocol (AMD publication 56421). */
#ifndef GHCB_H
#define GHCB_H

#include "types.h"

#define MSR_GHCB 0xc0010130
#define MSR_SEV_STATUS 0xc0010131

/* Offsets in the page (56421, table 3). */
#define GHCB_CPL 0x0c8 /* the word with CPL in its byte 0xcb */
#define GHCB_RAX 0x1f8
#define GHCB_RCX 0x308
#define GHCB_RDX 0x310
#define GHCB_RBX 0x318
#define GHCB_RSI 0x330
#define GHCB_EXIT_CODE 0x390
#define GHCB_EXIT_INFO_1 0x398
#define GHCB_EXIT_INFO_2 0x3a0
#define GHCB_SCRATCH 0x3a8
#define GHCB_XCR0 0x3e8
#define GHCB_VALID 0x3f0 /* a bit for each 8 bytes from 0 on */
#define GHCB_BUFFER 0x800
#define GHCB_BUFFER_SIZE 0x7f0
#define GHCB_VERSION 0xffa
#define GHCB_USAGE 0xffc

/* Exit codes: those of an SVM guest, and the non-automatic events of the GHCB. */
#define SVM_EXIT_IOIO 0x7b
#define SVM_EXIT_MSR 0x7c
#define SVM_EXIT_CPUID 0x72
#define SVM_EXIT_HLT 0x78
#define SVM_EXIT_VMMCALL 0x81
#define SVM_EXIT_NPF 0x400
#define NAE_MMIO_READ 0x80000001UL
#define NAE_MMIO_WRITE 0x80000002UL
#define NAE_PSC 0x80000010UL
#define NAE_GUEST_REQUEST 0x80000011UL
#define NAE_HV_FEATURES 0x8000fffdUL

/* The MSR protocol: bits 0–11 say what it is. */
#define GHCB_MSR_INFO 0xfffUL
#define GHCB_MSR_SEV_INFO_REQUEST 0x002
#define GHCB_MSR_SEV_INFO 0x001
#define GHCB_MSR_REGISTER 0x012
#define GHCB_MSR_REGISTERED 0x013
#define GHCB_MSR_PSC 0x014
#define GHCB_MSR_PSC_DONE 0x015
#define GHCB_MSR_TERMINATE 0x100

#define PSC_PRIVATE 1UL
#define PSC_SHARED 2UL
#define PSC_ENTRIES ((GHCB_BUFFER_SIZE - 8) / 8)

/* Why a guest ends itself: set 0 is the specification's, general request. */
#define TERMINATE_GENERAL 0
#define TERMINATE_PROTOCOL 1

/* This vCPU's GHCB, and where it lies. */
u8 *ghcb(void);
u64 ghcb_gpa(void);

/* Fill in a request: begin, put what it needs, exit. What the host answered is then got. */
void ghcb_begin(void);
void ghcb_put(u32 offset, u64 value);
u64 ghcb_get(u32 offset);
/* 0, or what the host refused: EXITINFO1 is not 0 then (56421, 4.1). */
u64 ghcb_exit(u64 code, u64 info1, u64 info2);

/* The MSR protocol: a request, its answer; and the request to be ended. */
u64 ghcb_msr(u64 request);
NORETURN void ghcb_terminate(u64 reason);

#endif
