# SPDX-License-Identifier: GPL-2.0-or-later
"""A small VMM for tests of the device: what a selftest does with descriptors and structures.

A guest runs in 64-bit mode at CPL 0 over page tables of its own that map the first GiB of
linear addresses to the gpas of the same number, in 2 MiB pages; ``HIGH`` maps a second one.
"""

from __future__ import annotations

import ctypes
import os
import struct
from struct import Struct
from types import TracebackType
from typing import Any, Self

from kvmsim import exits
from kvmsim.device.local import HostRange, LocalProcess
from kvmsim.device.system import KvmDevice
from kvmsim.hostmem import HostMemory
from kvmsim.uapi import (
    CREATE_GUEST_MEMFD,
    KVM_CREATE_GUEST_MEMFD,
    KVM_CREATE_VCPU,
    KVM_CREATE_VM,
    KVM_MEM_GUEST_MEMFD,
    KVM_RUN,
    KVM_SET_MEMORY_ATTRIBUTES,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
    MEMORY_ATTRIBUTES,
    USERSPACE_MEMORY_REGION,
    USERSPACE_MEMORY_REGION2,
    Abi,
    requests,
    structs,
)

PAGE = 4096
PML4, PDPT, PD, PD_HIGH, PD_PLAIN = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
TEXT, STACK, HEAP = 0x10000, 0x20000, 0x30000
GDT, IDT, HANDLERS = 0x6000, 0x7000, 0x9000
RAM = 4 << 20
HIGH = 1 << 32
"""A gpa, and the linear address of it, where tests put their own slots."""
PLAIN = HIGH + (1 << 30)
"""The linear address of gpa ``HIGH`` without the bits that all others have."""

_GDT = struct.pack("<3Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
UCALL_PORT = 4


def buffer(layout: Struct, *values: Any) -> ctypes.Array[ctypes.c_char]:
    """A structure in memory of this process."""
    return ctypes.create_string_buffer(layout.pack(*values), layout.size)


class Program:
    """A device, one process on it, and one VM. Use as a context manager."""

    def __init__(
        self,
        memory: Any = None,
        *,
        type: int = 0,
        abi: Abi = "upstream",
        host: HostMemory | None = None,
        in_place: bool = False,
    ) -> None:
        self.device = KvmDevice(memory, abi=abi, host=host, in_place=in_place)
        self.abi: Abi = abi
        self.process = LocalProcess(self.device)
        self.kvm = self.process.open()
        self.vm = self.process.ioctl(self.kvm, KVM_CREATE_VM, type)
        self.vcpus: list[int] = []
        self.extra: list[int] = []
        self.ram: HostRange | None = None

    # --- ioctls -------------------------------------------------------------------------------

    def ioctl(self, fd: int, request: int, layout: Struct | None = None, *values: Any) -> int:
        """With a structure, or a plain number."""
        if layout is None:
            return self.process.ioctl(fd, request, values[0] if values else 0)
        return self.process.ioctl(fd, request, buffer(layout, *values))

    def get(self, fd: int, request: int, size: int, head: bytes = b"") -> bytes:
        """What an ioctl writes."""
        space = ctypes.create_string_buffer(head, max(size, 1))
        self.process.ioctl(fd, request, space)
        return space.raw[:size]

    def put(self, fd: int, request: int, data: bytes) -> int:
        """Hand bytes to an ioctl."""
        return self.process.ioctl(fd, request, ctypes.create_string_buffer(data, len(data)))

    # --- memory -------------------------------------------------------------------------------

    def slot(
        self,
        slot: int,
        gpa: int,
        size: int,
        address: int,
        *,
        flags: int = 0,
        gmem: int | None = None,
        offset: int = 0,
    ) -> None:
        """Set a slot; with ``gmem`` a private file is bound."""
        if gmem is None:
            self.ioctl(
                self.vm, KVM_SET_USER_MEMORY_REGION, USERSPACE_MEMORY_REGION,
                slot, flags, gpa, size, address,
            )  # fmt: skip
            return
        flags |= KVM_MEM_GUEST_MEMFD
        request = KVM_SET_USER_MEMORY_REGION2
        if self.abi == "v7":
            request = KVM_SET_USER_MEMORY_REGION
        self.ioctl(
            self.vm, request, USERSPACE_MEMORY_REGION2,
            slot, flags, gpa, size, address, offset, gmem,
        )  # fmt: skip

    def guest_memfd(self, size: int, flags: int = 0) -> int:
        """A private file of the device's mount."""
        fd = self.ioctl(self.vm, KVM_CREATE_GUEST_MEMFD, CREATE_GUEST_MEMFD, size, flags)
        self.extra.append(fd)
        return fd

    def attributes(self, gpa: int, size: int, attributes: int) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        self.ioctl(self.vm, KVM_SET_MEMORY_ATTRIBUTES, MEMORY_ATTRIBUTES, gpa, size, attributes, 0)

    def boot(self, *codes: bytes, gpa_bits: int = 0) -> None:
        """RAM in slot 0 with tables and a vCPU for each code.

        ``gpa_bits`` goes into every leaf: the shared bit of a kind that has one.
        """
        self.ram = ram = self.process.ranges.allocate(RAM)
        flags = 0x87 | gpa_bits
        tables = gpa_bits | 7
        ram.write(PML4, struct.pack("<Q", PDPT | tables))
        ram.write(
            PDPT, struct.pack("<6Q", PD | tables, 0, 0, 0, PD_HIGH | tables, PD_PLAIN | tables)
        )
        ram.write(PD, struct.pack("<512Q", *(n << 21 | flags for n in range(512))))
        ram.write(PD_HIGH, struct.pack("<512Q", *(HIGH | n << 21 | flags for n in range(512))))
        ram.write(PD_PLAIN, struct.pack("<512Q", *(HIGH | n << 21 | 0x87 for n in range(512))))
        ram.write(GDT, _GDT)
        self.slot(0, 0, RAM, ram.address)
        for index, code in enumerate(codes):
            at = TEXT + index * PAGE
            ram.write(at, code)
            fd = self.add_vcpu(index)
            self.start_at(fd, at, STACK + index * PAGE, cr3=PML4 | gpa_bits)

    def add_vcpu(self, id: int) -> int:
        """KVM_CREATE_VCPU with the CPUID that KVM supports."""
        fd = self.ioctl(self.vm, KVM_CREATE_VCPU, None, id)
        self.vcpus.append(fd)
        cpuid = self.get(
            self.kvm, requests.KVM_GET_SUPPORTED_CPUID, 8 + 100 * 40, structs.CPUID2.pack(100)
        )
        self.put(fd, requests.KVM_SET_CPUID2, cpuid)
        return fd

    def start_at(self, fd: int, rip: int, rsp: int, *, cr3: int = PML4) -> None:
        """64-bit mode, as lib/x86/processor.c of the kernel's selftests sets it up."""
        sregs = bytearray(self.get(fd, requests.KVM_GET_SREGS, structs.SREGS_SIZE))
        code = (0, 0xFFFF_FFFF, 0x08, 0xB, 1, 0, 0, 1, 1, 1, 0, 0)
        data = (0, 0xFFFF_FFFF, 0x10, 0x3, 1, 0, 0, 1, 0, 1, 0, 0)
        for at, segment in ((0, code), (1, data), (2, data), (4, data)):
            structs.SEGMENT.pack_into(sregs, at * structs.SEGMENT.size, *segment)
        structs.SEGMENT.pack_into(  # LDT: unusable
            sregs, 7 * structs.SEGMENT.size, *([0] * 11), 1
        )
        structs.DTABLE.pack_into(sregs, 192, GDT, PAGE - 1)
        structs.DTABLE.pack_into(sregs, 208, IDT, 256 * 16 - 1)
        cr0, cr2, _, cr4, cr8, efer, apic = structs.SREGS_CONTROL.unpack_from(sregs, 224)
        cr0, cr4, efer = 1 << 31 | 1 << 5 | 1, cr4 | 1 << 5 | 1 << 9, efer | 0xD00
        structs.SREGS_CONTROL.pack_into(sregs, 224, cr0, cr2, cr3, cr4, cr8, efer, apic)
        self.put(fd, requests.KVM_SET_SREGS, bytes(sregs))
        self.set_regs(fd, rip=rip, rsp=rsp, rflags=2)

    # --- vCPUs --------------------------------------------------------------------------------

    _NAMES = (
        *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
        *(f"r{n}" for n in range(8, 16)),
        *("rip", "rflags"),
    )

    def regs(self, fd: int) -> dict[str, int]:
        """KVM_GET_REGS."""
        data = self.get(fd, requests.KVM_GET_REGS, structs.REGS.size)
        return dict(zip(self._NAMES, structs.REGS.unpack(data), strict=True))

    def set_regs(self, fd: int, **values: int) -> None:
        """KVM_SET_REGS of these, the others as they are."""
        regs = {**self.regs(fd), **values}
        self.put(fd, requests.KVM_SET_REGS, structs.REGS.pack(*regs.values()))

    def run_buffer(self, fd: int) -> memoryview:
        """The vCPU's struct kvm_run."""
        return self.process.mmap(fd)

    def run(self, fd: int) -> exits.Exit:
        """KVM_RUN, and what struct kvm_run says."""
        try:
            result = self.process.ioctl(fd, KVM_RUN)
        except OSError as error:
            result = -(error.errno or 0)
        return exits.decode(bytes(self.run_buffer(fd)), result, self.abi)

    def ucall(self, fd: int) -> int:
        """Run up to an IN from the port of the kernel's selftests; RDI there."""
        left = self.run(fd)
        assert left == exits.IoExit(UCALL_PORT, 1, False), left
        return self.regs(fd)["rdi"]

    # --- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Close everything and give the host back."""
        for fd in self.extra:
            os.close(fd)
        self.extra.clear()
        self.process.close_all()
        self.device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
