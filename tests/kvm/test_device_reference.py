# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables of the simulated device against the kernel's own /dev/kvm."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import closing

import device_msrs
import pytest
from device_errors import BAD, ERRORS, POINTERS, U64, VCPU_IDS, WRONG_LEVEL
from device_program import Program

from kvmsim import uapi
from kvmsim.uapi import requests, structs

pytestmark = pytest.mark.kvm

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)

#: What depends on the machine and its kernel's configuration, by request.
MACHINE = {
    uapi.KVM_CREATE_VM: "VM types",
    uapi.KVM_CREATE_GUEST_MEMFD: "CONFIG_KVM_GUEST_MEMFD",
    uapi.KVM_SET_USER_MEMORY_REGION2: "v6.8",
    uapi.KVM_SET_MEMORY_ATTRIBUTES: "CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES",
    uapi.KVM_PRE_FAULT_MEMORY: "v6.11, needs two-dimensional paging",
    uapi.KVM_MEMORY_ENCRYPT_REG_REGION: "SEV",
    requests.KVM_SET_XCRS: "XSAVE",
    requests.KVM_GET_XSAVE: "XSAVE",
    requests.KVM_SET_TSC_KHZ: "TSC scaling",
    requests.KVM_X86_SETUP_MCE: "supported capabilities",
    requests.KVM_GET_SUPPORTED_CPUID: "the processor",
    requests.KVM_GET_CPUID2: "what was set before",
}


class Real:
    """One VM with one vCPU of the kernel's."""

    def __init__(self, *, chips: bool = False, vcpu: bool = True) -> None:
        self.fds = {"system": os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)}
        self.fds["vm"] = self.ioctl("system", uapi.KVM_CREATE_VM)
        if chips:
            assert self.ioctl("vm", requests.KVM_CREATE_IRQCHIP) == 0
        if not vcpu:
            return
        self.fds["vcpu"] = self.ioctl("vm", uapi.KVM_CREATE_VCPU)
        space = ctypes.create_string_buffer(structs.SREGS_SIZE)
        assert self.ioctl("vcpu", requests.KVM_GET_SREGS, ctypes.addressof(space)) == 0
        self.sregs = space.raw

    def ioctl(self, level: str, request: int, argument: object = 0) -> int:
        """Result or minus errno."""
        if isinstance(argument, bytes):
            space = ctypes.create_string_buffer(argument, max(len(argument), 1))
            argument = ctypes.addressof(space)
        result = int(_libc.ioctl(self.fds[level], request, argument))
        return -ctypes.get_errno() if result < 0 else result

    def ask(self, level: str, request: int, data: bytes) -> tuple[int, bytes]:
        """As :data:`device_msrs.Ask`."""
        space = ctypes.create_string_buffer(data, len(data))
        return self.ioctl(level, request, ctypes.addressof(space)), space.raw

    def close(self) -> None:
        for fd in reversed(self.fds.values()):
            os.close(fd)


@pytest.fixture(scope="module")
def real() -> Iterator[Real]:
    real = Real()
    yield real
    real.close()


@pytest.mark.parametrize(
    ("level", "request_", "argument", "expected"),
    [row for row in ERRORS if row[1] not in MACHINE],
)
def test_errors(real: Real, level: str, request_: int, argument: object, expected: int) -> None:
    assert -min(real.ioctl(level, request_, argument), 0) == expected


@pytest.mark.parametrize(
    ("level", "request_"),
    [(level, one) for level, many in POINTERS.items() for one in many if one not in MACHINE],
)
def test_bad_pointers(real: Real, level: str, request_: int) -> None:
    if real.ioctl(level, request_, BAD) in (-errno.ENOTTY, -errno.EINVAL):
        pytest.skip("not in this kernel")
    assert real.ioctl(level, request_, BAD) == -errno.EFAULT
    assert real.ioctl(level, request_, U64) == -errno.EFAULT


@pytest.mark.parametrize(("level", "request_", "expected"), WRONG_LEVEL)
def test_requests_of_another_level(real: Real, level: str, request_: int, expected: int) -> None:
    assert real.ioctl(level, request_) == -expected


def test_ids_of_the_boot_cpu_and_its_limit() -> None:
    with closing(Real(vcpu=False)) as real:
        for request, argument, expected in VCPU_IDS:
            answer = real.ioctl("vm", request, argument)
            assert -min(answer, 0) == expected, (request, argument)
            if request == uapi.KVM_CREATE_VCPU and answer >= 0:
                real.fds["vcpu"] = answer


def test_the_state_after_reset(real: Real) -> None:
    with Program() as program:
        vcpu = program.ioctl(program.vm, uapi.KVM_CREATE_VCPU, None, 0)
        ours = program.get(vcpu, requests.KVM_GET_SREGS, structs.SREGS_SIZE)
        theirs = real.sregs
        # all but the local APIC's base, which without KVM_CREATE_IRQCHIP nobody keeps there
        assert ours[:272] == theirs[:272]
        assert ours[280:] == theirs[280:]


CONTROLS = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
STATES: list[dict[str, int]] = [
    {"cr0": 1},
    {"cr0": 1 << 31},
    {"cr0": 1 << 31 | 1},
    {"cr0": 1 << 29},
    {"cr0": 1 << 29 | 1 << 30},
    {"cr0": 1 << 32},
    {"cr0": 1 << 31 | 1, "cr4": 1 << 5, "efer": 0x500},
    {"cr0": 1 << 31 | 1, "cr4": 0, "efer": 0x500},
    {"cr0": 1 << 31 | 1, "cr4": 1 << 5, "efer": 0x100},
    {"cr0": 1 << 31 | 1, "cr4": 1 << 5, "efer": 0x500, "cr3": 1 << 52},
    {"efer": 0x400},
    {"cr8": 16},
    {"cr4": 1 << 12},
    {"cr4": 1 << 14},
    {"cr4": 1 << 31},
    *({"cr4": 1 << bit} for bit in range(11)),
]  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_states_are_refused_alike(real: Real, state: dict[str, int]) -> None:
    with Program() as program:
        vcpu = program.ioctl(program.vm, uapi.KVM_CREATE_VCPU, None, 0)
        ours = program.get(vcpu, requests.KVM_GET_SREGS, structs.SREGS_SIZE)
        answers = []
        for base in (ours, real.sregs):
            data = bytearray(base)
            values = dict(zip(CONTROLS, structs.SREGS_CONTROL.unpack_from(data, 224), strict=True))
            structs.SREGS_CONTROL.pack_into(data, 224, *{**values, **state}.values())
            answers.append(bytes(data))
        try:
            program.put(vcpu, requests.KVM_SET_SREGS, answers[0])
            number = 0
        except OSError as error:
            number = error.errno or -1
        assert real.ioctl("vcpu", requests.KVM_SET_SREGS, answers[1]) == -number


SLOTS = [
    (0, 0, 1 << 32, 4096, 0x1_0000),
    (32763, 0, 2 << 32, 4096, 0x1_0000),
    (32764, 0, 3 << 32, 4096, 0x1_0000),
    (65536, 0, 3 << 32, 4096, 0x1_0000),
    (1, 0, 1, 4096, 0x1_0000),
    (1, 0, (1 << 64) - 4096, 4096, 0x1_0000),
    (1, 0, 4 << 32, 1, 0x1_0000),
    (1, 0, 4 << 32, 0, 0x1_0000),
    (1, 0, 4 << 32, 1 << 43, 0x1_0000),
    (1, 0, 4 << 32, 4096, 1),
    (1, 0, 4 << 32, 4096, 1 << 47),
    (1, 0, 4 << 32, 4096, (1 << 47) - 4096),
    (1, 0, 4 << 32, 4096, 0),
    (1, 0, 1 << 32, 4096, 0x1_0000),
    (0, 0, 1 << 32, 8192, 0x1_0000),
    (0, 0, 1 << 32, 4096, 0x2_0000),
    (0, 2, 1 << 32, 4096, 0x1_0000),
    (0, 1, 1 << 32, 4096, 0x1_0000),
    (0, 0, 5 << 32, 4096, 0x1_0000),
    (0, 0, 0, 0, 0),
    (0, 0, 0, 0, 0),
    *((2, 1 << bit, 6 << 32, 4096, 0x1_0000) for bit in range(2, 32)),
]


def test_slots_are_refused_alike() -> None:
    """One after the other on the same VMs, since each depends on those before."""
    real = Real()
    with Program() as program:
        for slot in SLOTS:
            data = struct.pack("<IIQQQ", *slot)
            try:
                program.put(program.vm, uapi.KVM_SET_USER_MEMORY_REGION, data)
                number = 0
            except OSError as error:
                number = error.errno or -1
            assert real.ioctl("vm", uapi.KVM_SET_USER_MEMORY_REGION, data) == -number, slot
    real.close()


# --- model-specific registers -----------------------------------------------------------------


def test_registers_that_are_listed_take_their_own_value() -> None:
    with closing(Real(chips=True)) as real:  # MSR_KVM_ASYNC_PF_INT needs a local APIC
        listed = device_msrs.listed(real.ask)
    assert {0xFE, 0x179}.isdisjoint(listed)


def test_machine_check_registers_are_as_they_were_set_up() -> None:
    with closing(Real()) as real:
        device_msrs.check_machine_check(real.ask)


def test_the_hardware_configuration_of_amd() -> None:
    with closing(Real()) as real:
        device_msrs.check_hwcr(real.ask)
