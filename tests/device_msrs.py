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
