# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's CPU state as memory: fields that Unicorn's API hides or would change with effects.

The offsets belong to Unicorn 2.1.4 for x86-64 (CPUX86State in target/i386/cpu.h, CPUState in
hw/core/cpu.h, uc_struct in uc_priv.h). Nothing is trusted: the state is *found* by its contents,
through process_vm_readv so that a wrong guess is an error and not a signal, and every field is
checked against the API at start. Another build fails with `EngineMismatchError`.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any

from hwemu import processmemory

SUPPORTED = "2.1.4"

# 64-bit words of CPUX86State
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
RIP, EFLAGS, CC_DST, CC_SRC, CC_SRC2 = 16, 17, 18, 19, 20
GDT_BASE, IDT_BASE = 376 // 8 + 1, 400 // 8 + 1
CR0 = 424 // 8
CR2, CR3, CR4 = CR0 + 2, CR0 + 3, CR0 + 4
INTERCEPT, NESTED_CR3 = 5520 // 8, 5544 // 8
VM_VMCB = 5504 // 8
# 32-bit words
CC_OP, DF, HFLAGS, HFLAGS2 = 168 // 4, 172 // 4, 176 // 4, 180 // 4
ERROR_CODE, EXCEPTION_IS_INT = 5384 // 4, 5388 // 4
EXCEPTION_NEXT_EIP = 5392 // 8
OLD_EXCEPTION = 5496 // 4
# SegmentCache: selector u32, base u64 at +8, limit u32 at +16, flags u32 at +20
ES, CS, SS, DS, FS, GS = (184 + 24 * index for index in range(6))
LDT, TR, GDT, IDT = 328, 352, 376, 400

STATE_SIZE = 5568
CC_OP_EFLAGS = 1
CC_MASK = 0x8D5
DF_MASK = 0x400

HF_CPL = 3
HF_INHIBIT_IRQ = 1 << 3
HF_CS32, HF_SS32, HF_ADDSEG = 1 << 4, 1 << 5, 1 << 6
HF_LMA, HF_CS64 = 1 << 14, 1 << 15
HF_GUEST = 1 << 21

_CPU_CFLAGS_NEXT_TB = 24
_UC_STRUCT_SCAN = 4096
_STATE_AT = 35408  # CPUX86State in X86CPU: behind CPUState and its IOTLB
_ENV_PTR_AT = 296  # CPUState.env_ptr


class EngineMismatchError(RuntimeError):
    """The installed Unicorn is not the build whose inner layout is known here."""

    def __init__(self, version: str, what: str) -> None:
        super().__init__(
            f"Unicorn {version}: {what}; hwemu knows the x86-64 build of {SUPPORTED} only. "
            f"Install unicorn=={SUPPORTED}."
        )


def peek(address: int, length: int) -> bytes:
    """Up to ``length`` bytes of this process at ``address``; short or empty if not readable."""
    buffer = ctypes.create_string_buffer(length)
    try:
        done = processmemory.read(os.getpid(), address, ctypes.addressof(buffer), length)
    except OSError:
        return b""
    return buffer.raw[:done]


def find_state(handle: int, magic: tuple[int, ...], version: str) -> tuple[int, int]:
    """Addresses of (CPUState, CPUX86State) of the engine ``handle``.

    ``magic`` are the sixteen values that the caller has just put into the general registers, in
    the engine's order. The pair must be unique, and CPUState must point at CPUX86State.
    """
    pattern = struct.pack("<16Q", *magic)
    head = peek(handle, _UC_STRUCT_SCAN)
    found: set[tuple[int, int]] = set()
    for (pointer,) in struct.iter_unpack("<Q", head[: len(head) & ~7]):
        if pointer < 0x10000 or pointer % 8 or pointer >> 47:
            continue
        # Exactly here: a pointer to a heap block below CPUState has the pattern in reach too.
        state = pointer + _STATE_AT
        if peek(state, len(pattern)) == pattern and peek(pointer + _ENV_PTR_AT, 8) == struct.pack(
            "<Q", state
        ):
            found.add((pointer, state))
    if len(found) != 1:
        raise EngineMismatchError(version, f"CPU state found {len(found)} times in the engine")
    return found.pop()


def find_no_exit_request(handle: int, version: str) -> int:
    """Address of uc_struct.no_exit_request, a byte that is 0 or 1.

    Anchor: target_page_size = 4096 and target_page_align = 4095 side by side, then the host page
    sizes, then cpu_context_size; the byte is the third of the three bools behind next_pc.
    """
    head = peek(handle, _UC_STRUCT_SCAN)
    hits = []
    for at in range(0, len(head) - 72, 4):
        if struct.unpack_from("<II", head, at) != (4096, 4095):
            continue
        host, real = struct.unpack_from("<QQ", head, (at + 8 + 7) & ~7)
        if host == real == os.sysconf("SC_PAGESIZE"):
            hits.append(at)
    if len(hits) != 1:
        raise EngineMismatchError(version, f"page-size anchor found {len(hits)} times")
    # u32 size, u32 align, u64 host, u64 real, int icache, int context_content, int context_size,
    # pad, u64 next_pc, bool hook_insert, bool first_tb, bool no_exit_request, bool init_done
    at = ((hits[0] + 8 + 7) & ~7) + 16
    content, size = struct.unpack_from("<ii", head, at + 4)
    bools = at + 16 + 8
    if content != 1 or not 4096 < size < 8192 or head[bools + 3] != 1 or head[bools + 2] > 1:
        raise EngineMismatchError(version, "uc_struct has another layout behind its page sizes")
    return handle + bools + 2


class RawState:
    """Views of one engine's CPU state; use only in the engine's own thread, while it lives."""

    def __init__(self, cpu: int, state: int) -> None:
        storage = (ctypes.c_char * STATE_SIZE).from_address(state)
        self.bytes = memoryview(storage).cast("B")
        self.q = self.bytes.cast("Q")
        self.d = self.bytes.cast("I")
        self._cflags: Any = ctypes.c_uint32.from_address(cpu + _CPU_CFLAGS_NEXT_TB)
        self._cores = struct.unpack("<ii", peek(cpu, 8))

    def check(self, version: str, vmcb_hpa: int) -> None:
        """Fields that are known right after VMRUN must have their values."""
        facts = {
            "nr_cores, nr_threads": (self._cores, (1, 1)),
            "cflags_next_tb": (self._cflags.value, 0xFFFF_FFFF),
            "vm_vmcb": (self.q[VM_VMCB], vmcb_hpa),
            "hflags.GUEST": (self.d[HFLAGS] & HF_GUEST, HF_GUEST),
        }
        for name, (seen, expected) in facts.items():
            if seen != expected:
                raise EngineMismatchError(version, f"{name} is {seen}, expected {expected}")

    def run_one_instruction_next(self) -> None:
        """The next translation block holds a single instruction (CF_COUNT_MASK of tb cflags)."""
        self._cflags.value = 1

    def forget_single_instruction(self) -> None:
        """Undo `run_one_instruction_next` if it was not consumed."""
        self._cflags.value = 0xFFFF_FFFF

    @property
    def in_guest(self) -> bool:
        """VMRUN has been executed."""
        return bool(self.d[HFLAGS] & HF_GUEST)

    def linear(self, rip: int) -> int:
        """Where the instruction at ``rip`` lies: only 64-bit code has no segment base."""
        if self.d[HFLAGS] & HF_CS64:
            return rip
        return (self.q[CS // 8 + 1] + rip) & 0xFFFF_FFFF

    @property
    def code_bits(self) -> int:
        """Size of an address in the code that runs, without a prefix: 16, 32, 64."""
        flags = self.d[HFLAGS]
        return 64 if flags & HF_CS64 else 32 if flags & HF_CS32 else 16

    @property
    def cpl(self) -> int:
        """Current privilege level."""
        return int(self.d[HFLAGS] & HF_CPL)

    def keep_rflags(self, value: int) -> None:
        """Between runs: store RFLAGS whole, for the engine takes it apart as it starts."""
        self.set_rflags(value)
        self.q[EFLAGS] = value | 2

    def set_rflags(self, value: int) -> None:
        """In a hook: store RFLAGS where the engine keeps its parts while it runs."""
        self.q[CC_SRC] = value & CC_MASK
        self.d[CC_OP] = CC_OP_EFLAGS
        self.d[DF] = 0xFFFF_FFFF if value & DF_MASK else 1
        self.q[EFLAGS] = value & ~(CC_MASK | DF_MASK) | 2

    def end_instruction(self, rip: int) -> None:
        """Go on at ``rip`` as if the instruction before it had just completed."""
        self.q[RIP] = rip & 0xFFFF_FFFF_FFFF_FFFF
        self.d[HFLAGS] &= ~HF_INHIBIT_IRQ

    def forget_exception(self) -> None:
        """Clear what the engine keeps of an exception it never delivered itself."""
        self.d[EXCEPTION_IS_INT] = 0
        self.d[OLD_EXCEPTION] = 0xFFFF_FFFF

    def snapshot(self) -> bytes:
        """Everything, for `restore`."""
        return bytes(self.bytes)

    def restore(self, saved: bytes) -> None:
        """Back to `snapshot`."""
        self.bytes[:] = saved

    def release(self) -> None:
        """Drop the views before the engine is freed."""
        self.q.release()
        self.d.release()
        self.bytes.release()
