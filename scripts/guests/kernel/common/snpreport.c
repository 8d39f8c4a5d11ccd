// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Attestation by MSG_REPORT_REQ (SNP firmware ABI, 7.3 and table 100). A message that leaves the
 * guest is to be sealed with the key of the secrets page (AES-256-GCM); this one goes without a
 * seal, algorithm 0, so only a host that models the rules alone will answer it.
 */
#include "platform.h"
#include "snp.h"
#include "string.h"

#define MSG_REPORT_REQ 5
#define HEADER_VERSION 1

struct message {
	u8 tag[32];
	u64 sequence;
	u64 reserved0;
	u8 algorithm, header_version;
	u16 header_size;
	u8 type, version;
	u16 size;
	u32 reserved1;
	u8 key, reserved2[35];
	u8 payload[4000];
};
_Static_assert(sizeof(struct message) == PAGE_SIZE, "SNP firmware ABI, table 100");

static u64 sequence = 1; /* odd from the guest, the next even number from the firmware */

long snp_report(const u8 *data, u8 *out)
{
	static struct message request __attribute__((aligned(4096)));
	struct message *answer = (void *)out;
	long ret;

	memset(&request, 0, sizeof(request));
	request.sequence = sequence;
	request.header_version = HEADER_VERSION;
	request.header_size = __builtin_offsetof(struct message, payload);
	request.type = MSG_REPORT_REQ;
	request.version = 1;
	request.size = REPORT_DATA + 32; /* REPORT_DATA, VMPL, reserved */
	memcpy(request.payload, data, REPORT_DATA);
	ret = snp_guest_request((const u8 *)&request, out);
	if (ret)
		return ret;
	sequence += 2;
	return answer->size <= sizeof(answer->payload)
		       ? (long)(__builtin_offsetof(struct message, payload) + answer->size)
		       : IO_ERROR;
}
