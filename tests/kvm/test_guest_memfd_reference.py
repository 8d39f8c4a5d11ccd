# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own guest_memfd: the answers that the suite takes for granted, asked again.

virt/kvm/guest_memfd.c and virt/kvm/kvm_main.c of Linux 6.18; selftests guest_memfd_test.c and
set_memory_region_test.c ask some of the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
from collections.abc import Callable, Iterator

import pytest
from conformance.runs import outcome, outcomes

from privfs.testing.conformance import ROWS, SKIPPED, GuestMemfd
from privfs.testing.conformance.syscalls import Nr, call

pytestmark = pytest.mark.kvm

PAGE = 4096
SIZE = 16 * PAGE
KEEP, PUNCH = 1, 3
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_USER_MEMORY_REGION2 = 0x40A0AE49
GUEST_MEMFD, LOG_DIRTY, READONLY = 4, 1, 2


# --- every row ----------------------------------------------------------------------------------


def wanted(flags: int) -> dict[str, str]:
    column = f"gm{flags}"
    return {row.name: row.want[column] for row in ROWS if column in row.want}


@pytest.mark.parametrize(
    ("row", "answer"), [pytest.param(row, answer, id=row) for row, answer in wanted(0).items()]
)
def test_flags_0(row: str, answer: str) -> None:
    """What the personality ``guest_memfd`` is held to."""
    assert outcome("guest_memfd:0", row) == answer


@pytest.mark.parametrize("flags", [1, 3])
def test_flags_that_allow_mappings(flags: int) -> None:
    found = outcomes(f"guest_memfd:{flags}")
    assert set(found) == set(wanted(flags))
    different = {
        name: f"{answer} instead of {wanted(flags)[name]}"
        for name, answer in found.items()
        if answer != wanted(flags)[name] and not answer.startswith(SKIPPED)
    }
    assert different == {}


# --- creation -----------------------------------------------------------------------------------


class Machine:
    """A VM and what is created in it; errors come as errno names."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.maker = GuestMemfd(0)
        if missing := self.maker.why_not():
            pytest.skip(missing)
        stack.callback(self.maker.close)
        self._stack = stack

    @property
    def vm(self) -> int:
        return self.maker._open()

    def gmem(self, size: int = SIZE, flags: int = 0) -> int:
        fd = self.maker.create(size, flags)
        self._stack.callback(_close, fd)
        return fd

    def with_flags(self, flags: int) -> int:
        if missing := GuestMemfd(flags).why_not():
            pytest.skip(missing)
        return self.gmem(flags=flags)

    def bind(self, fd: int, *, slot: int = 0, flags: int = GUEST_MEMFD, gpa: int = 0,
             size: int = SIZE, offset: int = 0, hva: int = 0, pad: int = 0) -> None:  # fmt: skip
        """KVM_SET_USER_MEMORY_REGION2."""
        region = struct.pack(
            "=IIQQQQiI14Q", slot, flags, gpa, size, hva, offset & (1 << 64) - 1, fd, pad,
            *[pad] * 14,
        )  # fmt: skip
        fcntl.ioctl(self.vm, KVM_SET_USER_MEMORY_REGION2, region)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


@pytest.fixture
def machine() -> Iterator[Machine]:
    with contextlib.ExitStack() as stack:
        yield Machine(stack)


def answer(what: Callable[[], object]) -> str:
    """Return "0" or the name of the errno."""
    try:
        what()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "0"


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "EINVAL"), (-PAGE, "EINVAL"), (1, "EINVAL"), (PAGE - 1, "EINVAL"), (PAGE + 1, "EINVAL"),
     (PAGE, "0"), (1 << 40, "0"), ((1 << 63) - PAGE, "0"), ((1 << 63) - 1, "EINVAL")],
)  # fmt: skip
def test_a_size_is_some_whole_pages(machine: Machine, size: int, expected: str) -> None:
    assert answer(lambda: machine.gmem(size)) == expected


def test_flags_are_those_of_the_capability(machine: Machine) -> None:
    offered = fcntl.ioctl(machine.vm, 0xAE03, 244)
    for bit in range(64):
        expected = "0" if 1 << bit & offered else "EINVAL"
        assert answer(lambda bit=bit: machine.gmem(flags=1 << bit)) == expected, bit


def test_reserved_words_are_not_looked_at(machine: Machine) -> None:
    argument = bytearray(struct.pack("=QQ6Q", SIZE, 0, *[7] * 6))
    os.close(fcntl.ioctl(machine.vm, 0xC040AED4, argument))


def test_only_a_vm_creates(machine: Machine) -> None:
    with open("/dev/kvm", "rb+", buffering=0) as device:
        argument = bytearray(64)
        assert answer(lambda: fcntl.ioctl(device, 0xC040AED4, argument)) == "EINVAL"
    assert answer(lambda: call(Nr.IOCTL, machine.vm, 0xC040AED4, 16)) == "EFAULT"


def test_two_files_have_sizes_and_inodes_of_their_own(machine: Machine) -> None:
    first, second = os.fstat(machine.gmem(PAGE)), os.fstat(machine.gmem(2 * PAGE))
    assert (first.st_size, second.st_size) == (PAGE, 2 * PAGE)
    assert first.st_ino != second.st_ino


# --- binding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "0"),
        ({"pad": 1}, "0"),
        ({"offset": PAGE, "size": SIZE - PAGE}, "0"),
        ({"offset": PAGE}, "EINVAL"),  # past the end of the file
        ({"offset": 1, "size": PAGE}, "EINVAL"),
        ({"offset": -PAGE}, "EINVAL"),
        ({"size": PAGE + 1}, "EINVAL"),
        ({"gpa": 1}, "EINVAL"),
        ({"gpa": (1 << 64) - PAGE}, "EINVAL"),  # wraps
        ({"hva": 1}, "EINVAL"),
        ({"hva": 1 << 63}, "EINVAL"),  # not canonical
        ({"slot": 32764}, "EINVAL"),
        ({"slot": 1 << 16}, "EINVAL"),  # another address space
        ({"flags": GUEST_MEMFD | LOG_DIRTY}, "EINVAL"),
        ({"flags": GUEST_MEMFD | READONLY}, "EINVAL"),
        ({"flags": GUEST_MEMFD | 1 << 3}, "EINVAL"),
        ({"size": 0}, "EINVAL"),  # deletes what is not there
    ],
    ids=lambda value: str(value),
)
def test_what_a_slot_may_ask(machine: Machine, changed: dict[str, int], expected: str) -> None:
    assert answer(lambda: machine.bind(machine.gmem(), **changed)) == expected


def test_only_a_guest_memfd_of_this_vm_is_bound(machine: Machine) -> None:
    with contextlib.ExitStack() as stack:
        stranger = Machine(stack).gmem()
        plain = os.memfd_create("plain")
        stack.callback(os.close, plain)
        assert answer(lambda: machine.bind(-1)) == "EBADF"
        for fd in (plain, machine.vm, stranger):
            assert answer(lambda fd=fd: machine.bind(fd)) == "EINVAL"


def test_neither_addresses_nor_file_ranges_are_bound_twice(machine: Machine) -> None:
    fd = machine.gmem()
    machine.bind(fd, slot=0, size=8 * PAGE)
    assert answer(lambda: machine.bind(fd, slot=1, gpa=7 * PAGE, size=PAGE)) == "EEXIST"
    # The guest's addresses are looked at before the file's pages.
    assert answer(lambda: machine.bind(machine.gmem(), slot=1, gpa=PAGE)) == "EEXIST"
    assert answer(lambda: machine.bind(fd, slot=1, gpa=SIZE, size=8 * PAGE)) == "EINVAL"
    machine.bind(fd, slot=1, gpa=SIZE, size=8 * PAGE, offset=8 * PAGE)


def test_a_slot_is_deleted_but_never_changed(machine: Machine) -> None:
    fd = machine.gmem()
    machine.bind(fd)
    assert answer(lambda: machine.bind(fd)) == "EINVAL"
    assert answer(lambda: machine.bind(fd, gpa=SIZE)) == "EINVAL"
    assert answer(lambda: machine.bind(fd, flags=0, hva=1 << 30)) == "EINVAL"
    machine.bind(fd, size=0)
    assert answer(lambda: machine.bind(fd, size=0)) == "EINVAL"
    machine.bind(fd, gpa=SIZE)
    old = struct.pack("=IIQQQ", 0, 0, SIZE, 0, 0)
    fcntl.ioctl(machine.vm, KVM_SET_USER_MEMORY_REGION, old)  # the first version deletes too
    plain = struct.pack("=IIQQQ", 0, GUEST_MEMFD, 0, SIZE, 0)
    assert answer(lambda: fcntl.ioctl(machine.vm, KVM_SET_USER_MEMORY_REGION, plain)) == "EINVAL"


# --- life ---------------------------------------------------------------------------------------


def test_a_file_outlives_its_vm(machine: Machine) -> None:
    fd = machine.gmem()
    machine.bind(fd)
    machine.maker.close()
    call(Nr.FALLOCATE, fd, KEEP, 0, SIZE)
    call(Nr.FALLOCATE, fd, PUNCH, 0, SIZE)


def test_bytes_survive_slots_and_die_by_a_punch_of_another_process(machine: Machine) -> None:
    fd = machine.with_flags(3)
    with mmap.mmap(fd, SIZE) as memory:
        memory[0] = memory[PAGE] = 0x5A
        machine.bind(fd)
        machine.bind(fd, size=0)
        machine.bind(fd, gpa=SIZE)
        assert (memory[0], memory[PAGE]) == (0x5A, 0x5A)
        assert _in_child(lambda: call(Nr.FALLOCATE, fd, PUNCH, 0, PAGE)) == "0"
        assert (memory[0], memory[PAGE]) == (0, 0x5A)


def test_a_child_may_punch_but_not_use_the_vm(machine: Machine) -> None:
    fd, spare = machine.gmem(), machine.gmem()
    machine.bind(fd)
    assert _in_child(lambda: call(Nr.FALLOCATE, fd, PUNCH, 0, SIZE)) == "0"
    assert _in_child(lambda: machine.bind(spare, slot=1, gpa=SIZE)) == "EIO"
    assert _in_child(lambda: machine.gmem()) == "EIO"


def _in_child(what: Callable[[], object]) -> str:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(theirs, answer(what).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(theirs)
    with open(ours) as said:
        return said.read()


def test_an_allocation_ends_with_a_signal_and_a_retry_goes_on(machine: Machine) -> None:
    """EINTR leaves what was allocated; a punch is not interruptible (kvm_gmem_allocate)."""
    gib = 1 << 30
    fd = machine.gmem(gib)
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
        assert answer(lambda: _raw_fallocate(fd, KEEP, gib)) == "EINTR"
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert answer(lambda: _raw_fallocate(fd, KEEP, gib)) == "0"
        signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
        assert answer(lambda: _raw_fallocate(fd, PUNCH, gib)) == "0"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _raw_fallocate(fd: int, mode: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_long(value) for value in (int(Nr.FALLOCATE), fd, mode, 0, length))
    if libc.syscall(*arguments):
        raise OSError(ctypes.get_errno(), "fallocate")
