# SPDX-License-Identifier: GPL-2.0-or-later
"""Parts of the guest kernel that compute, compiled for this machine: decoder and hashes."""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import shutil
import subprocess
from pathlib import Path

import pytest

COMMON = Path(__file__).parents[2] / "scripts" / "guests" / "kernel" / "common"
U64 = (1 << 64) - 1


REGISTERS = (
    "r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8", "rbp", "rdi", "rsi", "rdx", "rcx", "rbx",
    "rax", "vector", "error", "rip", "cs", "rflags", "rsp", "ss",
)  # fmt: skip


class Frame(ctypes.Structure):
    """struct trap_frame of arch.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in REGISTERS]


class Instruction(ctypes.Structure):
    """struct instruction of instruction.h."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("write", ctypes.c_int),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("destination", ctypes.c_uint32),
        ("width", ctypes.c_uint32),
        ("high_byte", ctypes.c_int),
        ("sign", ctypes.c_int),
        ("port", ctypes.c_uint16),
    ]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: install gcc to test the guest's parts")
    library = tmp_path_factory.mktemp("parts") / "parts.so"
    sources = [COMMON / "instruction.c", COMMON / "sha256.c"]
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-I", COMMON, *sources, "-o", library],
        check=True,
        timeout=60,
    )
    loaded = ctypes.CDLL(str(library))
    loaded.decode_mov.restype = loaded.decode_port.restype = Instruction
    return loaded


def frame(code: bytes, **registers: int) -> tuple[Frame, ctypes.Array[ctypes.c_char]]:
    """A frame whose RIP is at ``code``; the buffer must outlive its use."""
    held = ctypes.create_string_buffer(code + b"\x90" * 16)
    return Frame(rip=ctypes.addressof(held), **registers), held


# Machine code by AMD APM vol. 3; registers as given in the test below.
@pytest.mark.parametrize(
    ("code", "size", "write", "address", "value"),
    [
        ("488b00", 8, False, 0x1000, None),  # mov rax, [rax]
        ("8b4b10", 4, False, 0x2010, None),  # mov ecx, [rbx+0x10]
        ("668b8b00010000", 2, False, 0x2100, None),  # mov cx, [rbx+0x100]
        ("8a43f0", 1, False, 0x1FF0, None),  # mov al, [rbx-0x10]
        ("498b0424", 8, False, 0x5000, None),  # mov rax, [r12]
        ("498b4500", 8, False, 0x6000, None),  # mov rax, [r13+0]
        ("4a8b04c3", 8, False, 0x2000 + 8 * 0x30, None),  # mov rax, [rbx+r8*8]
        ("8b042578563412", 4, False, 0x12345678, None),  # mov eax, [0x12345678]
        ("8b048d10000000", 4, False, 4 * 0x40 + 0x10, None),  # mov eax, [rcx*4+0x10]
        ("0fb603", 1, False, 0x2000, None),  # movzx eax, byte [rbx]
        ("480fbf03", 2, False, 0x2000, None),  # movsx rax, word [rbx]
        ("488913", 8, True, 0x2000, 0x1122334455667788),  # mov [rbx], rdx
        ("668913", 2, True, 0x2000, 0x7788),  # mov [rbx], dx
        ("8813", 1, True, 0x2000, 0x88),  # mov [rbx], dl
        ("8833", 1, True, 0x2000, 0x77),  # mov [rbx], dh
        ("408833", 1, True, 0x2000, 0xEF),  # mov [rbx], sil
        ("c60312", 1, True, 0x2000, 0x12),  # mov byte [rbx], 0x12
        ("66c7033412", 2, True, 0x2000, 0x1234),  # mov word [rbx], 0x1234
        ("48c703ffffffff", 8, True, 0x2000, U64),  # mov qword [rbx], -1
        ("c74304ffffffff", 4, True, 0x2004, 0xFFFFFFFF),  # mov dword [rbx+4], -1
    ],
)
def test_memory_accesses_are_decoded(
    parts: ctypes.CDLL, code: str, size: int, write: bool, address: int, value: int | None
) -> None:
    f, _held = frame(
        bytes.fromhex(code), rax=0x1000, rbx=0x2000, rcx=0x40, rdx=0x1122334455667788,
        rsi=0xABCDEF, r8=0x30, r12=0x5000, r13=0x6000,
    )  # fmt: skip
    i = parts.decode_mov(ctypes.byref(f))
    assert (i.length, i.size, bool(i.write), i.address) == (len(code) // 2, size, write, address)
    if value is not None:
        assert i.value == value


def test_addresses_relative_to_rip_count_from_the_next_instruction(parts: ctypes.CDLL) -> None:
    f, _held = frame(bytes.fromhex("c70510000000ffffffff"))  # mov dword [rip+0x10], -1
    i = parts.decode_mov(ctypes.byref(f))
    assert (i.length, i.address) == (10, f.rip + 10 + 0x10)


@pytest.mark.parametrize("code", ["488bc0", "a5", "f3a5", "0f6f03", "90", "ff03", "0fa2"])
def test_other_instructions_are_not_taken_for_one(parts: ctypes.CDLL, code: str) -> None:
    f, _held = frame(bytes.fromhex(code), rbx=0x2000)
    assert parts.decode_mov(ctypes.byref(f)).length == 0


@pytest.mark.parametrize(
    ("code", "read", "register", "before", "after"),
    [
        ("488b03", 0x8877665544332211, "rax", U64, 0x8877665544332211),
        ("8b03", 0x8877665544332211, "rax", U64, 0x44332211),
        ("668b03", 0x2211, "rax", U64, U64 & ~0xFFFF | 0x2211),
        ("8a03", 0x11, "rax", U64, U64 & ~0xFF | 0x11),
        ("8a23", 0x11, "rax", U64, U64 & ~0xFF00 | 0x1100),
        ("0fb603", 0x99, "rax", U64, 0x99),
        ("480fbe03", 0x99, "rax", 0, U64 & ~0xFF | 0x99),
        ("0fbf03", 0x8001, "rax", U64, 0xFFFF8001),
        ("4c8b3b", 7, "r15", 0, 7),
    ],
)
def test_loads_change_what_the_processor_would(
    parts: ctypes.CDLL, code: str, read: int, register: str, before: int, after: int
) -> None:
    f, _held = frame(bytes.fromhex(code), rbx=0x2000, **{register: before})
    i = parts.decode_mov(ctypes.byref(f))
    parts.finish_load(ctypes.byref(f), ctypes.byref(i), ctypes.c_uint64(read))
    assert getattr(f, register) == after


@pytest.mark.parametrize(
    ("code", "port", "size", "write"),
    [
        ("e460", 0x60, 1, False),
        ("e560", 0x60, 4, False),
        ("66e760", 0x60, 2, True),
        ("ec", 0x3F8, 1, False),
        ("ed", 0x3F8, 4, False),
        ("66ed", 0x3F8, 2, False),
        ("ee", 0x3F8, 1, True),
        ("48ef", 0x3F8, 4, True),
    ],
)
def test_port_accesses_are_decoded(
    parts: ctypes.CDLL, code: str, port: int, size: int, write: bool
) -> None:
    f, _held = frame(bytes.fromhex(code), rax=0x1122334455667788, rdx=0x3F8)
    i = parts.decode_port(ctypes.byref(f))
    assert (i.length, i.port, i.size, bool(i.write)) == (len(code) // 2, port, size, write)
    assert i.value == 0x1122334455667788 & (1 << 8 * size) - 1


@pytest.mark.parametrize("code", ["6c", "6e", "f36e", "90", "0fa2"])
def test_string_and_other_instructions_are_no_port_accesses(parts: ctypes.CDLL, code: str) -> None:
    f, _held = frame(bytes.fromhex(code))
    assert parts.decode_port(ctypes.byref(f)).length == 0


@pytest.mark.parametrize("length", [0, 1, 55, 56, 63, 64, 65, 119, 120, 4000])
def test_hashes_agree_with_the_library(parts: ctypes.CDLL, length: int) -> None:
    data = bytes(i * 7 & 0xFF for i in range(length))
    key = bytes(range(32))
    out = ctypes.create_string_buffer(32)
    parts.sha256(None, data, ctypes.c_uint64(length), out)
    assert out.raw == hashlib.sha256(data).digest()
    parts.sha256(b"p" * 64, data, ctypes.c_uint64(length), out)
    assert out.raw == hashlib.sha256(b"p" * 64 + data).digest()
    parts.hmac_sha256(key, data, ctypes.c_uint64(length), out)
    assert out.raw == hmac.new(key, data, hashlib.sha256).digest()
