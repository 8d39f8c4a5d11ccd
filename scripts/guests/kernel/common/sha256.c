// SPDX-License-Identifier: GPL-2.0-or-later
#include "sha256.h"
#include "string.h"

/* The first 32 bits of the fractional parts of the cube roots of the first 64 primes … */
static const u32 k[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1,
	0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3,
	0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
	0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
	0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
	0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
	0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
	0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
	0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};
/* … and of the square roots of the first 8. */
static const u32 start[8] = {
	0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c,
	0x1f83d9ab, 0x5be0cd19,
};

static u32 rotate(u32 x, u32 n)
{
	return x >> n | x << (32 - n);
}

static u32 big_endian(const u8 *at)
{
	return (u32)at[0] << 24 | (u32)at[1] << 16 | (u32)at[2] << 8 | at[3];
}

static void block(u32 h[8], const u8 *data)
{
	u32 w[64], s[8];

	for (u32 i = 0; i < 16; i++)
		w[i] = big_endian(data + 4 * i);
	for (u32 i = 16; i < 64; i++)
		w[i] = (rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10) + w[i - 7] +
		       (rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 16];
	memcpy(s, h, sizeof(s));
	for (u32 i = 0; i < 64; i++) {
		u32 e = s[4], a = s[0];
		u32 t1 = s[7] + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) +
			 ((e & s[5]) ^ (~e & s[6])) + k[i] + w[i];
		u32 t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) +
			 ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));

		for (u32 n = 7; n > 0; n--)
			s[n] = s[n - 1];
		s[4] += t1;
		s[0] = t1 + t2;
	}
	for (u32 n = 0; n < 8; n++)
		h[n] += s[n];
}

void sha256(const u8 *prefix, const u8 *data, u64 length, u8 out[SHA256_SIZE])
{
	u8 tail[2 * SHA256_BLOCK] = { 0 };
	u64 rest = length % SHA256_BLOCK;
	u64 end = rest + 9 <= SHA256_BLOCK ? SHA256_BLOCK : 2 * SHA256_BLOCK;
	u64 bits = (length + (prefix ? SHA256_BLOCK : 0)) * 8;
	u32 h[8];

	memcpy(h, start, sizeof(h));
	if (prefix)
		block(h, prefix);
	for (u64 at = 0; at + SHA256_BLOCK <= length; at += SHA256_BLOCK)
		block(h, data + at);
	memcpy(tail, data + length - rest, rest);
	tail[rest] = 0x80;
	for (u32 i = 0; i < 8; i++)
		tail[end - 1 - i] = (u8)(bits >> 8 * i);
	for (u64 at = 0; at < end; at += SHA256_BLOCK)
		block(h, tail + at);
	for (u32 i = 0; i < SHA256_SIZE; i++)
		out[i] = (u8)(h[i / 4] >> (24 - i % 4 * 8));
}

void hmac_sha256(const u8 key[32], const u8 *data, u64 length, u8 out[SHA256_SIZE])
{
	u8 inner[SHA256_BLOCK], outer[SHA256_BLOCK], hash[SHA256_SIZE];

	for (u32 i = 0; i < SHA256_BLOCK; i++) {
		inner[i] = (i < 32 ? key[i] : 0) ^ 0x36;
		outer[i] = (i < 32 ? key[i] : 0) ^ 0x5c;
	}
	sha256(inner, data, length, hash);
	sha256(outer, hash, sizeof(hash), out);
}
