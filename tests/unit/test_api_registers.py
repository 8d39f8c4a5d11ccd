# SPDX-License-Identifier: GPL-2.0-or-later
"""Registers to bytes and back, laid out as arch/x86/include/uapi/asm/kvm.h says."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmsim.api.registers import REGS_SIZE, SREGS_SIZE, Dtable, Regs, Segment, Sregs
from kvmsim.uapi.requests import KVM_GET_REGS, KVM_GET_SREGS

U64 = st.integers(0, (1 << 64) - 1)


def size_of(request: int) -> int:
    return request >> 16 & 0x3FFF


def test_the_sizes_are_those_of_the_ioctls() -> None:
    assert size_of(KVM_GET_REGS) == REGS_SIZE
    assert size_of(KVM_GET_SREGS) == SREGS_SIZE


@settings(deadline=None)
@given(st.builds(Regs, *[U64] * 18))
def test_general_registers_come_back(regs: Regs) -> None:
    assert Regs.from_bytes(regs.to_bytes()) == regs


@settings(deadline=None)
@given(st.binary(min_size=SREGS_SIZE, max_size=SREGS_SIZE))
def test_segments_and_control_registers_come_back(data: bytes) -> None:
    """All but the padding of kvm_dtable."""
    sregs = Sregs.from_bytes(data)
    packed = bytearray(data)
    for table in (8 * 24, 8 * 24 + 16):
        packed[table + 10 : table + 16] = bytes(6)
    assert sregs.to_bytes() == packed
    assert Sregs.from_bytes(packed) == sregs


def test_where_things_lie() -> None:
    regs = Regs(rax=1, rsp=2, r8=3, rip=4, rflags=5).to_bytes()
    assert struct.unpack_from("<Q", regs, 0) == (1,)
    assert struct.unpack_from("<QQQ", regs, 6 * 8) == (2, 0, 3)
    assert struct.unpack_from("<QQ", regs, 16 * 8) == (4, 5)
    sregs = Sregs(ss=Segment(selector=0x23, dpl=3), gdt=Dtable(7, 47), cr3=8, efer=9).to_bytes()
    assert struct.unpack_from("<QIHBBB", sregs, 5 * 24) == (0, 0, 0x23, 0, 0, 3)
    assert struct.unpack_from("<QH", sregs, 8 * 24) == (7, 47)
    assert struct.unpack_from("<QQQQQQ", sregs, 8 * 24 + 2 * 16) == (0, 0, 8, 0, 0, 9)


@pytest.mark.parametrize("regs", [Regs(rax=-1), Regs(rip=1 << 64)])
def test_a_value_that_does_not_fit_is_refused(regs: Regs) -> None:
    with pytest.raises(struct.error):
        regs.to_bytes()


@pytest.mark.parametrize(("ring", "code", "data"), [(0, 0x08, 0x10), (3, 0x2B, 0x23)])
def test_long_mode(ring: int, code: int, data: int) -> None:
    before = Sregs(apic_base=0xFEE00900, cr8=2)
    sregs = before.long_mode(0x3000, ring=ring)
    assert (sregs.cs.selector, sregs.ss.selector) == (code, data)
    assert sregs.cs.dpl == sregs.ss.dpl == ring == sregs.ss.selector & 3
    assert (sregs.cs.l, sregs.cs.db) == (1, 0)
    assert sregs.cr3 == 0x3000
    assert sregs.cr0 >> 31 == 1
    assert sregs.cr4 & 1 << 5
    assert sregs.efer & 1 << 8
    assert sregs.efer & 1 << 10
    assert (sregs.apic_base, sregs.cr8) == (0xFEE00900, 2)
