# SPDX-License-Identifier: GPL-2.0-or-later
"""Conversion in place through the simulated device: the ioctl of a guest_memfd, and both sides."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator

import pytest
from actors import until
from device_program import HIGH, PAGE, PLAIN, TEXT, Program
from mounts import Mounted, Mounter, for_many
from test_device_private import SWAP, fallocate, swap

from kvmsim import exits
from kvmsim.device.gmemfile import GmemFile
from kvmsim.device.results import Failure
from kvmsim.hostpages import HostPin
from kvmsim.inplace import Attributes2
from kvmsim.kind import SHARED_BIT
from kvmsim.uapi import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CAP_GUEST_MEMFD_FLAGS,
    KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES,
    KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CHECK_EXTENSION,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    KVM_SET_MEMORY_ATTRIBUTES2_ZERO,
    KVM_X86_SW_PROTECTED_VM,
    KVMSIM_SHARED_BIT_VM,
    MEMORY_ATTRIBUTES2,
    KvmError,
    requests,
)

pytest_plugins = ["actor_fixtures"]
pytestmark = pytest.mark.fuse

NPAGES = 16
SIZE = NPAGES * PAGE
PRIVATE = KVM_MEMORY_ATTRIBUTE_PRIVATE
PRESERVE, ZERO = KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE, KVM_SET_MEMORY_ATTRIBUTES2_ZERO
MAPPABLE = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
KEEP_AND_PUNCH = 3

# 1: inc qword [rdi]; jmp 1b
COUNT = bytes.fromhex("48ff07ebfb")

Boot = Callable[..., Program]


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """One mount for all; every test leaves it empty."""
    place = tmp_path_factory.mktemp("inplace")
    with for_many(place, "personality=guest_memfd", "t_ack=300") as made:
        yield made


@pytest.fixture
def boot(mounted: Mounted) -> Iterator[Boot]:
    with contextlib.ExitStack() as stack:

        def start(*codes: bytes, in_place: bool = True, **named: int) -> Program:
            named = {"type": KVM_X86_SW_PROTECTED_VM, **named}
            bits = named.pop("gpa_bits", 0)
            made = stack.enter_context(Program(mounted.path, in_place=in_place, **named))  # type: ignore[arg-type]
            made.boot(*codes, gpa_bits=bits)
            return made

        yield start


def with_file(program: Program, flags: int = MAPPABLE) -> int:
    """A file over a slot of NPAGES at HIGH."""
    gmem = program.guest_memfd(SIZE, flags)
    program.slot(1, HIGH, SIZE, 0, gmem=gmem)
    return gmem


def convert(
    program: Program, gmem: int, page: int, npages: int, *, private: bool, flags: int = PRESERVE
) -> tuple[int, int]:
    """KVM_SET_MEMORY_ATTRIBUTES2: errno (0: none) and error_offset as they came back."""
    asked = Attributes2(page * PAGE, npages * PAGE, PRIVATE * private, flags)
    return ask(program, gmem, asked.to_bytes(error_offset=0x1234))


def ask(program: Program, gmem: int, data: bytes) -> tuple[int, int]:
    space = ctypes.create_string_buffer(data, len(data))
    number = 0
    try:
        program.process.ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, space)
    except OSError as error:
        number = error.errno or -1
    return number, MEMORY_ATTRIBUTES2.unpack(space.raw)[4]


def pin(program: Program, gmem: int, page: int, npages: int = 1) -> HostPin:
    file = program.process.private_file(gmem)
    assert isinstance(file, GmemFile)
    return file.pin(page * PAGE, npages * PAGE)


def host_word(program: Program, gmem: int, page: int) -> int:
    with pin(program, gmem, page) as held:
        return int.from_bytes(held.read(page * PAGE, 8), "little")


def used(mounted: Mounted) -> int:
    found: int = mounted.ask("status")["memory"]["used"]
    return found


DONE = (0, 0x1234)  # error_offset is written where the ioctl fails alone


# --- where it is --------------------------------------------------------------------------------


def test_files_or_the_vm_keep_the_types(boot: Boot) -> None:
    """Either KVM_SET_MEMORY_ATTRIBUTES or the file's ioctl, never both."""
    caps = (
        KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES, KVM_CAP_GUEST_MEMFD_FLAGS
    )  # fmt: skip
    program = boot()
    for fd in (program.kvm, program.vm):
        found = [program.ioctl(fd, KVM_CHECK_EXTENSION, None, cap) for cap in caps]
        assert found == [0, PRIVATE, MAPPABLE]
    with pytest.raises(OSError, match="keep the types") as caught:
        program.attributes(HIGH, SIZE, PRIVATE)
    assert caught.value.errno == errno.ENOTTY

    program = boot(in_place=False)
    assert [program.ioctl(program.vm, KVM_CHECK_EXTENSION, None, cap) for cap in caps][:2] == [
        PRIVATE, 0,
    ]  # fmt: skip
    gmem = program.guest_memfd(SIZE)
    assert convert(program, gmem, 0, 1, private=True) == (errno.ENOTTY, 0x1234)
    program.attributes(HIGH, SIZE, PRIVATE)


def test_the_interface_of_the_2022_series_has_none(mounted: Mounted) -> None:
    with pytest.raises(ValueError, match="v7 has no conversion in place"):
        Program(mounted.path, abi="v7", in_place=True)


@pytest.mark.logs("on a (guest_memfd|VM) descriptor is not simulated")
def test_other_requests_and_other_descriptors(boot: Boot) -> None:
    program = boot()
    gmem = program.guest_memfd(SIZE, MAPPABLE)
    with pytest.raises(OSError, match="no request of this level") as caught:
        program.ioctl(gmem, requests.KVM_GET_CLOCK)
    assert caught.value.errno == errno.ENOTTY
    with pytest.raises(OSError, match="no request of this level") as caught:
        program.ioctl(program.vm, KVM_SET_MEMORY_ATTRIBUTES2)
    assert caught.value.errno == errno.ENOTTY
    with pytest.raises(OSError, match="cannot be reached") as caught:
        program.process.ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, 8)
    assert caught.value.errno == errno.EFAULT
    program.extra.append(duplicate := os.dup(gmem))
    assert convert(program, duplicate, 0, 1, private=True) == DONE, "it is the file's"


GOOD = (0, PAGE, PRIVATE, PRESERVE, 0, *[0] * 11)
BAD = {
    "both modes": ((3, 3), errno.EINVAL),
    "unknown flag": ((3, 4), errno.EINVAL),
    "reserved": ((15, 1), errno.EINVAL),
    "attribute": ((2, 1), errno.EINVAL),
    "no size": ((1, 0), errno.EINVAL),
    "size wraps": ((1, (1 << 64) - PAGE), errno.EINVAL),
    "unaligned offset": ((0, 1), errno.EINVAL),
    "unaligned size": ((1, PAGE + 1), errno.EINVAL),
    "outside": ((1, SIZE + PAGE), errno.EINVAL),
    "zeros to private": ((3, ZERO), errno.EOPNOTSUPP),
}


def test_what_is_refused(boot: Boot) -> None:
    program = boot()
    gmem = with_file(program)
    for case, ((field, value), number) in BAD.items():
        fields = list(GOOD)
        fields[field] = value
        answer = ask(program, gmem, MEMORY_ATTRIBUTES2.pack(*fields))
        assert answer == (number, fields[0]), case
    assert host_word(program, gmem, 0) == 0, "it is shared as before"


def test_a_vm_without_private_memory_converts_nothing(boot: Boot) -> None:
    program = boot(type=0)
    gmem = with_file(program)
    assert convert(program, gmem, 0, 1, private=True) == (errno.EINVAL, 0)
    assert convert(program, gmem, 0, 1, private=False) == DONE


# --- both sides ---------------------------------------------------------------------------------


def test_one_page_for_both_types(boot: Boot, mounted: Mounted) -> None:
    program = boot(SWAP)
    gmem = with_file(program)
    with pin(program, gmem, 2) as held:
        held.write(2 * PAGE, (0x11).to_bytes(8, "little"))
    assert swap(program, HIGH + 2 * PAGE, 0x12) == 0x11
    assert host_word(program, gmem, 2) == 0x12
    assert convert(program, gmem, 2, 1, private=True) == DONE
    with pytest.raises(KvmError, match="the index is private") as caught:
        pin(program, gmem, 2)
    assert caught.value.errno == errno.EFAULT
    assert swap(program, HIGH + 2 * PAGE, 0x13) == 0x12, "the guest has its bytes"
    assert convert(program, gmem, 0, NPAGES, private=False) == DONE
    assert host_word(program, gmem, 2) == 0x13
    assert used(mounted) <= 2 * PAGE, "one page, never a second one for the other type"


def test_a_file_is_private_until_it_is_converted(boot: Boot) -> None:
    program = boot(SWAP)
    gmem = with_file(program, GUEST_MEMFD_FLAG_MMAP)
    assert swap(program, HIGH, 0x21) == 0
    with pytest.raises(KvmError, match="the index is private"):
        pin(program, gmem, 0)
    assert convert(program, gmem, 0, 1, private=False) == DONE
    assert host_word(program, gmem, 0) == 0x21


def test_what_was_not_made_to_be_mapped_the_host_never_has(boot: Boot) -> None:
    program = boot(SWAP)
    gmem = with_file(program, GUEST_MEMFD_FLAG_INIT_SHARED)
    with pytest.raises(KvmError, match="ENODEV"):
        pin(program, gmem, 0)
    assert swap(program, HIGH, 0x21) == 0, "the guest has, of either type"


def test_an_access_of_the_other_type_leaves_the_guest(boot: Boot) -> None:
    """Where the address says the type, the index must have it."""
    program = boot(SWAP, type=KVMSIM_SHARED_BIT_VM, gpa_bits=SHARED_BIT)
    gmem = with_file(program)
    at = PLAIN  # without the shared bit: private
    assert swap(program, HIGH, 0x31) == 0
    vcpu = program.vcpus[0]

    def leaves(linear: int, *, private: bool) -> None:
        program.set_regs(vcpu, rip=TEXT, rdi=linear, rsi=0)
        fault = exits.MemoryFaultExit(HIGH, PAGE, private, errno.EFAULT)
        assert program.run(vcpu) == fault

    leaves(at, private=True)
    assert convert(program, gmem, 0, 1, private=True) == DONE
    assert swap(program, at, 0x32) == 0x31
    leaves(HIGH, private=False)
    assert convert(program, gmem, 0, 1, private=False) == DONE
    assert swap(program, HIGH, 0x33) == 0x32


def test_a_punch_leaves_the_type(boot: Boot) -> None:
    program = boot(SWAP)
    gmem = with_file(program)
    assert convert(program, gmem, 0, 2, private=True) == DONE
    assert swap(program, HIGH, 0x41) == 0
    fallocate(gmem, KEEP_AND_PUNCH, 0, SIZE)
    with pytest.raises(KvmError, match="the index is private"):
        pin(program, gmem, 1)
    assert swap(program, HIGH, 0x42) == 0
    assert host_word(program, gmem, 2) == 0


def test_a_file_without_a_slot_has_types_and_bytes(boot: Boot, mounted: Mounted) -> None:
    program = boot(SWAP)
    gmem = with_file(program)
    assert swap(program, HIGH, 0x51) == 0
    assert swap(program, HIGH + PAGE, 0x52) == 0
    program.slot(1, HIGH, 0, 0)
    assert convert(program, gmem, 1, 1, private=True) == DONE
    assert convert(program, gmem, 0, 1, private=False, flags=ZERO) == DONE
    users = mounted.ask("stat", ino=os.fstat(gmem).st_ino)["users"]
    assert users == [], "nobody uses the file"
    assert host_word(program, gmem, 0) == 0
    program.slot(2, HIGH, SIZE, 0, gmem=gmem)
    assert swap(program, HIGH + PAGE, 0x53) == 0x52
    with pytest.raises(KvmError, match="the index is private"):
        pin(program, gmem, 1)


# --- contents -----------------------------------------------------------------------------------


def test_zeros_are_for_what_is_allocated(boot: Boot, mounted: Mounted) -> None:
    program = boot(SWAP)
    gmem = with_file(program, GUEST_MEMFD_FLAG_MMAP)
    for page in (0, 1, 5):
        assert swap(program, HIGH + page * PAGE, 0x61 + page) == 0
    before = used(mounted)
    assert convert(program, gmem, 0, 4, private=False, flags=ZERO) == DONE
    assert used(mounted) == before
    assert [host_word(program, gmem, page) for page in (0, 1)] == [0, 0]
    assert swap(program, HIGH + PAGE, 0) == 0
    assert swap(program, HIGH + 5 * PAGE, 0) == 0x66, "outside the range"


@pytest.mark.parametrize("private", [True, False])
def test_without_a_mode_contents_are_scrambled(boot: Boot, private: bool) -> None:
    program = boot(SWAP)
    gmem = with_file(program, MAPPABLE if private else GUEST_MEMFD_FLAG_MMAP)
    assert swap(program, HIGH, 0x71) == 0
    assert convert(program, gmem, 0, 2, private=private, flags=0) == DONE
    found = swap(program, HIGH, 0)
    assert found not in (0, 0x71)


def test_a_large_range_is_filled(boot: Boot) -> None:
    """More than one request to the owner, more than one run of pages."""
    program = boot(SWAP)
    npages = 1500
    gmem = program.guest_memfd(npages * PAGE, MAPPABLE)
    program.slot(1, HIGH, npages * PAGE, 0, gmem=gmem)
    fallocate(gmem, 1, 0, 1100 * PAGE)
    fallocate(gmem, 1, 1400 * PAGE, 100 * PAGE)
    for page in (0, 600, 1099, 1499):
        assert swap(program, HIGH + page * PAGE, 0x77) == 0
    assert convert(program, gmem, 0, npages, private=False, flags=ZERO) == DONE
    for page in (0, 600, 1099, 1499):
        assert swap(program, HIGH + page * PAGE, 0) == 0


# --- references ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [0, 3])
def test_a_page_in_hand_stays_shared(boot: Boot, page: int) -> None:
    program = boot(SWAP)
    gmem = with_file(program)
    held = pin(program, gmem, page)
    assert convert(program, gmem, 0, 4, private=True) == (errno.EAGAIN, page * PAGE)
    held.write(page * PAGE, (0x81).to_bytes(8, "little"))
    held.close()
    held.close()
    with pytest.raises(KvmError, match="EFAULT"):
        held.read(page * PAGE, 1)
    assert convert(program, gmem, 0, 4, private=True) == DONE
    assert swap(program, HIGH + page * PAGE, 0) == 0x81


def test_a_punch_waits_for_no_host_that_holds_on(boot: Boot, mounted: Mounted) -> None:
    """It takes the pages out of its hand, and they are free when it returns."""
    program = boot(SWAP)
    gmem = with_file(program)
    held, other = pin(program, gmem, 0, 4), pin(program, gmem, 6)
    held.write(0, b"x" * 4 * PAGE)
    other.write(6 * PAGE, b"y" * PAGE)
    fallocate(gmem, KEEP_AND_PUNCH, 2 * PAGE, PAGE)
    assert not held.held
    for use in (lambda: held.read(0, 1), lambda: held.write(0, b"z")):
        with pytest.raises(KvmError, match="taken away") as caught:
            use()
        assert caught.value.errno == errno.EFAULT
    assert other.held
    assert other.read(6 * PAGE, 1) == b"y"
    assert host_word(program, gmem, 2) == 0, "a fresh page"
    assert convert(program, gmem, 0, 4, private=True) == DONE, "a hand that is empty holds nothing"
    held.close()
    other.close()


def test_only_what_is_in_hand_can_be_touched(boot: Boot) -> None:
    program = boot()
    gmem = with_file(program)
    with pin(program, gmem, 1, 2) as held:
        assert held.read(PAGE + 4000, 200) == bytes(200)
        for offset, length in ((0, 1), (PAGE - 1, 2), (3 * PAGE - 1, 2)):
            with pytest.raises(KvmError, match="not all of it is in hand"):
                held.read(offset, length)
    with pytest.raises(KvmError, match="outside the file") as caught:
        pin(program, gmem, NPAGES)
    assert caught.value.errno == errno.EINVAL


def test_a_pin_outlives_its_slot_and_keeps_the_file_in_use(boot: Boot) -> None:
    program = boot(SWAP)
    gmem = with_file(program)
    assert swap(program, HIGH, 0x91) == 0
    held = pin(program, gmem, 0)
    program.slot(1, HIGH, 0, 0)
    assert held.read(0, 1) == b"\x91"
    held.close()


# --- races --------------------------------------------------------------------------------------


def test_conversions_while_the_guest_counts(boot: Boot) -> None:
    """It spins on a page that goes back and forth: no store is lost, none is torn."""
    program = boot(COUNT)
    gmem = with_file(program)
    vcpu = program.vcpus[0]
    program.set_regs(vcpu, rip=TEXT, rdi=HIGH)
    runs = threading.Thread(target=program.run, args=(vcpu,))
    runs.start()
    try:
        seen = [0]
        until(lambda: host_word(program, gmem, 0) > 0, "the guest counts")
        for _ in range(20):
            assert convert(program, gmem, 0, 2, private=True) == DONE
            assert convert(program, gmem, 0, 2, private=False) == DONE
            seen.append(host_word(program, gmem, 0))
        assert seen == sorted(seen)
        last = seen[-1]
        until(lambda: host_word(program, gmem, 0) > last, "it still counts")
    finally:
        program.process.interrupt(vcpu)
        runs.join()
    assert host_word(program, gmem, 0) >= seen[-1]


def test_conversions_with_zeros_while_the_guest_counts(boot: Boot) -> None:
    """The fill is between its stores: what it counts on with began at zero."""
    program = boot(COUNT)
    gmem = with_file(program)
    vcpu = program.vcpus[0]
    program.set_regs(vcpu, rip=TEXT, rdi=HIGH, rsi=0)
    with pin(program, gmem, 0) as held:
        held.write(0, (1 << 62).to_bytes(8, "little"))
    runs = threading.Thread(target=program.run, args=(vcpu,))
    runs.start()
    try:
        until(lambda: host_word(program, gmem, 0) > 1 << 62, "the guest counts")
        assert convert(program, gmem, 0, 1, private=False, flags=ZERO) == DONE
        assert host_word(program, gmem, 0) < 1 << 61
        until(lambda: host_word(program, gmem, 0) > 0, "it counts on")
    finally:
        program.process.interrupt(vcpu)
        runs.join()


def test_punches_conversions_and_pins_at_once(boot: Boot, mounted: Mounted) -> None:
    """Nobody waits for ever, nothing is held at the end, and the books are right."""
    program = boot(COUNT)
    gmem = with_file(program)
    vcpu = program.vcpus[0]
    program.set_regs(vcpu, rip=TEXT, rdi=HIGH)
    runs = threading.Thread(target=program.run, args=(vcpu,))
    failures: list[BaseException] = []

    def repeat(work: Callable[[], object]) -> threading.Thread:
        def loop() -> None:
            try:
                for _ in range(25):
                    work()
            except BaseException as error:
                failures.append(error)

        return threading.Thread(target=loop)

    def touch() -> None:
        with contextlib.suppress(KvmError), pin(program, gmem, 0, 4) as held:
            held.write(0, bytes(4 * PAGE))

    def back_and_forth() -> None:
        assert convert(program, gmem, 0, 4, private=True)[0] in (0, errno.EAGAIN)
        assert convert(program, gmem, 0, 4, private=False, flags=ZERO)[0] == 0

    others = [
        repeat(touch),
        repeat(back_and_forth),
        repeat(lambda: fallocate(gmem, KEEP_AND_PUNCH, 0, 4 * PAGE)),
    ]
    for thread in (runs, *others):
        thread.start()
    for thread in others:
        thread.join()
    program.process.interrupt(vcpu)
    runs.join()
    assert failures == []
    assert convert(program, gmem, 0, NPAGES, private=True) == DONE
    fallocate(gmem, KEEP_AND_PUNCH, 0, SIZE)
    assert used(mounted) == 0


def test_without_its_owner_nothing_converts(mount: Mounter) -> None:
    mounted = mount("personality=guest_memfd")
    with Program(mounted.path, type=KVM_X86_SW_PROTECTED_VM, in_place=True) as program:
        program.boot(SWAP)
        gmem = with_file(program)
        file = program.process.private_file(gmem)
        assert file is not None
        assert swap(program, HIGH, 0xA1) == 0
        mounted.kill()
        device = program.process.caller.objects[program.vm]
        until(lambda: bool(device.dead), "the VM has noticed")  # type: ignore[attr-defined]
        with pytest.raises(KvmError, match=r"EIO.*owner"):
            file.pin(0, PAGE)
        space = ctypes.create_string_buffer(MEMORY_ATTRIBUTES2.pack(*GOOD))
        caller = program.process.caller
        answer = file.ioctl(KVM_SET_MEMORY_ATTRIBUTES2, ctypes.addressof(space), caller)
        assert isinstance(answer, Failure)
        assert answer.errno == errno.EIO


def test_tables_of_the_guest_are_read_where_they_are_shared(boot: Boot) -> None:
    """KVM_TRANSLATE walks them through the file; what is private it does not see."""
    program = boot()
    gmem = with_file(program)
    with pin(program, gmem, 0, 2) as held:
        held.write(PAGE - 8, (0x1234).to_bytes(8, "little"))
    memory = program.process.caller.objects[program.vm].memory  # type: ignore[attr-defined]
    caller = program.process.caller
    assert memory.read_word(HIGH + PAGE - 8, caller=caller) == 0x1234
    assert convert(program, gmem, 0, 1, private=True) == DONE
    assert memory.read_word(HIGH + PAGE - 8, caller=caller) is None
    assert memory.read_word(HIGH + PAGE, caller=caller) == 0
