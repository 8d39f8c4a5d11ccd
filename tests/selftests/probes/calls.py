# SPDX-License-Identifier: GPL-2.0-or-later
"""Probes: requests at the wrong level, odd numbers, pointers that lead nowhere."""

from __future__ import annotations

from selftests.probes.bench import Answers, Bench, probe

from kvmsim.uapi import (
    CREATE_GUEST_MEMFD,
    KVM_CAP_GUEST_MEMFD,
    KVM_CAP_MAX_VCPU_ID,
    KVM_CAP_NR_MEMSLOTS,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_GUEST_MEMFD,
    KVM_CREATE_VCPU,
    KVM_CREATE_VM,
    KVM_GET_API_VERSION,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_PRE_FAULT_MEMORY,
    KVM_RUN,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
    PAGE_SIZE,
    PRE_FAULT_MEMORY,
    USERSPACE_MEMORY_REGION,
    USERSPACE_MEMORY_REGION2,
    requests,
    structs,
)
from kvmsim.uapi import capabilities as cap
from kvmsim.uapi.encoding import io, iow


def levels(bench: Bench) -> dict[str, int]:
    return {"system": bench.kvm.handle, "VM": bench.vm.handle, "vCPU": bench.vcpu.handle}


@probe
def a_request_that_is_none(bench: Bench) -> Answers:
    """A number of KVM's that nobody has, and one of somebody else's."""
    found = {}
    for level, fd in levels(bench).items():
        found[f"{level}: 0xff"] = bench.ask(fd, io(0xFF))
        found[f"{level}: 0xff with a pointer"] = bench.ask(fd, iow(0xFF, 8), bytes(8))
        found[f"{level}: FIONREAD"] = bench.ask(fd, 0x541B, bytes(8))
    return found


@probe
def a_request_of_another_level(bench: Bench) -> Answers:
    """On every level the requests of the others."""
    asked = {
        "KVM_GET_API_VERSION": (KVM_GET_API_VERSION, 0),
        "KVM_CREATE_VM": (KVM_CREATE_VM, 0),
        "KVM_GET_VCPU_MMAP_SIZE": (KVM_GET_VCPU_MMAP_SIZE, 0),
        "KVM_CHECK_EXTENSION": (KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS),
        "KVM_RUN": (KVM_RUN, 1),
        "KVM_GET_REGS": (requests.KVM_GET_REGS, bytes(structs.REGS.size)),
        "KVM_GET_MP_STATE": (requests.KVM_GET_MP_STATE, bytes(4)),
        "KVM_SET_NR_MMU_PAGES": (requests.KVM_SET_NR_MMU_PAGES, 100),
        "KVM_SET_USER_MEMORY_REGION": (KVM_SET_USER_MEMORY_REGION, bytes(32)),
        "KVM_CREATE_VCPU": (KVM_CREATE_VCPU, 7),
    }
    return {
        f"{level}: {name}": bench.ask(fd, request, argument)
        for level, fd in levels(bench).items()
        for name, (request, argument) in asked.items()
    }


@probe
def a_request_of_another_size(bench: Bench) -> Answers:
    """The size is part of the number; what is above 32 bits is not."""
    vm, region = bench.vm.handle, USERSPACE_MEMORY_REGION.pack(0, 0, 0, PAGE_SIZE, 0)
    return {
        "24 bytes": bench.ask(vm, iow(0x46, 24), region),
        "160 bytes": bench.ask(vm, iow(0x46, 160), region + bytes(128)),
        "region2 of 32 bytes": bench.ask(vm, iow(0x49, 32), region),
        "no direction": bench.ask(vm, io(0x46), region),
        "upper half": bench.ask(vm, KVM_SET_USER_MEMORY_REGION | 1 << 40, region),
        "guest_memfd of 16 bytes": bench.ask(vm, iow(0xD4, 16), bytes(64)),
    }


@probe
def an_argument_where_none_belongs(bench: Bench) -> Answers:
    """Some requests insist on 0."""
    found = bench.each(bench.kvm.handle, KVM_GET_API_VERSION, {"version 0": 0, "version 1": 1})
    found["mmap size 1"] = bench.ask(bench.kvm.handle, KVM_GET_VCPU_MMAP_SIZE, 1)
    found |= bench.each(bench.vcpu.handle, KVM_RUN, {"run 1": 1, "run -1": -1})
    return found


@probe
def the_type_of_a_vm(bench: Bench) -> Answers:
    """What this KVM does not have is refused, whole numbers counted."""
    types = [0, 8, 9, 1 << 31, 1 << 32, 1 << 40, -1]
    return {f"type {type:#x}": bench.ask(bench.kvm.handle, KVM_CREATE_VM, type) for type in types}


@probe
def capabilities_of_system_and_vm(bench: Bench) -> Answers:
    """The same on both levels, and 0 for what nobody knows."""
    asked = {
        "USER_MEMORY": 3, "NR_MEMSLOTS": KVM_CAP_NR_MEMSLOTS, "SYNC_MMU": cap.KVM_CAP_SYNC_MMU,
        "DESTROY": cap.KVM_CAP_DESTROY_MEMORY_REGION_WORKS,
        "JOIN": cap.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS, "READONLY_MEM": cap.KVM_CAP_READONLY_MEM,
        "USER_MEMORY2": 231, "MEMORY_FAULT_INFO": 232, "GUEST_MEMFD": KVM_CAP_GUEST_MEMFD,
        "IMMEDIATE_EXIT": cap.KVM_CAP_IMMEDIATE_EXIT, "MP_STATE": cap.KVM_CAP_MP_STATE,
        "CHECK_EXTENSION_VM": cap.KVM_CAP_CHECK_EXTENSION_VM, "EXIT_HYPERCALL": 201,
        "MAX_VCPU_ID": KVM_CAP_MAX_VCPU_ID, "ENABLE_CAP_VM": cap.KVM_CAP_ENABLE_CAP_VM,
        "none": 9999, "negative": -1, "beyond 32 bits": 1 << 32 | KVM_CAP_NR_MEMSLOTS,
    }  # fmt: skip
    found = {}
    for level in ("system", "VM"):
        fd = levels(bench)[level]
        found |= {
            f"{level}: {name}": bench.ask(fd, KVM_CHECK_EXTENSION, number)
            for name, number in asked.items()
        }
    return found


# --- pointers -----------------------------------------------------------------------------------


def inputs() -> dict[str, tuple[str, int, bytes]]:
    """Requests that read a structure: level, number, a structure that is good."""
    region = USERSPACE_MEMORY_REGION.pack(5, 0, 1 << 30, 0, 0)
    device = structs.CREATE_DEVICE.pack(99, 0, 0)
    region2 = USERSPACE_MEMORY_REGION2.pack(5, 0, 1 << 30, 0, 0, 0, 0)
    return {
        "KVM_SET_USER_MEMORY_REGION": ("VM", KVM_SET_USER_MEMORY_REGION, region),
        "KVM_SET_USER_MEMORY_REGION2": ("VM", KVM_SET_USER_MEMORY_REGION2, region2),
        "KVM_CREATE_GUEST_MEMFD": ("VM", KVM_CREATE_GUEST_MEMFD, CREATE_GUEST_MEMFD.pack(1, 0)),
        "KVM_PRE_FAULT_MEMORY": ("vCPU", KVM_PRE_FAULT_MEMORY, PRE_FAULT_MEMORY.pack(0, 1, 1)),
        "KVM_ENABLE_CAP": ("VM", requests.KVM_ENABLE_CAP, structs.ENABLE_CAP.pack(9999, *[0] * 5)),
        "KVM_SET_REGS": ("vCPU", requests.KVM_SET_REGS, bytes(structs.REGS.size)),
        "KVM_SET_MP_STATE": ("vCPU", requests.KVM_SET_MP_STATE, structs.MP_STATE.pack(0)),
        "KVM_INTERRUPT": ("vCPU", requests.KVM_INTERRUPT, structs.INTERRUPT.pack(300)),
        "KVM_SET_SREGS": ("vCPU", requests.KVM_SET_SREGS, bytes(structs.SREGS_SIZE)),
        "KVM_SET_DEBUGREGS": ("vCPU", requests.KVM_SET_DEBUGREGS, bytes(128)),
        "KVM_GET_DIRTY_LOG": ("VM", requests.KVM_GET_DIRTY_LOG, structs.DIRTY_LOG.pack(77, 0)),
        "KVM_CREATE_DEVICE": ("VM", requests.KVM_CREATE_DEVICE, device),
    }  # fmt: skip


@probe
def a_structure_that_ends_with_its_page(bench: Bench) -> Answers:
    """At the very end of what is mapped a structure is whole; a byte later it is EFAULT."""
    found = {}
    for name, (level, request, good) in inputs().items():
        edge = bench.edge()
        fd = levels(bench)[level]
        found[f"{name}: at the end"] = bench.ask(fd, request, edge.put(good))
        found[f"{name}: a byte beyond"] = bench.ask(fd, request, edge.put(good, 1))
        found[f"{name}: before the page"] = bench.ask(fd, request, edge.start - 1)
    return found


@probe
def a_pointer_to_nowhere(bench: Bench) -> Answers:
    """NULL, a small number, the kernel's half."""
    found = {}
    for name, (level, request, _) in inputs().items():
        fd = levels(bench)[level]
        for where, address in (("null", 0), ("16", 16), ("kernel", 0xFFFF_8880_0000_0000),
                               ("not canonical", 1 << 62), ("last", -8)):  # fmt: skip
            found[f"{name}: {where}"] = bench.ask(fd, request, address)
    return found


@probe
def an_answer_into_memory_that_is_not_to_be_written(bench: Bench) -> Answers:
    """What is told is told to a page that can be read alone, or to one that ends too early."""
    outputs = {
        "KVM_GET_REGS": (requests.KVM_GET_REGS, structs.REGS.size),
        "KVM_GET_SREGS": (requests.KVM_GET_SREGS, structs.SREGS_SIZE),
        "KVM_GET_FPU": (requests.KVM_GET_FPU, structs.FPU.size),
        "KVM_GET_MP_STATE": (requests.KVM_GET_MP_STATE, 4),
        "KVM_GET_VCPU_EVENTS": (requests.KVM_GET_VCPU_EVENTS, structs.VCPU_EVENTS.size),
        "KVM_GET_DEBUGREGS": (requests.KVM_GET_DEBUGREGS, structs.DEBUGREGS.size),
        "KVM_GET_XSAVE": (requests.KVM_GET_XSAVE, structs.XSAVE_SIZE),
    }
    found = {}
    for name, (request, size) in outputs.items():
        edge = bench.edge()
        fd = bench.vcpu.handle
        found[f"{name}: fits"] = bench.ask(fd, request, edge.end - size)
        found[f"{name}: a byte short"] = bench.ask(fd, request, edge.end - size + 1)
        edge.read_only()
        found[f"{name}: read-only"] = bench.ask(fd, request, edge.end - size)
    edge = bench.edge()
    clock = bench.vm.handle
    found["KVM_GET_CLOCK: a byte short"] = bench.ask(clock, requests.KVM_GET_CLOCK, edge.end - 47)
    return found


# --- vCPUs --------------------------------------------------------------------------------------


@probe
def numbers_of_vcpus(bench: Bench) -> Answers:
    """Which may be, and that one that was is never again."""
    last = int(bench.ask(bench.vm.handle, KVM_CHECK_EXTENSION, KVM_CAP_MAX_VCPU_ID))
    cases = {"0": 0, "0 again": 0, "5": 5, "last": last - 1, "one more": last, "-1": -1,
             "beyond 32 bits": 1 << 32 | 3, "3": 3, "3 again": 3}  # fmt: skip
    return bench.each(bench.vm.handle, KVM_CREATE_VCPU, cases)


@probe
def a_limit_for_numbers_of_vcpus(bench: Bench) -> Answers:
    """KVM_CAP_MAX_VCPU_ID: once, and before vCPUs are made."""
    vm = bench.kvm.create_vm()

    def limit(number: int, flags: int = 0) -> str:
        argument = structs.ENABLE_CAP.pack(KVM_CAP_MAX_VCPU_ID, flags, number, 0, 0, 0)
        return bench.ask(vm.handle, requests.KVM_ENABLE_CAP, argument)

    return {
        "0": limit(0), "too many": limit(1 << 20), "with flags": limit(8, 1),
        "8": limit(8), "8 again": limit(8), "9": limit(9),
        "vCPU 7": bench.ask(vm.handle, KVM_CREATE_VCPU, 7),
        "vCPU 8": bench.ask(vm.handle, KVM_CREATE_VCPU, 8),
        "8 with a vCPU": limit(8),
    }  # fmt: skip


@probe
def what_must_come_before_vcpus(bench: Bench) -> Answers:
    """Requests of a VM that has, or has not, vCPUs already."""
    vm = bench.kvm.create_vm().handle
    tss = requests.KVM_SET_IDENTITY_MAP_ADDR
    line = structs.IRQ_LEVEL.pack(1, 1)

    def asked() -> Answers:
        return {
            "KVM_SET_BOOT_CPU_ID": bench.ask(vm, requests.KVM_SET_BOOT_CPU_ID, 0),
            "KVM_SET_IDENTITY_MAP_ADDR": bench.ask(vm, tss, structs.U64_VALUE.pack(0xFFFB_C000)),
            "KVM_IRQ_LINE": bench.ask(vm, requests.KVM_IRQ_LINE, line),
            "KVM_SET_NR_MMU_PAGES 63": bench.ask(vm, requests.KVM_SET_NR_MMU_PAGES, 63),
            "KVM_SET_NR_MMU_PAGES 64": bench.ask(vm, requests.KVM_SET_NR_MMU_PAGES, 64),
            "KVM_SET_TSS_ADDR 4 GiB": bench.ask(vm, requests.KVM_SET_TSS_ADDR, 1 << 32),
        }

    found = {f"before: {name}": answer for name, answer in asked().items()}
    found["vCPU"] = bench.ask(vm, KVM_CREATE_VCPU, 0)
    found |= {f"after: {name}": answer for name, answer in asked().items()}
    found["after: KVM_CREATE_IRQCHIP"] = bench.ask(vm, requests.KVM_CREATE_IRQCHIP)
    return found


@probe
def caps_that_cannot_be_enabled(bench: Bench) -> Answers:
    """Unknown ones, known ones that are no switch, flags, arguments."""

    def enable(cap: int, flags: int = 0, argument: int = 0) -> str:
        data = structs.ENABLE_CAP.pack(cap, flags, argument, 0, 0, 0)
        return bench.ask(bench.vm.handle, requests.KVM_ENABLE_CAP, data)

    data = structs.ENABLE_CAP.pack(9999, 0, 0, 0, 0, 0)
    return {
        "unknown": enable(9999),
        "guest_memfd": enable(KVM_CAP_GUEST_MEMFD),
        "hypercall 12": enable(201, 0, 1 << 12),
        "hypercall 11": enable(201, 0, 1 << 11),
        "hypercall with flags": enable(201, 1, 1 << 12),
        "none again": enable(201),
        "on a vCPU": bench.ask(bench.vcpu.handle, requests.KVM_ENABLE_CAP, data),
    }
