# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks by programs on the host: the private file, and the VMM's own addresses."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from typing import Final

from kvmsim.attack.guest import SECRET, value_of
from kvmsim.attack.lab import VICTIM_SIZE, Lab
from kvmsim.attack.outcome import NONE, Layer, Outcome, concealed, refused, succeeds
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import KVM_MEM_GUEST_MEMFD, PAGE_SHIFT, PAGE_SIZE, KvmError

_SECRET: Final = SECRET.to_bytes(8, "little")
_SPARE_SLOT: Final = 100


def read_file(lab: Lab) -> Outcome:
    """read(2), as cat does."""
    return _with_file(lab, os.O_RDONLY, lambda fd: os.pread(fd, 8, lab.offset))


def write_file(lab: Lab) -> Outcome:
    """write(2)."""
    return _with_file(lab, os.O_RDWR, lambda fd: os.pwrite(fd, _SECRET, lab.offset))


def map_file(lab: Lab) -> Outcome:
    """mmap(2), shared and private."""

    def both(fd: int) -> None:
        try:
            mmap.mmap(fd, PAGE_SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ).close()
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            mmap.mmap(fd, PAGE_SIZE, mmap.MAP_SHARED).close()

    return _with_file(lab, os.O_RDWR, both)


def _with_file(lab: Lab, flags: int, deed: Callable[[int], object]) -> Outcome:
    if lab.technology is None:
        return NONE
    lab.guest()
    fd = os.open(lab.path("victim"), flags | os.O_CLOEXEC)
    try:
        deed(fd)
    except OSError as error:
        return refused(Layer.MOUNT, _code(error))
    finally:
        os.close(fd)
    return succeeds("the file is open to programs")


def read_hva(lab: Lab) -> Outcome:
    """The VMM's own memory for that gpa: userspace_addr, where emulated devices look."""
    if lab.technology is None:
        return lab.kernel().read(0)
    guest, gpa = lab.guest(), lab.gpa
    try:
        found = guest.in_runner(lambda: guest.memory.read_shared(gpa, 8))
    except KvmError as error:
        return refused(Layer.KVM, _code(error))
    return (
        succeeds("the guest's bytes") if found == _SECRET else concealed(Layer.KVM, "other memory")
    )


def bind_twice(lab: Lab) -> Outcome:
    """Another memslot of the same VM over the same pages of the file."""
    if lab.technology is None:
        return NONE
    guest = lab.guest()
    gpa = lab.victim_gpa + VICTIM_SIZE
    try:
        with guest.running.lock:
            slot = guest.running.vm.mmu.slots.find(lab.gpa >> PAGE_SHIFT)
            assert slot is not None
            assert slot.file is not None
            guest.running.vm.set_user_memory_region2(
                Region(_SPARE_SLOT, KVM_MEM_GUEST_MEMFD, gpa, VICTIM_SIZE),
                shared=guest.shared,
                file=PrivateFile(slot.file, VICTIM_SIZE // PAGE_SIZE),
            )
    except KvmError as error:
        return refused(Layer.KVM, _code(error))
    seen = value_of(guest.must(f"peek {gpa + lab.offset:#x}"))
    return succeeds("the page at both gpas" if seen == SECRET else "a second binding")


def bind_other(lab: Lab) -> Outcome:
    """The file as RAM of another VM."""
    if lab.technology is None:
        return NONE
    lab.guest()
    try:
        with lab.beside("ram-", "victim") as rival:
            seen = value_of(rival.must(f"peek {lab.gpa:#x}"))
    except OSError as error:
        return refused(Layer.KVM, _code(error))
    return succeeds("the guest's bytes") if seen == SECRET else concealed(Layer.KVM, f"{seen:#x}")


def _code(error: OSError | KvmError) -> str:
    return errno.errorcode[error.errno or errno.EIO]
