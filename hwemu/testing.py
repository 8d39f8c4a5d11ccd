# SPDX-License-Identifier: GPL-2.0-or-later
"""A small machine for tests and examples: one memory file, one second-stage table, some vCPUs.

Guest memory is identity-mapped by the guest's own tables (2 MiB pages, user-accessible, first
GiB); guest-physical address equals offset in the memory file. Second-stage leaves appear on
demand unless `Machine.holes` says otherwise.
"""

from __future__ import annotations

import os
import struct
from types import TracebackType

from hwemu.arena import Arena, new_table_pool
from hwemu.cpu.api import Access, DescriptorTable, Regs, Segment, Sregs
from hwemu.cpu.engine import Precise
from hwemu.cpu.unicorn_svm import SvmCpu
from hwemu.stage2 import Stage2

PAGE = 4096
POOL_HPA = 256 << 20

PML4, PDPT, PD = 0x1000, 0x2000, 0x3000
GDT, TSS, IDT = 0x6000, 0x7000, 0x8000
TEXT, HEAP = 0x10000, 0x40000
STACK, IST1_STACK, RING0_STACK, USER_STACK = 0x20000, 0x24000, 0x28000, 0x2C000
TSS_SELECTOR = 0x30
STAR = 0x0018_0008 << 32
"""SYSCALL to 0x08, SYSRET to 0x2b."""

_GDT_ENTRIES = (
    0,
    0x00AF_9B00_0000_FFFF,  # 0x08 ring 0 code
    0x00CF_9300_0000_FFFF,  # 0x10 ring 0 data
    0x00CF_FB00_0000_FFFF,  # 0x18 ring 3 32-bit code
    0x00CF_F300_0000_FFFF,  # 0x20 ring 3 data
    0x00AF_FB00_0000_FFFF,  # 0x28 ring 3 code
)
_TSS_LIMIT = 0x67


class Machine:
    """``size`` bytes of guest memory and ``cpus`` vCPUs that share it. Use as a context manager."""

    def __init__(
        self, size: int = 64 << 20, cpus: int = 1, *, precise: Precise = "exit-request"
    ) -> None:
        self.size = size
        self.holes: set[int] = set()
        """Guest page numbers that `on_fault` leaves alone."""
        self.faults: list[tuple[int, Access]] = []
        self.arena = Arena()
        self.pool = new_table_pool(16 << 20)
        self.stage2 = Stage2(self.pool, POOL_HPA)
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, size)
        self.hpa = self.arena.place(self.fd, 0, size)
        self.cpus = [
            SvmCpu(
                self.arena,
                self.pool,
                POOL_HPA,
                self.stage2.root_hpa,
                index,
                self.on_fault,
                precise=precise,
            )
            for index in range(cpus)
        ]
        self._build_tables()

    @property
    def cpu(self) -> SvmCpu:
        """The first vCPU."""
        return self.cpus[0]

    def on_fault(self, gpa: int, access: Access) -> bool:
        """Map the page unless it is a hole or beyond memory."""
        self.faults.append((gpa, access))
        if gpa >= self.size or gpa // PAGE in self.holes:
            return False
        page = gpa // PAGE * PAGE
        self.stage2.map(page, self.hpa + page, 1)
        return True

    def write(self, gpa: int, data: bytes) -> None:
        """Store into guest memory from outside."""
        os.pwrite(self.fd, data, gpa)

    def read(self, gpa: int, length: int) -> bytes:
        """Bytes of guest memory."""
        return os.pread(self.fd, length, gpa)

    def word(self, gpa: int) -> int:
        """The 64-bit word at ``gpa``."""
        return int(struct.unpack("<Q", self.read(gpa, 8))[0])

    def _build_tables(self) -> None:
        self.write(PML4, struct.pack("<Q", PDPT | 7))
        self.write(PDPT, struct.pack("<Q", PD | 7))
        self.write(PD, struct.pack("<512Q", *(index << 21 | 0x87 for index in range(512))))
        tss_low = _TSS_LIMIT | (TSS & 0xFFFFFF) << 16 | 0x8B << 40 | (TSS >> 24 & 0xFF) << 56
        self.write(GDT, struct.pack("<8Q", *_GDT_ENTRIES, tss_low, TSS >> 32))
        self.write(TSS + 4, struct.pack("<Q", RING0_STACK))
        self.write(TSS + 0x24, struct.pack("<Q", IST1_STACK))
        self.write(TSS + 0x66, struct.pack("<H", _TSS_LIMIT + 1))

    def gate(
        self, vector: int, handler: int, *, ist: int = 0, dpl: int = 0, trap: bool = False
    ) -> None:
        """Point an IDT gate at ``handler`` in ring 0."""
        kind = 0x8F if trap else 0x8E
        low = handler & 0xFFFF | 0x08 << 16 | ist << 32 | (kind | dpl << 5) << 40
        low |= (handler >> 16 & 0xFFFF) << 48
        self.write(IDT + 16 * vector, struct.pack("<QQ", low, handler >> 32))

    def sregs(self, *, user: bool = False) -> Sregs:
        """64-bit mode over the tables built here."""
        return Sregs.long_mode(
            PML4,
            gdt=DescriptorTable(GDT, 8 * 8 - 1),
            idt=DescriptorTable(IDT, 256 * 16 - 1),
            tr=Segment(TSS_SELECTOR, TSS, _TSS_LIMIT, 0x08B),
            user=user,
        )

    def boot(
        self, code: bytes, *, cpu: int = 0, at: int = TEXT, user: bool = False, **regs: int
    ) -> SvmCpu:
        """Put ``code`` at ``at`` and one vCPU in front of it."""
        self.write(at, code)
        vcpu = self.cpus[cpu]
        vcpu.set_sregs(self.sregs(user=user))
        start = {"rip": at, "rsp": USER_STACK if user else STACK - 0x800 * cpu, "rflags": 2}
        vcpu.set_regs(Regs(**{**start, **regs}))
        return vcpu

    def close(self) -> None:
        """Free everything, engines first."""
        for cpu in self.cpus:
            cpu.close()
        self.arena.close()
        os.close(self.fd)

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
