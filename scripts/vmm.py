#!/usr/bin/env -S sh -c 'exec "$(dirname "$0")/../.venv/bin/python" "$0" "$@"'
# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole VMM: boot a small guest on private memory, serve its exits, take memory back."""

from __future__ import annotations

import argparse
import sys

from kvmsim import exits
from kvmsim.api import IoctlError, Kvm, Memslot, Simulation, Vcpu, Vm
from kvmsim.api.guest import BootPage, Guest, Hypercall
from kvmsim.uapi import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CAP_EXIT_HYPERCALL,
    KVM_CAP_GUEST_MEMFD_FLAGS,
    KVM_CAP_VM_TYPES,
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVM_X86_DEFAULT_VM,
    KVM_X86_SW_PROTECTED_VM,
    PAGE_SIZE,
)

RAM = 4 << 20  # gpa of the guest's RAM
FILLED, RESULT = 0xE9, 0xF4  # ports
PROGRAM = bytes.fromhex(
    # Ask for private memory, with the instruction that the boot page (rdi) names, if any.
    "448b470c"  # mov 12(%rdi),%r8d          hypercall: 0 none, 1 vmcall, 2 vmmcall
    "4585c0 7424"  # test %r8d,%r8d; jz work
    "b80c000000"  # mov $12,%eax             KVM_HC_MAP_GPA_RANGE
    "488b5f18 488b4f20 48c1e90c"  # mov 24(%rdi),%rbx; mov 32(%rdi),%rcx; shr $12,%rcx
    "ba10000000"  # mov $0x10,%edx           KVM_MAP_GPA_RANGE_ENCRYPTED
    "4183f802 7405 0f01c1 eb03 0f01d9"  # cmp $2,%r8d; je 1f; vmcall; jmp work; 1: vmmcall
    # work: fill every page, say so, count the pages that are not empty, say how many.
    "488b7718 488b4f20 4801f1"  # mov 24(%rdi),%rsi; mov 32(%rdi),%rcx; add %rsi,%rcx
    "488936 4881c600100000 4839ce 72f1"  # 2: mov %rsi,(%rsi); add $4096,%rsi; cmp; jb 2b
    "e6e9"  # out %al,$0xe9
    "488b7718 31db"  # mov 24(%rdi),%rsi; xor %ebx,%ebx
    "31c0 48833e00 0f95c0 01c3"  # 3: xor %eax,%eax; cmpq $0,(%rsi); setne %al; add %eax,%ebx
    "4881c600100000 4839ce 72e9"  # add $4096,%rsi; cmp %rcx,%rsi; jb 3b
    "89d8 e7f4 ebfe"  # mov %ebx,%eax; out %eax,$0xf4; jmp .
)


def build(kvm: Kvm, size: int) -> tuple[Vm, Memslot, Vcpu]:
    """Make a VM with the most private memory that this KVM has."""
    if kvm.check_extension(KVM_CAP_VM_TYPES) & 1 << KVM_X86_SW_PROTECTED_VM:
        vm = kvm.create_vm(KVM_X86_SW_PROTECTED_VM)
        vm.enable_cap(KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
        shared, flags = kvm.allocate(size), 0
        ring, hypercall = 0, Hypercall[kvm.transport.hypercall.upper()]
    else:  # no conversions, but memory that is an fd: the guest runs in ring 3
        vm = kvm.create_vm(KVM_X86_DEFAULT_VM)
        flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
        if flags & ~kvm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS):
            raise SystemExit(f"{kvm.name}: neither private memory nor guest_memfd flags 3")
        shared, ring, hypercall = None, 3, Hypercall.NONE
    file = vm.create_guest_memfd(size, flags)
    print(f"{kvm.name}: VM type {vm.type}, guest_memfd flags {flags}, guest in ring {ring}")
    ram = vm.add_slot(RAM, shared, guest_memfd=file, slot=1)
    guest = Guest(kvm, vm, BootPage(hypercall, ram_gpa=RAM, ram_size=size), ring=ring)
    guest.load(PROGRAM)
    vcpu = vm.create_vcpu()
    guest.enter(vcpu)
    return vm, ram, vcpu


def convert(vm: Vm, ram: Memslot, gpa: int, size: int, private: bool) -> None:
    """Change the type of a range, then free the side that the guest has left."""
    vm.convert(gpa, size, private=private)
    ram.discard(gpa, size, private=not private)
    print(f"converted {size // PAGE_SIZE} pages to {'private' if private else 'shared'}")


def serve(vm: Vm, ram: Memslot, vcpu: Vcpu) -> int:
    """Run the vCPU and answer its exits; the number of pages that it found not empty."""
    while True:
        match vcpu.run():
            case exits.HypercallExit(nr, (gpa, npages, attributes, *_)) if (
                nr == KVM_HC_MAP_GPA_RANGE
            ):
                private = bool(attributes & KVM_MAP_GPA_RANGE_ENCRYPTED)
                convert(vm, ram, gpa, npages * PAGE_SIZE, private)
                vcpu.complete(0)
            case exits.MemoryFaultExit(gpa, size, private):
                convert(vm, ram, gpa, size, private)
            case exits.IoExit(port, write=True) if port == FILLED:
                ram.discard(RAM, ram.size // 4, private=True)
                print(f"the guest filled its memory; took back {ram.size // 4 // PAGE_SIZE} pages")
            case exits.IoExit(port, write=True, data=data) if port == RESULT:
                return int.from_bytes(data, "little")
            case other:
                raise SystemExit(f"the guest cannot go on: {other}; {vcpu.regs}")


def main() -> int:
    """Return 0 if the guest saw what it should."""
    parser = argparse.ArgumentParser(prog="scripts/vmm.py", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--real", action="store_true", help="use this machine's /dev/kvm")
    where.add_argument(
        "--simulated", metavar="DIR", help="use the simulator; DIR: on a privfs mount"
    )
    parser.add_argument("--pages", type=int, default=1024, help="RAM, in pages of 4 KiB (1024)")
    options = parser.parse_args()
    device = "/dev/kvm" if options.real else Simulation(options.simulated)
    try:
        with Kvm(device) as kvm:
            left = serve(*build(kvm, options.pages * PAGE_SIZE))
    except IoctlError as error:
        sys.exit(f"{sys.argv[0]}: {error.strerror}")
    print(f"the guest still finds {left} of {options.pages} pages")
    return int(left != options.pages - options.pages // 4)


if __name__ == "__main__":
    sys.exit(main())
