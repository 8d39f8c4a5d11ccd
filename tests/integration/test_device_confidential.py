# SPDX-License-Identifier: GPL-2.0-or-later
"""TDs and SNP guests through the simulated device's ioctls alone, from launch to their end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from confidential_program import (
    FRESH,
    LOAD_R15,
    LOAD_RAX,
    PORT,
    PVALIDATE,
    SHARED,
    STORE_R15,
    STORE_RAX,
    TDCALL,
    SnpGuest,
    Td,
    mov,
    td_out,
    tdvmcall,
    write_ghcb_msr,
)
from device_program import PAGE
from mounts import Mounted, Mounter

from kvmsim import exits
from kvmsim.kind import SHARED_BIT

pytestmark = pytest.mark.fuse


@pytest.fixture
def mounted(mount: Mounter) -> Mounted:
    return mount("personality=guest_memfd,t_ack=300")


@pytest.fixture
def td(mounted: Mounted) -> Iterator[Td]:
    with Td(mounted.path) as program:
        yield program


@pytest.fixture
def snp(mounted: Mounted) -> Iterator[SnpGuest]:
    with SnpGuest(mounted.path) as program:
        yield program


def out(value: int) -> exits.IoExit:
    return exits.IoExit(PORT, 4, True, value.to_bytes(4, "little"))


def test_a_td_runs_what_it_was_loaded_with(td: Td) -> None:
    accept = mov(rax=6, rcx=FRESH, rdx=0) + TDCALL
    code = accept + mov(rbx=FRESH, r15=0x1234) + STORE_R15 + LOAD_R15 + td_out()
    vcpu = td.launch(code)
    assert td.run(vcpu) == out(0x1234)


def test_an_snp_guest_runs_what_it_was_loaded_with(snp: SnpGuest) -> None:
    validate = mov(rax=FRESH, rcx=0, rdx=1) + PVALIDATE
    code = validate + mov(rbx=FRESH, rax=0x1234) + STORE_RAX + LOAD_RAX
    code += write_ghcb_msr(0x100 | 3 << 12)
    vcpu = snp.launch(code)
    assert snp.run(vcpu) == exits.SystemEventExit(6, (0x3100,))
