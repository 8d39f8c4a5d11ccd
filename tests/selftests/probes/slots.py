# SPDX-License-Identifier: GPL-2.0-or-later
"""Probes: slots and files at their limits."""

from __future__ import annotations

import itertools
import mmap
import os

from selftests.machine import KEEP, PUNCH, fallocate, try_mmap
from selftests.probes.bench import RAM, Answers, Bench, probe

from kvmsim.api import Kvm, Simulation
from kvmsim.uapi import (
    CREATE_GUEST_MEMFD,
    KVM_CAP_NR_MEMSLOTS,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_GUEST_MEMFD,
    KVM_GET_API_VERSION,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
    KVM_USER_MEM_SLOTS,
    PAGE_SIZE,
    USERSPACE_MEMORY_REGION,
    USERSPACE_MEMORY_REGION2,
    requests,
    structs,
)

SIZE = 16 * PAGE_SIZE


def plain(bench: Bench, cases: dict[str, dict[str, int]], *, undo: bool = True) -> Answers:
    """KVM_SET_USER_MEMORY_REGION with fields changed; what was made is deleted again."""
    memory = bench.kvm.allocate(SIZE)
    good = {"slot": 1, "flags": 0, "gpa": RAM, "size": SIZE, "hva": memory.address}
    found = {}
    for name, changed in cases.items():
        found |= bench.grid(
            bench.vm.handle, KVM_SET_USER_MEMORY_REGION, USERSPACE_MEMORY_REGION, good,
            {name: changed},
        )  # fmt: skip
        if undo and found[name] == "0" and (good | changed)["size"]:
            slot = (good | changed)["slot"]
            bench.vm.set_user_memory_region(slot, 0, 0, 0)
    return found


@probe
def the_shape_of_a_plain_slot(bench: Bench) -> Answers:
    """Alignment, wrap-around, number, flags."""
    return plain(bench, {
        "good": {}, "size 0": {"size": 0}, "size 1": {"size": 1}, "gpa 1": {"gpa": RAM + 1},
        "hva 1": {"hva": 1}, "hva 0": {"hva": 0}, "hva of nobody": {"hva": 1 << 40},
        "hva of the kernel": {"hva": 1 << 63}, "hva not canonical": {"hva": 1 << 50},
        "hva that wraps": {"hva": -PAGE_SIZE}, "gpa that wraps": {"gpa": -PAGE_SIZE},
        "size of everything": {"size": 1 << 63}, "gpa 0": {"gpa": 0},
        "last number": {"slot": KVM_USER_MEM_SLOTS - 1}, "one more": {"slot": KVM_USER_MEM_SLOTS},
        "65535": {"slot": 0xFFFF}, "space 1": {"slot": 1 << 16 | 1}, "slot -1": {"slot": -1},
        "dirty log": {"flags": KVM_MEM_LOG_DIRTY_PAGES}, "read-only": {"flags": KVM_MEM_READONLY},
        "both": {"flags": KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY},
        "guest_memfd": {"flags": KVM_MEM_GUEST_MEMFD}, "unknown": {"flags": 8},
        "highest": {"flags": 1 << 31},
    })  # fmt: skip


@probe
def the_top_of_the_guests_addresses(bench: Bench) -> Answers:
    """How high a slot may lie, and how large it may be."""
    page = PAGE_SIZE
    return plain(bench, {
        "below 2^38": {"gpa": (1 << 38) - SIZE}, "to 2^39": {"gpa": (1 << 39) - SIZE},
        "across 2^39": {"gpa": (1 << 39) - page}, "at 2^40": {"gpa": 1 << 40},
        "to 2^52": {"gpa": (1 << 52) - SIZE}, "across 2^52": {"gpa": (1 << 52) - page},
        "at 2^62": {"gpa": 1 << 62}, "to 2^64": {"gpa": -SIZE},
        "pages of 31 bits and one": {"gpa": 1 << 32, "size": 1 << 31 + 12, "hva": page},
    })  # fmt: skip


@probe
def a_plain_slot_that_changes(bench: Bench) -> Answers:
    """What may be changed of a slot that is there: place and logging."""
    found = {}
    memory, other = bench.kvm.allocate(2 * SIZE), bench.kvm.allocate(SIZE)

    def set_slot(name: str, **changed: int) -> None:
        good = {"slot": 1, "flags": 0, "gpa": RAM, "size": SIZE, "hva": memory.address}
        data = USERSPACE_MEMORY_REGION.pack(*(good | changed).values())
        found[name] = bench.ask(bench.vm.handle, KVM_SET_USER_MEMORY_REGION, data)

    set_slot("make")
    set_slot("the same again")
    set_slot("smaller", size=SIZE - PAGE_SIZE)
    set_slot("larger", size=2 * SIZE)
    set_slot("other memory", hva=other.address)
    set_slot("next memory", hva=memory.address + PAGE_SIZE)
    set_slot("read-only", flags=KVM_MEM_READONLY)
    set_slot("log", flags=KVM_MEM_LOG_DIRTY_PAGES)
    set_slot("no log")
    set_slot("move", gpa=2 * RAM)
    set_slot("neighbour", slot=2, gpa=RAM)
    set_slot("move onto it", gpa=RAM)
    set_slot("move half onto it", gpa=RAM + SIZE // 2)
    set_slot("move beside it", gpa=RAM + SIZE)
    set_slot("move and log", gpa=3 * RAM, flags=KVM_MEM_LOG_DIRTY_PAGES)
    set_slot("overlap from below", slot=3, gpa=RAM - PAGE_SIZE)
    set_slot("overlap from above", slot=3, gpa=RAM + SIZE - PAGE_SIZE)
    set_slot("around it", slot=3, gpa=RAM - PAGE_SIZE, size=2 * SIZE)
    set_slot("the same memory elsewhere", slot=3, gpa=4 * RAM)
    set_slot("delete with another gpa", gpa=7 * RAM, size=0)
    set_slot("delete again", size=0)
    set_slot("delete, unaligned", slot=2, gpa=1, size=0)
    set_slot("delete, unknown flag", slot=2, size=0, flags=8)
    set_slot("delete", slot=2, size=0, hva=0)
    return found


@probe
def the_log_of_a_slot(bench: Bench) -> Answers:
    """KVM_GET_DIRTY_LOG where nothing is logged."""
    memory = bench.kvm.allocate(SIZE)
    bench.vm.set_user_memory_region(1, RAM, SIZE, memory.address)
    bitmap = bench.edge()
    cases = {
        "no slot": (7, bitmap.start), "not logged": (1, bitmap.start), "no bitmap": (1, 0),
        "too high": (KVM_USER_MEM_SLOTS, bitmap.start), "space 1": (1 << 16 | 1, bitmap.start),
    }  # fmt: skip
    packed = {name: structs.DIRTY_LOG.pack(*words) for name, words in cases.items()}
    return bench.each(bench.vm.handle, requests.KVM_GET_DIRTY_LOG, packed)


# --- files --------------------------------------------------------------------------------------


@probe
def the_shape_of_a_file(bench: Bench) -> Answers:
    """KVM_CREATE_GUEST_MEMFD: sizes of more than 63 bits, flags, words that are reserved."""

    def make(size: int, flags: int = 0, reserved: int = 0) -> str:
        data = bytearray(CREATE_GUEST_MEMFD.pack(size % (1 << 64), flags))
        for at in range(16, 64, 8):
            data[at : at + 8] = (reserved % (1 << 64)).to_bytes(8, "little")
        return bench.ask(bench.vm.handle, KVM_CREATE_GUEST_MEMFD, bytes(data))

    page = PAGE_SIZE
    return {
        "0": make(0), "page": make(page), "page + 1": make(page + 1), "-page": make(-page),
        "16 TiB": make(1 << 44), "16 TiB + page": make((1 << 44) + page),
        "2^62": make(1 << 62), "last": make((1 << 63) - page), "2^63": make(1 << 63),
        "flag 2": make(page, 4), "flag 63": make(page, 1 << 63), "size and flags": make(1, 4),
        "reserved": make(page, 0, -1),
    }  # fmt: skip


@probe
def a_file_in_several_places(bench: Bench) -> Answers:
    """Pads, descriptors beyond 32 bits, the end of the file, slots of size 0."""
    file = bench.vm.create_guest_memfd(SIZE)
    fd = file.handle
    good = {"slot": 1, "flags": KVM_MEM_GUEST_MEMFD, "gpa": RAM, "size": SIZE, "hva": 0,
            "offset": 0, "fd": fd}  # fmt: skip
    found = {}
    cases: dict[str, dict[str, int]] = {
        "good": {}, "last page": {"size": PAGE_SIZE, "offset": SIZE - PAGE_SIZE},
        "page behind": {"size": PAGE_SIZE, "offset": SIZE},
        "offset wraps": {"size": PAGE_SIZE, "offset": -PAGE_SIZE},
        "offset 2^62": {"size": PAGE_SIZE, "offset": 1 << 62},
        "offset 2^63": {"size": PAGE_SIZE, "offset": 1 << 63},
        "larger than the file": {"size": 2 * SIZE}, "no flag": {"flags": 0},
        "no flag, no fd": {"flags": 0, "fd": -1},
        "size 0": {"size": 0}, "fd -1": {"fd": -1}, "fd 12345": {"fd": 12345},
        "fd of nobody, gpa 1": {"fd": -1, "gpa": 1},
        "fd of nobody, size 1": {"fd": -1, "size": 1},
    }  # fmt: skip
    for name, changed in cases.items():
        values = [value % (1 << 64) for value in (good | changed).values()]
        values[-1] %= 1 << 32
        data = bytearray(USERSPACE_MEMORY_REGION2.pack(*values))
        found[name] = bench.ask(bench.vm.handle, KVM_SET_USER_MEMORY_REGION2, bytes(data))
        if found[name] == "0":
            bench.vm.set_user_memory_region(1, RAM, 0, 0)
    data = bytearray(USERSPACE_MEMORY_REGION2.pack(*good.values()))
    data[44:] = b"\xff" * (len(data) - 44)
    found["pads"] = bench.ask(bench.vm.handle, KVM_SET_USER_MEMORY_REGION2, bytes(data))
    found["first ioctl, no flag, on it"] = bench.ask(
        bench.vm.handle, KVM_SET_USER_MEMORY_REGION,
        USERSPACE_MEMORY_REGION.pack(1, 0, RAM, SIZE, 0),
    )  # fmt: skip
    return found


# --- the end ------------------------------------------------------------------------------------


@probe
def closing_in_every_order(bench: Bench) -> Answers:
    """/dev/kvm, VM, vCPU and file: what is still open works."""
    found: dict[str, set[str]] = {}
    for order in itertools.permutations(("kvm", "vm", "vcpu", "file")):
        transport = bench.kvm.transport
        again = (
            Simulation(transport._directory) if isinstance(transport, Simulation) else "/dev/kvm"
        )
        with Kvm(again) as kvm:
            for name, answers in _closing(Bench(bench.target, kvm, bench.stack), order).items():
                found.setdefault(name, set()).update(answers)
    return {name: " ".join(sorted(answers)) for name, answers in found.items()}


def _closing(bench: Bench, order: tuple[str, ...]) -> dict[str, set[str]]:
    """Close in this order; what each of the others answers after every step."""
    vm, vcpu = bench.vm, bench.vcpu
    file = vm.create_guest_memfd(SIZE)
    asked: dict[str, tuple[int, int, int | bytes]] = {
        "kvm": (bench.kvm.handle, KVM_GET_API_VERSION, 0),
        "vm": (vm.handle, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS),
        "vcpu": (vcpu.handle, requests.KVM_GET_REGS, bytes(structs.REGS.size)),
    }
    found: dict[str, set[str]] = {}
    for gone in order:
        if gone == "file":
            file.close()
        else:
            bench.kvm.transport.close_handle(asked.pop(gone)[0])
        for name, call in asked.items():
            found.setdefault(name, set()).add(bench.ask(*call))
        if file.handle >= 0:
            answers = {fallocate(file.fileno(), mode, 0, SIZE) for mode in (KEEP, PUNCH)}
            found.setdefault("file", set()).update(answers)
    vm.handle = vcpu.handle = -1  # closed above, behind their backs
    return found


@probe
def a_file_whose_vm_is_gone(bench: Bench) -> Answers:
    """It can be allocated and punched, and belongs to no other VM."""
    vm = bench.kvm.create_vm()
    file = vm.create_guest_memfd(SIZE)
    vm.set_user_memory_region2(1, RAM, SIZE, 0, KVM_MEM_GUEST_MEMFD, guest_memfd=file.handle)
    vm.close()
    data = USERSPACE_MEMORY_REGION2.pack(1, KVM_MEM_GUEST_MEMFD, RAM, SIZE, 0, 0, file.handle)
    return {
        "allocate": fallocate(file.fileno(), KEEP, 0, SIZE),
        "size": str(os.fstat(file.fileno()).st_size),
        "punch": fallocate(file.fileno(), PUNCH, 0, SIZE),
        "to another VM": bench.ask(bench.vm.handle, KVM_SET_USER_MEMORY_REGION2, data),
    }


@probe
def mappings_of_descriptors(bench: Bench) -> Answers:
    """kvm_run is mapped whole or in part; nothing else of KVM is mapped at all."""
    size = int(bench.ask(bench.kvm.handle, KVM_GET_VCPU_MMAP_SIZE))
    vcpu, prot = bench.vcpu.handle, mmap.PROT_READ | mmap.PROT_WRITE
    shared = mmap.MAP_SHARED
    file = bench.vm.create_guest_memfd(SIZE)
    return {
        "size": str(size),
        "all": try_mmap(vcpu, size, prot, shared),
        "a page": try_mmap(vcpu, PAGE_SIZE, prot, shared),
        "more than there is": try_mmap(vcpu, 4 * size, prot, shared),
        "to be read": try_mmap(vcpu, size, mmap.PROT_READ, shared),
        "private": try_mmap(vcpu, size, prot, mmap.MAP_PRIVATE),
        "nothing": try_mmap(vcpu, 0, prot, shared),
        "the file": try_mmap(file.fileno(), SIZE, prot, shared),
        "/dev/kvm": try_mmap(bench.kvm.handle, PAGE_SIZE, prot, shared),
        "the VM": try_mmap(bench.vm.handle, PAGE_SIZE, prot, shared),
    }
