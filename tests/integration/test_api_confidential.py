# SPDX-License-Identifier: GPL-2.0-or-later
"""The launch of confidential guests through kvmsim.api, which is the kernel's KVM in Python."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace

import pytest
from confidential_program import (
    PORT,
    RAM,
    ROM,
    ROM_SIZE,
    STACK,
    TABLES,
    TEXT,
    mov,
    reset_page,
    tables,
    td_out,
    write_ghcb_msr,
)
from device_program import PAGE
from mounts import Mounter

from kvmsim import exits
from kvmsim.api import IoctlError, Kvm, Regs, Simulation, Vm
from kvmsim.kind import SHARED_BIT
from kvmsim.uapi import KVM_X86_SNP_VM, KVM_X86_TDX_VM

pytestmark = pytest.mark.fuse


@pytest.fixture
def kvm(mount: Mounter) -> Iterator[Kvm]:
    with Kvm(Simulation(mount("personality=guest_memfd").path)) as kvm:
        yield kvm


def add(kvm: Kvm, vm: Vm, gpa: int, size: int) -> None:
    vm.add_slot(gpa, kvm.allocate(size), guest_memfd=vm.create_guest_memfd(size))
    vm.convert(gpa, size, private=True)


def test_a_td(kvm: Kvm) -> None:
    vm = kvm.create_vm(KVM_X86_TDX_VM)
    with pytest.raises(IoctlError) as caught:
        vm.td.init_vm(width=48)
    assert caught.value.errno == errno.EINVAL
    vm.td.init_vm()
    vcpu = vm.create_vcpu()
    vm.td.init_vcpu(vcpu.handle, 7)
    add(kvm, vm, 0, RAM)
    add(kvm, vm, ROM, ROM_SIZE)
    vm.td.load(vcpu.handle, TABLES, tables(0, SHARED_BIT))
    vm.td.load(vcpu.handle, TEXT, mov(r15=5) + td_out(), measure=False)
    vm.td.load(vcpu.handle, ROM + ROM_SIZE - PAGE, reset_page())
    vm.td.finalize()
    assert vcpu.run() == exits.IoExit(PORT, 4, True, b"\5\0\0\0")
    with pytest.raises(IoctlError) as caught:
        print(vcpu.regs)
    assert caught.value.errno == errno.EINVAL


def test_an_snp_guest(kvm: Kvm) -> None:
    vm = kvm.create_vm(KVM_X86_SNP_VM)
    snp = vm.snp
    snp.init()
    with pytest.raises(IoctlError) as caught:
        snp.start(policy=0x20000)
    assert (caught.value.errno, snp.error) == (errno.EIO, 7)
    snp.start()
    vcpu = vm.create_vcpu()
    add(kvm, vm, 0, RAM)
    snp.load(TABLES, tables(SHARED_BIT, 0))
    snp.load(TEXT, write_ghcb_msr(0x2100))
    vcpu.sregs = vcpu.sregs.long_mode(TABLES | SHARED_BIT, ring=0)
    vcpu.regs = replace(Regs(), rip=TEXT, rsp=STACK, rflags=2)
    snp.finish(b"h" * 32)
    assert vcpu.run() == exits.SystemEventExit(6, (0x2100,))
