# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests outside long mode: what the first programs of a VMM's author do."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from device_program import RAM, Program

from kvmsim import exits
from kvmsim.device.local import HostRange
from kvmsim.uapi import requests, structs

AT = 0x1000
TABLES = 0x2000


@pytest.fixture
def program() -> Iterator[Program]:
    with Program() as program:
        program.ram = program.process.ranges.allocate(RAM)
        program.slot(0, 0, RAM, program.ram.address)
        program.add_vcpu(0)
        yield program


def ram(program: Program) -> HostRange:
    assert program.ram is not None
    return program.ram


def segment(base: int = 0, *, code: bool, wide: bool = False, selector: int = 0) -> tuple[int, ...]:
    limit = 0xFFFF_FFFF if wide else 0xFFFF
    return (base, limit, selector, 0xB if code else 3, 1, 0, int(wide), 1, 0, int(wide), 0, 0)


def start(
    program: Program,
    *,
    code: tuple[int, ...] | None = None,
    data: tuple[int, ...] | None = None,
    rip: int = AT,
    **control: int,
) -> int:
    """Set the segments and control registers of vCPU 0."""
    vcpu = program.vcpus[0]
    sregs = bytearray(program.get(vcpu, requests.KVM_GET_SREGS, structs.SREGS_SIZE))
    structs.SEGMENT.pack_into(sregs, 0, *(code or segment(code=True)))
    for at in range(1, 6):
        if data is not None:
            structs.SEGMENT.pack_into(sregs, at * structs.SEGMENT.size, *data)
    names = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
    values = dict(zip(names, structs.SREGS_CONTROL.unpack_from(sregs, 224), strict=True))
    structs.SREGS_CONTROL.pack_into(sregs, 224, *{**values, **control}.values())
    program.put(vcpu, requests.KVM_SET_SREGS, bytes(sregs))
    program.set_regs(vcpu, rip=rip, rax=2, rbx=2, rsp=0x8000, rflags=2)
    return vcpu


def said(program: Program, vcpu: int) -> bytes:
    """What the guest writes to a port until it halts."""
    text = b""
    while isinstance(left := program.run(vcpu), exits.IoExit):
        text += left.data
    assert left == exits.HltExit()
    return text


def test_the_first_program_of_everyone(program: Program) -> None:
    # mov dx, 0x3f8; add al, bl; add al, '0'; out dx, al; mov al, 10; out dx, al; hlt
    ram(program).write(AT, bytes.fromhex("baf80300d80430eeb00aeef4"))
    assert said(program, start(program)) == b"4\n"


def test_code_behind_a_segment_base(program: Program) -> None:
    """As at the reset vector: HLT and INT are found at the base, not at IP."""
    ram(program).write(0x1_1000, bytes.fromhex("b078e6e9f4"))  # mov al, 'x'; out 0xe9, al; hlt
    base = segment(0x1_0000, code=True, selector=0x1000)
    assert said(program, start(program, code=base)) == b"x"


def test_interrupts_of_real_mode(program: Program) -> None:
    memory = ram(program)
    # mov al, 'a'; int 0x21; mov al, 'b'; out 0xe9, al; xor bl, bl; div bl; hlt
    memory.write(AT, bytes.fromhex("b061cd21b062e6e930dbf6f3f4"))
    memory.write(0x21 * 4, struct.pack("<HH", 0x100, 0x120))
    memory.write(0x1300, bytes.fromhex("e6e9cf"))  # out 0xe9, al; iret
    memory.write(0, struct.pack("<HH", 0x1400, 0))
    # #DE comes back to the instruction: mov bp, sp; add word [bp], 2; mov al, 'd'; out; iret
    memory.write(0x1400, bytes.fromhex("89e583460002b064e6e9cf"))
    vcpu = start(program)
    assert said(program, vcpu) == b"abd"
    assert program.regs(vcpu)["rsp"] == 0x8000


def test_an_interrupt_is_injected_in_real_mode(program: Program) -> None:
    memory = ram(program)
    memory.write(AT, bytes.fromhex("fbebfe"))  # sti; jmp $
    memory.write(0x40 * 4, struct.pack("<HH", 0x1300, 0))
    memory.write(0x1300, bytes.fromhex("b069e6e9f4"))  # mov al, 'i'; out 0xe9, al; hlt
    vcpu = start(program)
    program.put(vcpu, requests.KVM_INTERRUPT, structs.INTERRUPT.pack(0x40))
    assert said(program, vcpu) == b"i"


# mov al, 'x'; out 0xe9, al; mov eax, 42; mov [0x400], eax; push eax; pop ebx; hlt
CODE32 = bytes.fromhex("b078e6e9b82a000000a300040000505bf4")
FLAT = {"code": segment(code=True, wide=True, selector=8), "data": segment(code=False, wide=True)}


def test_protected_mode(program: Program) -> None:
    ram(program).write(AT, CODE32)
    vcpu = start(program, **FLAT, cr0=0x11)  # type: ignore[arg-type]
    assert said(program, vcpu) == b"x"
    assert ram(program).read(0x400, 4) == struct.pack("<I", 42)


@pytest.mark.parametrize("large", [True, False])
def test_paging_of_32_bits(program: Program, large: bool) -> None:
    memory = ram(program)
    memory.write(AT, CODE32)
    memory.write(0x5000, bytes(4096))
    # linear 0x400000… is gpa 0… too: by a page of 4 MiB, or by a table of pages of 4 KiB
    directory = [0x87, 0x87] if large else [0x3007, 0x3007]
    memory.write(TABLES, struct.pack("<2I", *directory))
    memory.write(0x3000, struct.pack("<1024I", *(page << 12 | 7 for page in range(1024))))
    control = {"cr0": 0x8000_0011, "cr3": TABLES, "cr4": 0x10}
    vcpu = start(program, **FLAT, rip=0x40_0000 + AT, **control)  # type: ignore[arg-type]
    assert said(program, vcpu) == b"x"
    assert memory.read(0x400, 4) == struct.pack("<I", 42)
    entry = struct.unpack("<I", memory.read(TABLES + 4, 4))[0]
    assert entry & 0x20, "accessed"
    for linear, gpa in ((0x40_1234, 0x1234), (0x80_0000, None)):
        space = structs.TRANSLATION.pack(linear, 0, 0, 0, 0)
        found = program.get(vcpu, requests.KVM_TRANSLATE, len(space), space)
        _, physical, valid, *_ = structs.TRANSLATION.unpack(found)
        assert (valid, physical if valid else None) == (int(gpa is not None), gpa)


@pytest.mark.logs("event delivery in protected mode")
def test_what_is_not_emulated_is_an_internal_error(program: Program) -> None:
    ram(program).write(AT, bytes.fromhex("cd21f4"))
    vcpu = start(program, **FLAT, cr0=0x11)  # type: ignore[arg-type]
    assert program.run(vcpu) == exits.InternalErrorExit(1)
