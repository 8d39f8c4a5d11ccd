# SPDX-License-Identifier: GPL-2.0-or-later
"""What is asked about model-specific registers, of the simulated device and of a real one."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

from device_program import Program

from kvmsim.uapi import requests, structs

_ENTRY = struct.Struct("<IIIIQ")

Ask = Callable[[str, int, bytes], tuple[int, bytes]]
"""Make an ioctl at a level; its result or minus errno, and what the structure is then."""


def ours(program: Program, level: str, request: int, data: bytes) -> tuple[int, bytes]:
    """:data:`Ask` of the simulated device."""
    space = ctypes.create_string_buffer(data, len(data))
    fd = {"system": program.kvm, "vm": program.vm, "vcpu": program.vcpus[0]}[level]
    try:
        return program.process.ioctl(fd, request, space), space.raw
    except OSError as error:
        return -(error.errno or 0), space.raw


def read(ask: Ask, index: int) -> int | None:
    """KVM_GET_MSRS of one; None: there is none."""
    done, data = ask("vcpu", requests.KVM_GET_MSRS, _ENTRY.pack(1, 0, index, 0, 0))
    assert done in (0, 1), done
    value: int = _ENTRY.unpack(data)[4]
    return value if done else None


def write(ask: Ask, index: int, value: int) -> bool:
    """KVM_SET_MSRS of one; whether it was taken."""
    done, _ = ask("vcpu", requests.KVM_SET_MSRS, _ENTRY.pack(1, 0, index, 0, value))
    assert done in (0, 1), done
    return bool(done)


def listed(ask: Ask) -> set[int]:
    """KVM_GET_MSR_INDEX_LIST; each of them takes back what is read of it."""
    room = 256
    data = structs.MSR_LIST.pack(room) + bytes(4 * room)
    done, data = ask("system", requests.KVM_GET_MSR_INDEX_LIST, data)
    assert done == 0
    (count,) = structs.MSR_LIST.unpack_from(data)
    indices = set(struct.unpack_from(f"<{count}I", data, structs.MSR_LIST.size))
    for index in indices:
        value = read(ask, index)
        assert value is not None, hex(index)
        assert write(ask, index, value), (hex(index), value)
    return indices


U64 = (1 << 64) - 1
BANKS = 10
CTL_P, SER_P, CMCI_P = 1 << 8, 1 << 24, 1 << 10

#: After KVM_X86_SETUP_MCE of 10 banks with MCG_CTL: register, value to set, what is read then;
#: None: there is no such register.
MACHINE_CHECK = [
    (0x179, 0, CTL_P | SER_P | BANKS),
    (0x17A, 0xFF, 0xFF),
    (0x17A, 1 << 60, 1 << 60),
    (0x17B, U64, U64),
    (0x17B, 5, U64),
    (0x17B, 0, 0),
    (0x400, U64, U64),
    (0x400, 5, U64),
    (0x400, U64 - 1, U64 - 1),
    (0x410, U64 - (1 << 10), U64 - (1 << 10)),
    (0x414, U64 - (1 << 11), U64),
    (0x424, 0, 0),
    (0x401, 1 << 63, 1 << 63),
    (0x402, 77, 77),
    (0x427, 99, 99),
    (0x428, 0, None),
    (0x47F, 0, None),
    (0x280, 0, 0),
    (0x289, 1 << 30, 0),
    (0x28A, 0, None),
    (0x0, 1, 0),
    (0x1, 1, 0),
]


HWCR = 0xC001_0015
WRITE_STATUS, TSC_FREQUENCY = 1 << 18, 1 << 24


def check_hwcr(ask: Ask) -> None:
    """Two bits of MSR_K7_HWCR stay, three are taken and forgotten, whatever CPUID says."""
    assert read(ask, HWCR) == 0
    for bit in range(64):
        taken = write(ask, HWCR, 1 << bit)
        assert taken == (bit in (3, 6, 8, 18, 24)), bit
        if taken:
            assert read(ask, HWCR) == 1 << bit & (WRITE_STATUS | TSC_FREQUENCY)
    assert write(ask, HWCR, 0)


def set_up(ask: Ask, capability: int) -> int:
    """KVM_X86_SETUP_MCE."""
    return ask("vcpu", requests.KVM_X86_SETUP_MCE, structs.U64_VALUE.pack(capability))[0]


def check_machine_check(ask: Ask) -> None:
    """Before KVM_X86_SETUP_MCE there is room for all banks; afterwards as the table says."""
    assert (read(ask, 0x179), read(ask, 0x17B), read(ask, 0x47F)) == (32, 0, 0)
    assert not write(ask, 0x17B, U64), "without MCG_CTL_P"
    assert write(ask, 0x17B, 0)
    assert set_up(ask, SER_P | CTL_P | 33) < 0
    assert set_up(ask, BANKS) == 0
    assert (read(ask, 0x17B), read(ask, 0x400)) == (0, U64)
    assert set_up(ask, SER_P | CTL_P | BANKS) == 0
    for index, value, then in MACHINE_CHECK:
        write(ask, index, value)
        assert read(ask, index) == then, (hex(index), hex(value))
