/* SPDX-License-Identifier: GPL-2.0-or-later */
/* SHA-256 (FIPS 180-4) and HMAC (RFC 2104) of one piece of memory. */
#ifndef SHA256_H
#define SHA256_H

#include "types.h"

#define SHA256_SIZE 32
#define SHA256_BLOCK 64

/* prefix: a block that comes before the data, or 0. */
void sha256(const u8 *prefix, const u8 *data, u64 length, u8 out[SHA256_SIZE]);
void hmac_sha256(const u8 key[32], const u8 *data, u64 length, u8 out[SHA256_SIZE]);

#endif
