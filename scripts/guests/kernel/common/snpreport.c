// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Attestation by MSG_REPORT_REQ (SNP firmware ABI, 56860, "Guest Messages"). A message that leaves
 * the guest is sealed with the key of the secrets page, VMPCK0. The rules are what is kept here,
 * not secrecy: the seal is an HMAC with SHA-256 over all that follows it, algorithm 0, in place of
 * AES-256-GCM.
 */
#include "platform.h"
#include "sha256.h"
#include "snp.h"
#include "string.h"

#define MSG_REPORT_REQ 5
#define MSG_REPORT_RSP 6
#define SECRETS_VMPCK0 0x20 /* offset in the secrets page */
#define RESPONSE_HEAD 32     /* STATUS, REPORT_SIZE, reserved */
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

static void seal(const struct message *m, u8 tag[SHA256_SIZE])
{
	const u8 *key = (u8 *)private_at(platform_params()->secrets_gpa) + SECRETS_VMPCK0;

	hmac_sha256(key, (const u8 *)&m->sequence, m->header_size - sizeof(m->tag) + m->size, tag);
}

static bool_t genuine(const struct message *m)
{
	u8 tag[SHA256_SIZE], difference = 0;

	if (m->header_size != __builtin_offsetof(struct message, payload) ||
	    m->size > sizeof(m->payload) || m->type != MSG_REPORT_RSP ||
	    m->sequence != sequence + 1)
		return 0;
	seal(m, tag);
	for (u32 i = 0; i < sizeof(tag); i++)
		difference |= tag[i] ^ m->tag[i];
	return !difference;
}

long snp_report(const u8 *data, u8 *out)
{
	static struct message request __attribute__((aligned(4096)));
	static struct message answer __attribute__((aligned(4096)));
	u32 size;
	long ret;

	memset(&request, 0, sizeof(request));
	request.sequence = sequence;
	request.header_version = HEADER_VERSION;
	request.header_size = __builtin_offsetof(struct message, payload);
	request.type = MSG_REPORT_REQ;
	request.version = 1;
	request.size = REPORT_DATA + 32; /* REPORT_DATA, VMPL, reserved */
	memcpy(request.payload, data, REPORT_DATA);
	seal(&request, request.tag);
	ret = snp_guest_request((const u8 *)&request, (u8 *)&answer);
	if (ret)
		return ret;
	/* The answer is a copy: what the host changes now changes nothing any more. */
	if (!genuine(&answer))
		return IO_ERROR;
	sequence += 2;
	platform_status = *(const u32 *)answer.payload;
	size = *(const u32 *)(answer.payload + 4);
	if (platform_status || (u64)size + RESPONSE_HEAD > answer.size)
		return IO_ERROR;
	memcpy(out, answer.payload + RESPONSE_HEAD, size);
	return size;
}
