# SPDX-License-Identifier: GPL-2.0-or-later
"""Probes: states of a vCPU that cannot be, and lists of odd lengths."""

from __future__ import annotations

import ctypes
from dataclasses import replace

from selftests.probes.bench import RAM, Answers, Bench, probe, said

from kvmsim.api.guest import SHARED_VIEW
from kvmsim.uapi import requests, structs

SPIN = "ebfe"  # 1: jmp 1b


@probe
def states_of_a_processor(bench: Bench) -> Answers:
    """KVM_SET_MP_STATE without an interrupt controller; KVM_INTERRUPT, KVM_NMI."""
    vcpu = bench.vcpu.handle
    found = {
        f"state {number}": bench.ask(vcpu, requests.KVM_SET_MP_STATE, structs.MP_STATE.pack(number))
        for number in range(11)
    }
    space = structs.MP_STATE.pack(99)
    found["get"] = bench.ask(vcpu, requests.KVM_GET_MP_STATE, space)
    for vector in (0, 32, 255, 256, 0xFFFF_FFFF):
        data = structs.INTERRUPT.pack(vector)
        found[f"interrupt {vector}"] = bench.ask(vcpu, requests.KVM_INTERRUPT, data)
    found["nmi"] = bench.ask(vcpu, requests.KVM_NMI)
    return found


@probe
def control_registers_that_cannot_be(bench: Bench) -> Answers:
    """KVM_SET_SREGS: combinations that no processor is in."""
    bench.load(SPIN)
    good = bench.vcpu.sregs

    def set_to(**changed: int) -> str:
        try:
            bench.vcpu.sregs = replace(good, **changed)  # type: ignore[arg-type]
        except OSError as error:
            return said(error)
        bench.vcpu.sregs = good
        return "0"

    pg, pe, pae, lme, lma = 1 << 31, 1, 1 << 5, 1 << 8, 1 << 10
    return {
        "as it is": set_to(),
        "paging without protection": set_to(cr0=good.cr0 & ~pe | pg),
        "long mode without PAE": set_to(cr4=good.cr4 & ~pae),
        "LMA without LME": set_to(efer=good.efer & ~lme | lma),
        "upper half of cr0": set_to(cr0=good.cr0 | 1 << 32),
        "upper half of cr4": set_to(cr4=good.cr4 | 1 << 40),
        "unknown bit of efer": set_to(efer=good.efer | 1 << 20),
        "cr3 beyond the addresses": set_to(cr3=good.cr3 | 1 << 60),
        "LMA without paging": set_to(cr0=good.cr0 & ~pg),
    }


@probe
def lists_with_odd_lengths(bench: Bench) -> Answers:
    """MSRs and CPUID leaves: none, one too many, more than fit in memory."""
    vcpu, kvm = bench.vcpu.handle, bench.kvm.handle
    msrs, cpuid = structs.MSRS.pack, structs.CPUID2.pack
    edge = bench.edge()
    tsc = structs.MSR_ENTRY.pack(0x10, 0)
    nobody = structs.MSR_ENTRY.pack(0x4000_0FFF, 0)
    return {
        "no MSR": bench.ask(vcpu, requests.KVM_GET_MSRS, msrs(0)),
        "one": bench.ask(vcpu, requests.KVM_GET_MSRS, msrs(1) + tsc),
        "an unknown one": bench.ask(vcpu, requests.KVM_GET_MSRS, msrs(1) + nobody),
        "one, unknown, one": bench.ask(vcpu, requests.KVM_GET_MSRS, msrs(3) + tsc + nobody + tsc),
        "256": bench.ask(vcpu, requests.KVM_GET_MSRS, msrs(256) + tsc * 256),
        "255": bench.ask(vcpu, requests.KVM_GET_MSRS, msrs(255) + tsc * 255),
        "two where one fits": bench.ask(vcpu, requests.KVM_GET_MSRS, edge.put(msrs(2) + tsc)),
        "set an unknown one": bench.ask(vcpu, requests.KVM_SET_MSRS, msrs(1) + nobody),
        "CPUID in 0 entries": bench.ask(kvm, requests.KVM_GET_SUPPORTED_CPUID, cpuid(0)),
        "CPUID in 1 entry": bench.ask(kvm, requests.KVM_GET_SUPPORTED_CPUID, cpuid(1) + bytes(40)),
        "set no CPUID": bench.ask(vcpu, requests.KVM_SET_CPUID2, cpuid(0)),
        "set 257": bench.ask(vcpu, requests.KVM_SET_CPUID2, cpuid(257) + bytes(257 * 40)),
        "set beyond memory": bench.ask(vcpu, requests.KVM_SET_CPUID2, edge.put(cpuid(9))),
        "MSR list of 0": bench.ask(kvm, requests.KVM_GET_MSR_INDEX_LIST, structs.MSR_LIST.pack(0)),
    }


@probe
def addresses_that_are_translated(bench: Bench) -> Answers:
    """KVM_TRANSLATE through the guest's own tables."""
    bench.load(SPIN)
    found = {}
    for linear in (0, 0x1234, SHARED_VIEW + 0x8000, RAM + 5, 2 << 30, 1 << 46, 1 << 63, -1):
        space = bench.edge()
        at = space.put(structs.TRANSLATION.pack(linear % (1 << 64), 0, 0, 0, 0))
        answer = bench.ask(bench.vcpu.handle, requests.KVM_TRANSLATE, at)
        data = ctypes.string_at(at, structs.TRANSLATION.size)
        _, gpa, valid, _, _ = structs.TRANSLATION.unpack(data)
        found[hex(linear)] = f"{answer} {gpa:#x} {valid}" if valid else f"{answer} nothing"
    return found
