# SPDX-License-Identifier: GPL-2.0-or-later
"""A small VMM for confidential guests: what its VMM does with KVM_MEMORY_ENCRYPT_OP, and code.

Guests are a few instructions put together here; both kinds run them in 64-bit mode at CPL 0, over
tables in private memory that map the first GiB of linear addresses to private gpas of the same
number and the second GiB (``SHARED``) to the shared side of the same gpas.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

from device_program import PAGE, Program

from kvmsim.kind import SHARED_BIT
from kvmsim.uapi import (
    KVM_CAP_EXIT_HYPERCALL,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_X86_SNP_VM,
    KVM_X86_TDX_VM,
    requests,
    sev,
    structs,
    tdx,
)

RAM = 1 << 20
ROM, ROM_SIZE = 0xFFFF_0000, 0x10000
TABLES, TEXT, STACK = 0x1000, 0x10000, 0x20000
FRESH = 0x80000  #: a private page that nobody has loaded
SHARED = 1 << 30
PORT = 0x80
GDT = struct.pack("<3Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)

_MOV = {"rax": b"\x48\xb8", "rcx": b"\x48\xb9", "rdx": b"\x48\xba", "rbx": b"\x48\xbb",
        **{f"r{n}": bytes((0x49, 0xB0 | n)) for n in range(8, 16)}}  # fmt: skip
LOAD_R15 = b"\x4c\x8b\x3b"  # mov (%rbx),%r15
STORE_R15 = b"\x4c\x89\x3b"  # mov %r15,(%rbx)
LOAD_RAX = b"\x48\x8b\x03"  # mov (%rbx),%rax
STORE_RAX = b"\x48\x89\x03"  # mov %rax,(%rbx)
TDCALL = b"\x66\x0f\x01\xcc"
VMGEXIT = b"\xf3\x0f\x01\xd9"
PVALIDATE = b"\xf2\x0f\x01\xff"
WRMSR = b"\x0f\x30"


def mov(**values: int) -> bytes:
    """Load 64-bit immediates, in this order."""
    return b"".join(_MOV[name] + value.to_bytes(8, "little") for name, value in values.items())


def tables(half: int, other: int, at: int = TABLES) -> bytes:
    """Four pages for ``at``: PML4, PDPT, and a directory each for the private and shared view.

    ``half`` is the bit that private entries have set, ``other`` that of shared ones.
    """
    pdpt, private, shared = (at + PAGE * n for n in (1, 2, 3))
    page = struct.pack("<512Q", pdpt | half | 3, *[0] * 511)
    page += struct.pack("<512Q", private | half | 3, shared | half | 3, 0, 3 << 30 | half | 0x83,
                        *[0] * 508)  # fmt: skip
    for bit in (half, other):
        page += struct.pack("<512Q", *(n << 21 | bit | 0x83 for n in range(512)))
    return page


class Confidential(Program):
    """RAM at 0, both sides, all of it private."""

    kind: int

    def __init__(self, memory: Any, **more: Any) -> None:
        super().__init__(memory, type=self.kind, **more)

    def add_slot(self, slot: int, gpa: int, size: int) -> tuple[int, Any]:
        """A slot with a guest_memfd, all private; the file and the shared side."""
        gmem = self.guest_memfd(size)
        side = self.process.ranges.allocate(size)
        self.slot(slot, gpa, size, side.address, gmem=gmem)
        self.attributes(gpa, size, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        return gmem, side

    def forward_hypercalls(self) -> None:
        """KVM_HC_MAP_GPA_RANGE comes here."""
        self.ioctl(self.vm, requests.KVM_ENABLE_CAP, structs.ENABLE_CAP,
                   KVM_CAP_EXIT_HYPERCALL, 0, 1 << 12, 0, 0, 0)  # fmt: skip

    def answer(self, fd: int, at: int, value: int) -> None:
        """Store 8 bytes in struct kvm_run."""
        self.run_buffer(fd)[at : at + 8] = value.to_bytes(8, "little")


class Td(Confidential):
    """A TD, up to where its VMM wants to differ."""

    kind = KVM_X86_TDX_VM

    def command(self, fd: int, id: int, data: int = 0, flags: int = 0, hw_error: int = 0) -> bytes:
        """KVM_MEMORY_ENCRYPT_OP; the structure afterwards. OSError keeps it as ``.command``."""
        space = ctypes.create_string_buffer(
            tdx.TDX_CMD.pack(id, flags, data, hw_error), tdx.TDX_CMD.size
        )
        try:
            self.process.ioctl(fd, requests.KVM_MEMORY_ENCRYPT_OP, space)
        finally:
            self.last = tdx.TDX_CMD.unpack(space.raw)
        return space.raw

    def init_vm(self, **more: Any) -> None:
        """KVM_TDX_INIT_VM."""
        space = ctypes.create_string_buffer(init_vm(**more))
        self.command(self.vm, tdx.KVM_TDX_INIT_VM, ctypes.addressof(space))

    def add_td_vcpu(self, id: int = 0, rcx: int = 0) -> int:
        """KVM_CREATE_VCPU, KVM_SET_CPUID2, KVM_TDX_INIT_VCPU."""
        fd = self.add_vcpu(id)
        self.command(fd, tdx.KVM_TDX_INIT_VCPU, rcx)
        return fd

    def load(self, fd: int, gpa: int, data: bytes, *, measure: bool = True) -> tuple[int, ...]:
        """KVM_TDX_INIT_MEM_REGION; what the structure says afterwards."""
        source = self.process.ranges.allocate(-(-len(data) // PAGE) * PAGE)
        source.write(0, data)
        return self.load_from(fd, source.address, gpa, source.size // PAGE, int(measure))

    def load_from(
        self, fd: int, source: int, gpa: int, npages: int, flags: int = 0
    ) -> tuple[int, ...]:
        """The same with numbers; OSError keeps the structure as ``.region``."""
        region = ctypes.create_string_buffer(
            tdx.TDX_INIT_MEM_REGION.pack(source, gpa, npages), tdx.TDX_INIT_MEM_REGION.size
        )
        try:
            self.command(fd, tdx.KVM_TDX_INIT_MEM_REGION, ctypes.addressof(region), flags)
        finally:
            self.region = tdx.TDX_INIT_MEM_REGION.unpack(region.raw)
        return self.region

    def finalize(self) -> None:
        """KVM_TDX_FINALIZE_VM."""
        self.command(self.vm, tdx.KVM_TDX_FINALIZE_VM)

    def launch(self, code: bytes) -> int:
        """All of it; the vCPU, which will run ``code`` after it has come to 64-bit mode."""
        self.init_vm()
        vcpu = self.add_td_vcpu()
        self.add_slot(0, 0, RAM)
        self.add_slot(1, ROM, ROM_SIZE)
        self.load(vcpu, TABLES, tables(0, SHARED_BIT))
        self.load(vcpu, TEXT, code)
        self.load(vcpu, ROM + ROM_SIZE - PAGE, reset_page())
        self.finalize()
        return vcpu


def init_vm(
    attributes: int = 0,
    xfam: int = 3,
    width: int | None = 40,
    entries: tuple[tuple[int, ...], ...] = (),
    padding: int = 0,
    reserved: bytes = bytes(96),
    nent: int | None = None,
) -> bytes:
    """Struct kvm_tdx_init_vm."""
    if width is not None:
        entries = ((0x8000_0008, 0, 0, width << 16, 0, 0, 0), *entries)
    hashes = (b"\1" * 48, b"\2" * 48, b"\3" * 48)
    return b"".join((
        tdx.TDX_INIT_VM.pack(attributes, xfam, *hashes, reserved),
        tdx.CPUID2_HEAD.pack(len(entries) if nent is None else nent, padding),
        *(structs.CPUID_ENTRY2.pack(*entry) for entry in entries),
    ))  # fmt: skip


def reset_page() -> bytes:
    """The last page below 4 GiB: from the reset vector to 64-bit mode, then to TEXT."""
    base = ROM + ROM_SIZE - PAGE
    gdtr = base + 0x100
    code = b"\x0f\x01\x15" + struct.pack("<I", gdtr)
    for register, value in ((0xD8, TABLES), (0xE0, 0x660), (0xC0, 0x8001_0033)):
        code += b"\xb8" + struct.pack("<I", value) + bytes((0x0F, 0x22, register))
    code += b"\xea" + struct.pack("<IH", TEXT, 0x08)
    page = bytearray(PAGE)
    page[: len(code)] = code
    page[0x100:0x106] = struct.pack("<HI", len(GDT) - 1, base + 0x110)
    page[0x110 : 0x110 + len(GDT)] = GDT
    page[0xFF0:0xFF5] = b"\xe9" + struct.pack("<i", -0xFF5)
    return bytes(page)


def tdvmcall(**registers: int) -> bytes:
    """TDG.VP.VMCALL that passes R10 to R15 as far as they are named here."""
    mask = sum(1 << int(name[1:]) for name in ("r10", "r11", "r12", "r13", "r14", "r15"))
    return mov(r10=0, **registers) + mov(rax=0, rcx=mask) + TDCALL


def td_out() -> bytes:
    """Tell R15 by way of an OUT."""
    return tdvmcall(r11=30, r12=4, r13=1, r14=PORT)


class SnpGuest(Confidential):
    """An SNP guest, up to where its VMM wants to differ."""

    kind = KVM_X86_SNP_VM

    def command(self, id: int, data: bytes | None = None, address: int = 0) -> bytes:
        """KVM_MEMORY_ENCRYPT_OP; what the sub-structure holds afterwards.

        ``.error`` is what the AMD-SP said, ``.struct`` the sub-structure, also after OSError.
        """
        space = None if data is None else ctypes.create_string_buffer(data, len(data))
        if space is not None:
            address = ctypes.addressof(space)
        command = ctypes.create_string_buffer(sev.SEV_CMD.pack(id, address, 0, 0), sev.SEV_CMD.size)
        try:
            self.process.ioctl(self.vm, requests.KVM_MEMORY_ENCRYPT_OP, command)
        finally:
            self.error = sev.SEV_CMD.unpack(command.raw)[2]
            self.struct = b"" if space is None else space.raw
        return self.struct

    def init2(self, features: int = 0, flags: int = 0, version: int = 2) -> None:
        """KVM_SEV_INIT2."""
        self.command(sev.KVM_SEV_INIT2, sev.SEV_INIT.pack(features, flags, version))

    def start(self, policy: int = 0x30000, flags: int = 0) -> None:
        """KVM_SEV_SNP_LAUNCH_START."""
        data = sev.SNP_LAUNCH_START.pack(policy, bytes(16), flags)
        self.command(sev.KVM_SEV_SNP_LAUNCH_START, data)

    def load(self, gpa: int, data: bytes, type: int = 1) -> tuple[int, ...]:
        """KVM_SEV_SNP_LAUNCH_UPDATE; gfn_start, uaddr and len afterwards."""
        source = self.process.ranges.allocate(-(-len(data) // PAGE) * PAGE)
        source.write(0, data)
        return self.load_from(source.address, gpa // PAGE, source.size, type)

    def load_from(
        self, source: int, gfn: int, size: int, type: int = 1, flags: int = 0
    ) -> tuple[int, ...]:
        """The same with numbers."""
        data = sev.SNP_LAUNCH_UPDATE.pack(gfn, source, size, type, flags)
        self.command(sev.KVM_SEV_SNP_LAUNCH_UPDATE, data)
        return sev.SNP_LAUNCH_UPDATE_DONE.unpack_from(self.struct)

    def finish(
        self, host_data: bytes = bytes(32), block: int = 0, auth: int = 0, flags: int = 0,
        *, block_en: bool = False,
    ) -> None:  # fmt: skip
        """KVM_SEV_SNP_LAUNCH_FINISH."""
        data = sev.SNP_LAUNCH_FINISH.pack(block, auth, block_en, 0, 0, host_data, flags)
        self.command(sev.KVM_SEV_SNP_LAUNCH_FINISH, data)

    def launch(self, code: bytes) -> int:
        """All of it; the vCPU, which will run ``code``."""
        self.init2()
        self.start()
        vcpu = self.add_vcpu(0)
        self.add_slot(0, 0, RAM)
        self.load(TABLES, tables(SHARED_BIT, 0))
        self.load(TEXT, code)
        self.start_at(vcpu, TEXT, STACK, cr3=TABLES | SHARED_BIT)
        self.finish()
        return vcpu


def write_ghcb_msr(value: int) -> bytes:
    """WRMSR of the GHCB MSR, then VMGEXIT."""
    low, high = value & 0xFFFF_FFFF, value >> 32
    return mov(rcx=0xC001_0130, rax=low, rdx=high) + WRMSR + VMGEXIT
