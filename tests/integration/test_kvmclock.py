# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's clock page, written through a gfn_to_pfn cache that obeys every invalidation."""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Iterator

import pytest
from device_program import HEAP, HIGH, PAGE, TEXT, Program
from test_device_inplace import DONE, convert, mounted, pin, with_file
from test_device_private import SWAP, fallocate, swap

from kvmsim.pvclock import (
    MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_WALL_CLOCK_NEW,
    PVCLOCK_GUEST_STOPPED,
    TIME_INFO,
    WALL_CLOCK,
    Scale,
)
from kvmsim.uapi import (
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CHECK_EXTENSION,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_X86_SW_PROTECTED_VM,
    requests,
    structs,
)
from kvmsim.uapi.capabilities import KVM_CAP_KVMCLOCK_CTRL

pytestmark = pytest.mark.fuse
__all__ = ["mounted"]

PAGE_AT = HEAP + 0x80
# 1: mov rax, [rdi]; mov [rdi], rsi; … of SWAP, but first: wrmsr (ecx, edx:eax as they are)
WRMSR = bytes.fromhex("0f30") + bytes.fromhex("e404")  # wrmsr; in al, 4


@pytest.fixture
def program() -> Iterator[Program]:
    with Program() as made:
        made.boot(SWAP, WRMSR)
        yield made


def set_msr(program: Program, index: int, value: int) -> None:
    data = structs.MSRS.pack(1) + structs.MSR_ENTRY.pack(index, value)
    assert program.put(program.vcpus[0], requests.KVM_SET_MSRS, data) == 1


def run(program: Program) -> None:
    """Enter the guest once."""
    swap(program, HEAP + 0x800, 0)


def page(program: Program, at: int = PAGE_AT) -> tuple[int, ...]:
    assert program.ram is not None
    fields: tuple[int, ...] = TIME_INFO.unpack(program.ram.read(at, TIME_INFO.size))
    return fields


def now(program: Program, fields: tuple[int, ...]) -> int:
    """The system time that a guest reads from its page."""
    _, _, tsc, system, mul, shift, _ = fields
    device = program.process.caller.objects[program.vm]
    passed = device.clock.tsc() - tsc  # type: ignore[attr-defined]
    return system + Scale(mul, shift).nanoseconds(passed)


def clock(program: Program) -> int:
    data = program.get(program.vm, requests.KVM_GET_CLOCK, structs.CLOCK_DATA.size)
    return int(structs.CLOCK_DATA.unpack(data)[0])


def test_a_guest_reads_the_clock_that_kvm_tells(program: Program) -> None:
    set_msr(program, MSR_KVM_SYSTEM_TIME_NEW, PAGE_AT | 1)
    assert page(program)[0] == 0, "nothing before the guest runs"
    run(program)
    fields = page(program)
    assert (fields[0], fields[1], fields[6]) == (2, 0, 1)
    before = clock(program)
    read = now(program, fields)
    after = clock(program)
    slack = (after - fields[3]) // 500 + 1_000_000  # the measured frequency's error
    assert before - slack <= read <= after + slack


def test_the_guest_itself_asks_for_it(program: Program) -> None:
    vcpu = program.vcpus[1]
    program.set_regs(
        vcpu, rip=TEXT + PAGE, rcx=MSR_KVM_SYSTEM_TIME_NEW, rax=PAGE_AT | 1, rdx=0, rdi=7
    )  # fmt: skip
    assert program.ucall(vcpu) == 7
    assert page(program)[0] == 2


def test_setting_the_clock_writes_the_page_again(program: Program) -> None:
    set_msr(program, MSR_KVM_SYSTEM_TIME_NEW, PAGE_AT | 1)
    run(program)
    run(program)
    assert page(program)[0] == 2, "not without a reason"
    program.ioctl(program.vm, requests.KVM_SET_CLOCK, structs.CLOCK_DATA, 1 << 50, 0, 0, 0)
    run(program)
    fields = page(program)
    assert fields[0] == 4
    assert fields[3] >= 1 << 50
    set_msr(program, MSR_KVM_SYSTEM_TIME_NEW, 0)
    program.ioctl(program.vm, requests.KVM_SET_CLOCK, structs.CLOCK_DATA, 0, 0, 0, 0)
    run(program)
    assert page(program) == fields, "it was given up"


def test_a_pause_is_told_to_the_guest(program: Program) -> None:
    assert program.ioctl(program.kvm, KVM_CHECK_EXTENSION, None, KVM_CAP_KVMCLOCK_CTRL) == 1
    with pytest.raises(OSError, match="no kvmclock") as caught:
        program.ioctl(program.vcpus[0], requests.KVM_KVMCLOCK_CTRL)
    assert caught.value.errno == errno.EINVAL
    set_msr(program, MSR_KVM_SYSTEM_TIME_NEW, PAGE_AT | 1)
    program.ioctl(program.vcpus[0], requests.KVM_KVMCLOCK_CTRL)
    run(program)
    assert page(program)[6] & PVCLOCK_GUEST_STOPPED


def test_the_wall_clock_is_written_once(program: Program) -> None:
    assert program.ram is not None
    set_msr(program, MSR_KVM_WALL_CLOCK_NEW, HEAP + 0x40)
    run(program)
    version, seconds, rest = WALL_CLOCK.unpack(program.ram.read(HEAP + 0x40, WALL_CLOCK.size))
    assert version == 2
    boot = seconds * 1_000_000_000 + rest
    assert abs(boot + clock(program) - time.time_ns()) < 60_000_000_000


def test_a_page_that_cannot_be_is_none(program: Program) -> None:
    """Across two pages, or where no memory is: the guest goes on without a clock."""
    for gpa in (HEAP + PAGE - 8, 1 << 38):
        set_msr(program, MSR_KVM_SYSTEM_TIME_NEW, gpa | 1)
        run(program)


def test_what_is_written_is_logged(program: Program) -> None:
    ram = program.process.ranges.allocate(2 * PAGE)
    program.slot(5, HIGH, 2 * PAGE, ram.address, flags=KVM_MEM_LOG_DIRTY_PAGES)
    assert swap(program, HIGH, 0) == 0  # the caller's memory behind it is found by a touch
    assert swap(program, HIGH + PAGE, 0) == 0
    bitmap = program.process.ranges.allocate(PAGE)

    def dirty() -> int:
        program.ioctl(
            program.vm, requests.KVM_GET_DIRTY_LOG, structs.DIRTY_LOG, 5, bitmap.address
        )  # fmt: skip
        return int(struct.unpack("<Q", bitmap.read(0, 8))[0])

    dirty()
    set_msr(program, MSR_KVM_SYSTEM_TIME_NEW, HIGH + PAGE | 1)
    run(program)
    assert dirty() == 2


def test_a_page_of_a_file_that_converts(mounted: object) -> None:
    """Private: never written, though the cache knew it. Shared again, and punched: anew."""
    with Program(mounted.path, type=KVM_X86_SW_PROTECTED_VM, in_place=True) as program:  # type: ignore[attr-defined]
        program.boot(SWAP)
        gmem = with_file(program)
        set_msr(program, MSR_KVM_SYSTEM_TIME_NEW, HIGH + PAGE | 1)

        def set_clock() -> None:
            program.ioctl(program.vm, requests.KVM_SET_CLOCK, structs.CLOCK_DATA, 0, 0, 0, 0)
            run(program)

        def version() -> int:
            with pin(program, gmem, 1) as held:
                return int(TIME_INFO.unpack(held.read(PAGE, TIME_INFO.size))[0])

        set_clock()
        assert version() == 2
        assert convert(program, gmem, 1, 1, private=True) == DONE
        before = swap(program, HIGH + PAGE, 0x77)
        assert before & 0xFFFF_FFFF == 2
        set_clock()
        assert swap(program, HIGH + PAGE, before) == 0x77, "nobody writes what is private"
        assert convert(program, gmem, 1, 1, private=False) == DONE
        set_clock()
        assert version() == 4
        fallocate(gmem, 3, PAGE, PAGE)
        set_clock()
        assert version() == 2, "a fresh page"


def test_a_page_of_a_private_file_is_refused(mounted: object) -> None:
    with Program(mounted.path, type=KVM_X86_SW_PROTECTED_VM, in_place=True) as program:  # type: ignore[attr-defined]
        program.boot(SWAP)
        with_file(program, GUEST_MEMFD_FLAG_MMAP)
        set_msr(program, MSR_KVM_SYSTEM_TIME_NEW, HIGH | 1)
        run(program)
        assert swap(program, HIGH, 0) == 0
