/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef SNP_H
#define SNP_H

#include "bootparams.h"

/* A GHCB per vCPU, then a page for guest requests and one for the answers. */
#define SNP_GHCB_PAGES (BOOT_MAX_VCPUS + 2)
#define SNP_CPUID_ENTRIES 64

/* The CPUID page (SNP firmware ABI, 8.17.2.6). */
struct snp_cpuid {
	u32 count, reserved0;
	u64 reserved1;
	struct {
		u32 leaf, subleaf;
		u64 xcr0, xss;
		u32 out[4];
		u64 reserved;
	} entry[SNP_CPUID_ENTRIES];
};

/* Ask the firmware through the host; both pages are private. 0 or a negative errno. */
long snp_guest_request(const u8 *request, u8 *response);

long snp_report(const u8 *data, u8 *out);

#endif
