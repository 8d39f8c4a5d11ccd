# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM_CREATE_GUEST_MEMFD and KVM_SET_USER_MEMORY_REGION2 may be asked, case by case."""

from __future__ import annotations

import os

from kvm.world import RAM, SIZE, Answers, World, answer

from kvmsim.uapi import (
    CREATE_GUEST_MEMFD,
    KVM_CREATE_GUEST_MEMFD,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_USER_MEM_SLOTS,
    PAGE_SIZE,
)


def what_a_file_may_be(world: World) -> Answers:
    sizes = [0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, -PAGE_SIZE, 1 << 40, (1 << 63) - 1]
    found = {
        f"size {size:#x}": answer(lambda size=size: world.vm.create_guest_memfd(size, world.shared))
        for size in sizes
    }
    for flags in (*range(5), 1 << 31, 1 << 63):
        found[f"flags {flags:#x}"] = answer(
            lambda flags=flags: world.vm.create_guest_memfd(SIZE, flags)
        )
    argument = bytearray(CREATE_GUEST_MEMFD.pack(SIZE, 0))
    argument[16:] = b"\xff" * 48
    make = KVM_CREATE_GUEST_MEMFD
    transport = world.kvm.transport
    found["reserved words"] = answer(lambda: transport.ioctl(world.vm.handle, make, argument))
    found["of the system"] = answer(lambda: transport.ioctl(world.kvm.handle, make, argument))
    found["bad pointer"] = answer(lambda: transport.ioctl(world.vm.handle, make, 16))
    return found


def what_a_slot_may_be(world: World) -> Answers:
    file, other = world.file(), world.file()
    mine = {
        "slot": 1, "gpa": RAM, "size": SIZE, "userspace_addr": 0, "flags": KVM_MEM_GUEST_MEMFD,
        "guest_memfd": file.handle,
    }  # fmt: skip
    stranger = world.kvm.create_vm(world.vm.type).create_guest_memfd(SIZE, world.shared)
    plain = os.memfd_create("plain")

    def bind(**changed: int) -> str:
        code = answer(lambda: world.vm.set_user_memory_region2(**mine | changed))
        if code == "0" and changed.get("size", 1):
            # Undone with the fd that is bound: the next case starts like this one.
            delete = mine | changed | {"size": 0}
            world.vm.set_user_memory_region2(**delete)
        return code

    dirty, readonly = KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
    cases: dict[str, dict[str, int]] = {
        "as it should be": {},
        "part of the file": {"guest_memfd_offset": PAGE_SIZE, "size": SIZE - PAGE_SIZE},
        "no fd": {"guest_memfd": -1},
        "a memfd": {"guest_memfd": plain},
        "the VM's fd": {"guest_memfd": world.vm.handle},
        "another VM's": {"guest_memfd": stranger.handle},
        "past the end of the file": {"guest_memfd_offset": PAGE_SIZE},
        "unaligned offset": {"guest_memfd_offset": 1, "size": PAGE_SIZE},
        "negative offset": {"guest_memfd_offset": -PAGE_SIZE},
        "unaligned size": {"size": PAGE_SIZE + 1},
        "unaligned gpa": {"gpa": RAM + 1},
        "gpa that wraps": {"gpa": -PAGE_SIZE},
        "unaligned hva": {"userspace_addr": 1},
        "hva of the kernel": {"userspace_addr": 1 << 63},
        "last slot": {"slot": KVM_USER_MEM_SLOTS - 1},
        "one slot more": {"slot": KVM_USER_MEM_SLOTS},
        "another address space": {"slot": 1 << 16 | 1},
        "dirty log": {"flags": KVM_MEM_GUEST_MEMFD | dirty},
        "read-only": {"flags": KVM_MEM_GUEST_MEMFD | readonly},
        "unknown flag": {"flags": KVM_MEM_GUEST_MEMFD | 1 << 3},
        "delete what is not": {"size": 0},
    }
    found = {name: bind(**changed) for name, changed in cases.items()}
    os.close(plain)
    found["through the first ioctl"] = answer(
        lambda: world.vm.set_user_memory_region(1, RAM, SIZE, 0, KVM_MEM_GUEST_MEMFD)
    )
    world.vm.set_user_memory_region2(**mine)
    for name, changed in {
        "the same again": {},
        "move": {"gpa": RAM + SIZE},
        "smaller": {"size": PAGE_SIZE},
        "another file": {"guest_memfd": other.handle},
        "to a plain one": {"flags": 0, "guest_memfd": 0},
        "overlap": {"slot": 2, "guest_memfd": other.handle},
        "overlap, and past the end": {"slot": 2, "guest_memfd": other.handle,
                                          "guest_memfd_offset": PAGE_SIZE},
        "file range twice": {"slot": 2, "gpa": RAM + SIZE},
    }.items():  # fmt: skip
        found[name] = answer(lambda changed=changed: world.vm.set_user_memory_region2(
            **mine | changed))  # fmt: skip
    found["delete through the first ioctl"] = answer(
        lambda: world.vm.set_user_memory_region(1, RAM, 0, 0, 0)
    )
    return found
