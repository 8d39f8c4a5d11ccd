// SPDX-License-Identifier: GPL-2.0-or-later
#include "instruction.h"

#define REX_W 8
#define REX_R 4
#define REX_X 2
#define REX_B 1
#define OPERAND_SIZE 0x66

static u64 *reg(struct trap_frame *f, u32 number)
{
	u64 *const registers[16] = {
		&f->rax, &f->rcx, &f->rdx, &f->rbx, &f->rsp, &f->rbp, &f->rsi, &f->rdi,
		&f->r8,	 &f->r9,  &f->r10, &f->r11, &f->r12, &f->r13, &f->r14, &f->r15,
	};

	return registers[number & 15];
}

static u64 low_bytes(u64 value, u32 size)
{
	return size == 8 ? value : value & ((1UL << size * 8) - 1);
}

struct instruction decode_port(const struct trap_frame *f)
{
	const u8 *at = (const u8 *)f->rip, *start = at;
	struct instruction i = { .size = 4 };

	for (; *at == OPERAND_SIZE; at++)
		i.size = 2;
	if ((*at & 0xf0) == 0x40)
		at++; /* REX changes nothing here */
	switch (*at & ~3) {
	case 0xe4: /* IN, OUT with a port of 8 bits */
		i.port = at[1];
		i.length = (u32)(at + 2 - start);
		break;
	case 0xec: /* … with DX */
		i.port = (u16)f->rdx;
		i.length = (u32)(at + 1 - start);
		break;
	default:
		return i;
	}
	if (!(*at & 1))
		i.size = 1;
	i.write = *at >> 1 & 1;
	i.value = low_bytes(f->rax, i.size);
	i.width = i.size;
	return i;
}

/* ModRM with a memory operand: its address without what is relative to RIP; bytes used, or 0. */
static u32 memory_operand(struct trap_frame *f, const u8 *at, u8 rex, u64 *address,
			  bool_t *relative)
{
	u32 mod = at[0] >> 6, rm = at[0] & 7, used = 1;
	u64 base = 0;

	*relative = 0;
	if (mod == 3)
		return 0;
	if (rm == 4) {
		u32 index = (at[1] >> 3 & 7) | (rex & REX_X ? 8 : 0);
		u32 b = at[1] & 7;

		used++;
		if (index != 4)
			base = *reg(f, index) << (at[1] >> 6);
		if (b == 5 && mod == 0) {
			base += (u64)(long)*(const int *)(at + used);
			used += 4;
		} else {
			base += *reg(f, b | (rex & REX_B ? 8 : 0));
		}
	} else if (rm == 5 && mod == 0) {
		*relative = 1;
		base = (u64)(long)*(const int *)(at + used);
		used += 4;
	} else {
		base = *reg(f, rm | (rex & REX_B ? 8 : 0));
	}
	if (mod == 1) {
		base += (u64)(long)(signed char)at[used];
		used += 1;
	} else if (mod == 2) {
		base += (u64)(long)*(const int *)(at + used);
		used += 4;
	}
	*address = base;
	return used;
}

struct instruction decode_mov(struct trap_frame *f)
{
	const u8 *at = (const u8 *)f->rip, *start = at;
	struct instruction i = { 0 };
	u32 number, operand, used, immediate = 0;
	bool_t relative, short_operand = 0;
	u8 rex = 0, opcode;
	u64 value;

	for (; *at == OPERAND_SIZE; at++)
		short_operand = 1;
	if ((*at & 0xf0) == 0x40)
		rex = *at++;
	operand = rex & REX_W ? 8 : short_operand ? 2 : 4;
	opcode = *at++;
	i.size = i.width = operand;
	switch (opcode) {
	case 0x88: /* MOV r/m8, r8 */
	case 0x8a:
		i.size = i.width = 1;
		break;
	case 0x89: /* MOV r/m, r */
	case 0x8b:
		break;
	case 0xc6: /* MOV r/m8, imm8 */
		i.size = i.width = immediate = 1;
		break;
	case 0xc7: /* MOV r/m, imm */
		immediate = operand == 2 ? 2 : 4;
		break;
	case 0x0f: /* MOVZX, MOVSX */
		opcode = *at++;
		if ((opcode & 0xf6) != 0xb6)
			return i;
		i.size = opcode & 1 ? 2 : 1;
		i.sign = opcode >> 3 & 1;
		break;
	default:
		return i;
	}
	i.write = opcode == 0x88 || opcode == 0x89 || immediate;
	number = (at[0] >> 3 & 7) | (rex & REX_R ? 8 : 0);
	used = memory_operand(f, at, rex, &i.address, &relative);
	if (!used)
		return i;
	at += used;
	if (immediate) {
		value = immediate == 1	 ? *at
			: immediate == 2 ? *(const u16 *)at
					 : (u64)(long)*(const int *)at;
		at += immediate;
	} else {
		i.high_byte = i.width == 1 && !rex && number >= 4;
		i.destination = i.high_byte ? number - 4 : number;
		value = *reg(f, i.destination) >> (i.high_byte ? 8 : 0);
	}
	i.length = (u32)(at - start);
	i.value = low_bytes(value, i.size);
	if (relative)
		i.address += f->rip + i.length;
	return i;
}

void finish_load(struct trap_frame *f, const struct instruction *i, u64 value)
{
	u64 *to = reg(f, i->destination);

	value = low_bytes(value, i->size);
	if (i->sign && value >> (i->size * 8 - 1))
		value |= ~((1UL << (i->size * 8 - 1)) - 1);
	switch (i->width) {
	case 8:
		*to = value;
		break;
	case 4: /* the upper half becomes zero */
		*to = (u32)value;
		break;
	case 2:
		*to = (*to & ~0xffffUL) | (u16)value;
		break;
	default:
		if (i->high_byte)
			*to = (*to & ~0xff00UL) | (u64)(u8)value << 8;
		else
			*to = (*to & ~0xffUL) | (u8)value;
	}
}
