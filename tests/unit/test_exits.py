# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import ctypes
import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsim import uapi
from kvmsim.exits import (
    BadHvaExit,
    Exit,
    HltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    ShutdownExit,
    SystemEventExit,
    decode,
    encode,
    map_gpa_ranges,
)
from kvmsim.rangelist import MapGpaRange
from kvmsim.uapi import Abi

ABIS: tuple[Abi, ...] = ("upstream", "v7")


def _run() -> bytearray:
    return bytearray(b"\xa5" * uapi.KVM_RUN_MMAP_SIZE)


# The C declarations again, by ctypes' alignment rules instead of our offsets.
U8, U16, U32, U64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64


class _Io(ctypes.Structure):
    _fields_ = (
        ("direction", U8), ("size", U8), ("port", U16), ("count", U32), ("data_offset", U64),
    )  # fmt: skip


class _Mmio(ctypes.Structure):
    _fields_ = (("phys_addr", U64), ("data", U8 * 8), ("len", U32), ("is_write", U8))


class _Hypercall(ctypes.Structure):
    _fields_ = (("nr", U64), ("args", U64 * 6), ("ret", U64), ("flags", U64))


class _Internal(ctypes.Structure):
    _fields_ = (("suberror", U32), ("ndata", U32), ("data", U64 * 16))


class _SystemEvent(ctypes.Structure):
    _fields_ = (("type", U32), ("ndata", U32), ("data", U64 * 16))


class _MemoryFault(ctypes.Structure):
    _fields_ = (("flags", U64), ("gpa", U64), ("size", U64))


class _MemoryV7(ctypes.Structure):
    _fields_ = (("flags", U32), ("padding", U32), ("gpa", U64), ("size", U64))


class _Union(ctypes.Union):
    _fields_ = (
        ("io", _Io), ("mmio", _Mmio), ("hypercall", _Hypercall), ("internal", _Internal),
        ("system_event", _SystemEvent),
        ("memory_fault", _MemoryFault), ("memory", _MemoryV7), ("padding", U8 * 256),
    )  # fmt: skip


class _KvmRun(ctypes.Structure):
    _fields_ = (
        ("request_interrupt_window", U8), ("immediate_exit", U8), ("padding1", U8 * 6),
        ("exit_reason", U32), ("ready_for_interrupt_injection", U8), ("if_flag", U8),
        ("flags", U16), ("cr8", U64), ("apic_base", U64), ("u", _Union),
    )  # fmt: skip


def _encoded(exit: Exit, abi: Abi = "upstream") -> tuple[_KvmRun, int, bytearray]:
    run = _run()
    result = encode(exit, run, abi)
    return _KvmRun.from_buffer_copy(run), result, run


def test_memory_fault_upstream_and_v7() -> None:
    upstream = MemoryFaultExit(0x1234000, 4096, True, errno.EFAULT)
    run, result, _ = _encoded(upstream)
    assert (run.exit_reason, result) == (39, -errno.EFAULT)
    told = run.u.memory_fault
    assert (told.flags, told.gpa, told.size) == (1 << 3, 0x1234000, 4096)

    run, result, _ = _encoded(MemoryFaultExit(0x1234000, 4096, True, None), "v7")
    assert (run.exit_reason, result) == (37, 0)
    told = run.u.memory
    assert (told.flags, told.gpa, told.size) == (1, 0x1234000, 4096)

    run, result, _ = _encoded(MemoryFaultExit(0x5000, 4096, False, uapi.EHWPOISON))
    assert (run.u.memory_fault.flags, result) == (0, -133)


def test_io() -> None:
    run, result, raw = _encoded(IoExit(0x3F8, 1, True, b"hello", 5))
    assert (run.exit_reason, result) == (2, 0)
    io = run.u.io
    assert (io.direction, io.size, io.port, io.count) == (1, 1, 0x3F8, 5)
    assert raw[io.data_offset : io.data_offset + 5] == b"hello"
    run, _, raw = _encoded(IoExit(0x60, 4, False))
    assert (run.u.io.direction, run.u.io.size, run.u.io.count) == (0, 4, 1)
    at = uapi.KVM_PIO_DATA_OFFSET
    assert raw[at : at + 5] == bytes(4) + b"\xa5", "an IN that nobody answers finds 0"


def test_mmio() -> None:
    run, result, _ = _encoded(MmioExit(0xFEE00000, 4, True, b"\x01\x02\x03\x04"))
    assert (run.exit_reason, result) == (6, 0)
    mmio = run.u.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (0xFEE00000, 4, 1)
    assert bytes(mmio.data) == b"\x01\x02\x03\x04\0\0\0\0"


def test_hypercall_and_internal_error() -> None:
    run, result, _ = _encoded(HypercallExit(uapi.KVM_HC_MAP_GPA_RANGE, (0x1000, 2, 16)))
    assert (run.exit_reason, result, run.u.hypercall.nr) == (3, 0, 12)
    assert list(run.u.hypercall.args) == [0x1000, 2, 16, 0, 0, 0]
    assert run.u.hypercall.ret == 0
    run, _, _ = _encoded(InternalErrorExit(uapi.KVM_INTERNAL_ERROR_EMULATION, (7, 8)))
    assert (run.exit_reason, run.u.internal.suberror, run.u.internal.ndata) == (17, 1, 2)
    assert list(run.u.internal.data)[:2] == [7, 8]
    run, _, _ = _encoded(SystemEventExit(uapi.KVM_SYSTEM_EVENT_TDX_FATAL, (7, 8)))
    assert (run.exit_reason, run.u.system_event.type, run.u.system_event.ndata) == (24, 7, 2)
    assert list(run.u.system_event.data)[:2] == [7, 8]


@pytest.mark.parametrize(
    ("exit", "reason", "result"),
    [
        (HltExit(), 5, 0),
        (ShutdownExit(), 8, 0),
        (InterruptedExit(), 10, -errno.EINTR),
        (BadHvaExit(0x7000), 0, -errno.EFAULT),
    ],
)
def test_exits_without_payload_write_the_reason_only(exit: Exit, reason: int, result: int) -> None:
    run, got, raw = _encoded(exit)
    assert (run.exit_reason, got) == (reason, result)
    assert raw[12:] == _run()[12:]


words = st.integers(0, (1 << 64) - 1)
exits = st.one_of(
    st.sampled_from([HltExit(), ShutdownExit(), InterruptedExit(), BadHvaExit(0)]),
    st.builds(
        lambda size, count, port, fill: IoExit(port, size, True, fill[: size * count], count),
        st.sampled_from([1, 2, 4]),
        st.integers(1, 16),
        st.integers(0, 0xFFFF),
        st.binary(min_size=64, max_size=64),
    ),
    st.builds(IoExit, st.integers(0, 0xFFFF), st.sampled_from([1, 2, 4]), st.just(False)),
    st.builds(
        lambda gpa, data: MmioExit(gpa, len(data), True, data),
        words,
        st.binary(min_size=1, max_size=8),
    ),
    st.builds(MmioExit, words, st.integers(1, 8), st.just(False)),
    st.builds(HypercallExit, words, st.tuples(*[words] * 6)),
    st.builds(
        map_gpa_ranges,
        st.lists(st.builds(MapGpaRange, words, words, words), min_size=1, max_size=170),
    ),
    st.builds(
        MemoryFaultExit,
        words,
        words,
        st.booleans(),
        st.sampled_from([None, errno.EFAULT, errno.EIO, errno.ENOMEM, uapi.EHWPOISON]),
    ),
    st.builds(InternalErrorExit, st.integers(0, 9), st.lists(words, max_size=16).map(tuple)),
    st.builds(SystemEventExit, st.integers(0, 9), st.lists(words, max_size=16).map(tuple)),
)


@given(exits, st.sampled_from(ABIS))
def test_what_was_encoded_is_decoded(exit: Exit, abi: Abi) -> None:
    run = _run()
    assert decode(run, encode(exit, run, abi), abi) == exit


@pytest.mark.parametrize(
    "exit",
    [
        IoExit(0, 3, False),
        IoExit(0, 4, True, b"abc"),
        MmioExit(0, 9, False),
        MmioExit(0, 0, False),
        MmioExit(0, 4, True, b"abc"),
        HypercallExit(0, (0,) * 7),
        map_gpa_ranges([MapGpaRange(0, 1, 0)] * 171),
        InternalErrorExit(0, (0,) * 17),
        SystemEventExit(0, (0,) * 17),
    ],
)
def test_an_exit_that_does_not_fit_leaves_the_bytes_alone(exit: Exit) -> None:
    run = _run()
    with pytest.raises(ValueError):
        encode(exit, run)
    assert run == _run()


def test_decode_refuses_what_is_no_exit() -> None:
    run = _run()
    encode(HltExit(), run)
    with pytest.raises(ValueError, match="no such exit"):
        decode(run, -errno.EFAULT)
    encode(MemoryFaultExit(0, 4096, True, None), run, "v7")
    with pytest.raises(ValueError, match="no such exit"):
        decode(run, 0, "upstream")  # 37 is KVM_EXIT_NOTIFY there


@pytest.mark.parametrize(
    ("request_", "number"),
    [
        # As the C macros give them on x86-64.
        (uapi.KVM_GET_API_VERSION, 0xAE00),
        (uapi.KVM_CREATE_VM, 0xAE01),
        (uapi.KVM_RUN, 0xAE80),
        (uapi.KVM_SET_USER_MEMORY_REGION, 0x4020AE46),
        (uapi.KVM_SET_USER_MEMORY_REGION2, 0x40A0AE49),
        (uapi.KVM_MEMORY_ENCRYPT_REG_REGION, 0x8010AEBB),
        (uapi.KVM_MEMORY_ENCRYPT_UNREG_REGION, 0x8010AEBC),
        (uapi.KVM_SET_MEMORY_ATTRIBUTES, 0x4020AED2),
        (uapi.KVM_CREATE_GUEST_MEMFD, 0xC040AED4),
        (uapi.KVM_PRE_FAULT_MEMORY, 0xC040AED5),
    ],
)
def test_ioctl_numbers(request_: int, number: int) -> None:
    assert request_ == number


@pytest.mark.parametrize(("nr", "size"), [(0x100, 0), (-1, 0), (0, 1 << 14)])
def test_a_request_that_does_not_fit_is_refused(nr: int, size: int) -> None:
    with pytest.raises(ValueError):
        uapi.iow(nr, size)
