# SPDX-License-Identifier: GPL-2.0-or-later
"""A kit for small guest programs: page tables, segments and a boot page, ready in 64-bit mode.

The program starts in ring 3 and leaves it by OUT, so it runs on every KVM: natively even where
one has no second stage and emulates ring 0 (where the emulator would read guest memory through
``userspace_addr``, whatever a guest_memfd holds).  What differs from KVM to KVM stands in the boot
page.  Two views of guest-physical memory are mapped, user-accessible, each of one GiB:

* [0, 1 GiB): the private side, gpa = address
* [:data:`SHARED_VIEW`, + 1 GiB): the shared side, gpa = address - SHARED_VIEW

They are the same where no bit of the gpa selects the side.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

from kvmsim import exits
from kvmsim.api.kvm import Kvm
from kvmsim.api.registers import RFLAGS_FIXED, RFLAGS_IOPL3, Dtable, Regs
from kvmsim.api.vcpu import Vcpu
from kvmsim.api.vm import Vm
from kvmsim.uapi import PAGE_SIZE

BOOT_PAGE: Final = 0x1000
GDT: Final = 0x2000
PML4: Final = 0x3000
MAILBOX: Final = 0x7000  #: gpa of a page that nothing else uses
PROGRAM: Final = 0x8000  #: gpa of the program; the stack ends where the boot memory does
BOOT_SIZE: Final = 0x10000
SHARED_VIEW: Final = 1 << 30

_PRESENT, _WRITE, _USER, _LARGE = 1 << 0, 1 << 1, 1 << 2, 1 << 7
_TABLE: Final = _PRESENT | _WRITE | _USER
_LARGE_SIZE: Final = 2 << 20
# Null, ring 0 code and data, null, ring 3 data and code: the order that SYSRET wants.
_GDT: Final = struct.pack(
    "<6Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF
)
_BOOT_PAGE: Final = struct.Struct("<8sIIQQQ")
MAGIC: Final = b"KVMGUEST"


class Hypercall(IntEnum):
    """The instruction that calls the host, as the boot page says it."""

    NONE = 0
    VMCALL = 1
    VMMCALL = 2


@dataclass(frozen=True, slots=True)
class BootPage:
    """What a program finds at :data:`BOOT_PAGE` of the shared view, and in RDI its address.

    ``shared_bit`` is the position of the gpa bit that selects the shared side, 0 if there is none:
    :class:`Guest` fills it in. ``ram`` is a guest-physical range of the program's own, in bytes.
    """

    hypercall: Hypercall = Hypercall.NONE
    shared_bit: int = 0
    ram_gpa: int = 0
    ram_size: int = 0

    def to_bytes(self) -> bytes:
        """Encode: magic, u32 version, u32 hypercall, u64 shared_bit, u64 ram_gpa, u64 ram_size."""
        return _BOOT_PAGE.pack(
            MAGIC, 1, self.hypercall, self.shared_bit, self.ram_gpa, self.ram_size
        )


class Guest:
    """The boot memory of a VM, as slot ``slot`` at gpa 0."""

    def __init__(
        self, kvm: Kvm, vm: Vm, page: BootPage | None = None, *, ring: int = 3, slot: int = 0
    ) -> None:
        if ring not in (0, 3):
            raise ValueError(f"ring {ring}: 0 or 3")
        self.page = replace(page or BootPage(), shared_bit=vm.shared_bit)
        self.ring = ring
        self.memory = kvm.allocate(BOOT_SIZE)
        self.slot = vm.add_slot(0, self.memory, slot=slot)
        self.memory.write(BOOT_PAGE, self.page.to_bytes())
        self.memory.write(GDT, _GDT)
        self._write_tables()

    @property
    def _shared_mask(self) -> int:
        return 1 << self.page.shared_bit if self.page.shared_bit else 0

    def _write_tables(self) -> None:
        """PML4, PDPT, one page directory per view; they are in shared memory themselves."""
        pdpt, private, shared = PML4 + PAGE_SIZE, PML4 + 2 * PAGE_SIZE, PML4 + 3 * PAGE_SIZE
        mask = self._shared_mask

        def write(table: int, *entries: int) -> None:
            self.memory.write(table, struct.pack(f"<{len(entries)}Q", *entries))

        write(PML4, pdpt | mask | _TABLE)
        write(pdpt, private | mask | _TABLE, shared | mask | _TABLE)
        leaves = [number * _LARGE_SIZE | _TABLE | _LARGE for number in range(512)]
        write(private, *leaves)
        write(shared, *(leaf | mask for leaf in leaves))

    def load(self, program: bytes) -> None:
        """Put a program at :data:`PROGRAM`; ValueError if it does not fit."""
        if len(program) > BOOT_SIZE - PAGE_SIZE - PROGRAM:
            raise ValueError(f"a program of {len(program)} bytes: no more than 28 KiB")
        self.memory.write(PROGRAM, program)

    def enter(self, vcpu: Vcpu, offset: int = 0, **registers: int) -> None:
        """Have a vCPU start at ``offset`` of the program, RDI at the boot page."""
        sregs = vcpu.sregs.long_mode(PML4 | self._shared_mask, ring=self.ring)
        vcpu.sregs = replace(sregs, gdt=Dtable(SHARED_VIEW + GDT, len(_GDT) - 1))
        self.jump(vcpu, offset, **registers)

    def jump(self, vcpu: Vcpu, offset: int, **registers: int) -> None:
        """Set the general registers alone: for a vCPU that has entered before."""
        vcpu.settle()
        start = Regs(
            rip=SHARED_VIEW + PROGRAM + offset,
            rsp=SHARED_VIEW + BOOT_SIZE,
            rdi=SHARED_VIEW + BOOT_PAGE,
            rflags=RFLAGS_FIXED | (RFLAGS_IOPL3 if self.ring == 3 else 0),
        )
        vcpu.regs = replace(start, **registers)


DONE_PORT: Final = 0x80
_DONE: Final = b"\xe6\x80\xeb\xfc"  # 1: out %al,$0x80; jmp 1b


class Agent:
    """A program that does one thing at a time for its host: loads, stores, loops, hypercalls.

    Every method runs the vCPU until the thing is done or something else happened; that exit is
    then in :attr:`exit`, and None otherwise.
    """

    _CODE: Final = {
        "load": b"\x48\x8b\x19" + _DONE,  # mov (%rcx),%rbx
        "store": b"\x48\x89\x19" + _DONE,  # mov %rbx,(%rcx)
        # 1: mov %rbx,(%rcx); add $0x1000,%rcx; dec %rdx; jnz 1b
        "fill": b"\x48\x89\x19\x48\x81\xc1\x00\x10\x00\x00\x48\xff\xca\x75\xf1" + _DONE,
        # 1: mov (%rcx),%rax; cmp %rbx,%rax; je 1b
        "spin": b"\x48\x8b\x01\x48\x39\xd8\x74\xf8" + _DONE,
        # 1: mov (%rcx),%rax; test %rax,%rax; jz 2f; cmp %rax,%rbx; je 1b; jmp 3f
        # 2: mov %rbx,(%rcx); inc %rdx; mov %rdx,(%rsi); jmp 1b; 3:
        "race": b"\x48\x8b\x01\x48\x85\xc0\x74\x07\x48\x39\xc3\x74\xf3\xeb\x0b"
        b"\x48\x89\x19\x48\xff\xc2\x48\x89\x16\xeb\xe6" + _DONE,
        "vmcall": b"\x0f\x01\xc1" + _DONE,
        "vmmcall": b"\x0f\x01\xd9" + _DONE,
    }

    def __init__(self, guest: Guest, vcpu: Vcpu) -> None:
        self.guest = guest
        self.vcpu = vcpu
        self.exit: exits.Exit | None = None
        self._at: dict[str, int] = {}
        program = bytearray()
        for name, code in self._CODE.items():
            self._at[name] = len(program)
            program += code.ljust(-len(code) % 16 + len(code), b"\xcc")
        guest.load(bytes(program))
        guest.enter(vcpu)

    def start(self, what: str, **registers: int) -> None:
        """Have the vCPU do something at the next :meth:`resume`."""
        self.guest.jump(self.vcpu, self._at[what], **registers)

    def resume(self) -> exits.Exit | None:
        """Run until done (None) or until something else happened."""
        left = self.vcpu.run()
        done = isinstance(left, exits.IoExit) and left.port == DONE_PORT
        self.exit = None if done else left
        return self.exit

    def do(self, what: str, **registers: int) -> exits.Exit | None:
        """Start and resume."""
        self.start(what, **registers)
        return self.resume()

    def load(self, address: int) -> int | None:
        """The 8 bytes at a virtual address; None if the exit was another."""
        left = self.do("load", rcx=address)
        return self.vcpu.regs.rbx if left is None else None

    def store(self, address: int, value: int) -> bool:
        """Store 8 bytes at a virtual address; whether that was done."""
        return self.do("store", rcx=address, rbx=value) is None

    def fill(self, address: int, pages: int, value: int) -> bool:
        """Store ``value`` at the beginning of each page; whether that was done."""
        return self.do("fill", rcx=address, rdx=pages, rbx=value) is None

    def hypercall(self, nr: int, *arguments: int) -> int | None:
        """Call the host with the boot page's instruction; RAX, None if the exit was another."""
        names = dict(zip(("rbx", "rcx", "rdx", "rsi"), arguments, strict=False))
        what = self.guest.page.hypercall.name.lower()
        left = self.do(what, rax=nr, **names)
        return self.vcpu.regs.rax if left is None else None
