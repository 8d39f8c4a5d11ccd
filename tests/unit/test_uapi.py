# SPDX-License-Identifier: GPL-2.0-or-later
"""Numbers and layouts against the headers of the kernel that are installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from struct import Struct

import pytest

from kvmsim import uapi
from kvmsim.device import runbuffer
from kvmsim.uapi import capabilities, requests, structs

HEADER = Path("/usr/include/linux/kvm.h")

LAYOUTS = {
    "kvm_cpuid2": structs.CPUID2,
    "kvm_cpuid_entry": structs.CPUID_ENTRY,
    "kvm_cpuid_entry2": structs.CPUID_ENTRY2,
    "kvm_msr_list": structs.MSR_LIST,
    "kvm_msrs": structs.MSRS,
    "kvm_msr_entry": structs.MSR_ENTRY,
    "kvm_device_attr": structs.DEVICE_ATTR,
    "kvm_dirty_log": structs.DIRTY_LOG,
    "kvm_clear_dirty_log": structs.CLEAR_DIRTY_LOG,
    "kvm_enable_cap": structs.ENABLE_CAP,
    "kvm_clock_data": structs.CLOCK_DATA,
    "kvm_irq_level": structs.IRQ_LEVEL,
    "kvm_irqchip": structs.IRQCHIP,
    "kvm_pit_config": structs.PIT_CONFIG,
    "kvm_msi": structs.MSI,
    "kvm_irq_routing": structs.IRQ_ROUTING,
    "kvm_irqfd": structs.IRQFD,
    "kvm_ioeventfd": structs.IOEVENTFD,
    "kvm_coalesced_mmio_zone": structs.COALESCED_MMIO_ZONE,
    "kvm_create_device": structs.CREATE_DEVICE,
    "kvm_regs": structs.REGS,
    "kvm_segment": structs.SEGMENT,
    "kvm_dtable": structs.DTABLE,
    "kvm_sregs": structs.SREGS_SIZE,
    "kvm_sregs2": structs.SREGS2_SIZE,
    "kvm_fpu": structs.FPU,
    "kvm_xsave": structs.XSAVE_SIZE,
    "kvm_xcrs": structs.XCRS_SIZE,
    "kvm_xcr": structs.XCR,
    "kvm_translation": structs.TRANSLATION,
    "kvm_interrupt": structs.INTERRUPT,
    "kvm_mp_state": structs.MP_STATE,
    "kvm_signal_mask": structs.SIGNAL_MASK,
    "kvm_vcpu_events": structs.VCPU_EVENTS,
    "kvm_debugregs": structs.DEBUGREGS,
    "kvm_lapic_state": structs.LAPIC_STATE_SIZE,
    "kvm_guest_debug": structs.GUEST_DEBUG,
    "kvm_x86_mce": structs.X86_MCE,
    "kvm_tpr_access_ctl": structs.TPR_ACCESS_CTL,
    "kvm_vapic_addr": structs.VAPIC_ADDR,
    "kvm_userspace_memory_region": uapi.USERSPACE_MEMORY_REGION,
    "kvm_run": structs.RUN_SIZE,
}

OFFSETS = {
    "offsetof(struct kvm_run, s.regs.regs)": runbuffer.SYNC_REGS[0],
    "offsetof(struct kvm_run, s.regs.sregs)": runbuffer.SYNC_SREGS[0],
    "offsetof(struct kvm_run, s.regs.events)": runbuffer.SYNC_EVENTS[0],
    "offsetof(struct kvm_run, kvm_valid_regs)": 288,
    "offsetof(struct kvm_run, exit_reason)": uapi.KVM_RUN_EXIT_REASON_OFFSET,
    "offsetof(struct kvm_run, ready_for_interrupt_injection)": 12,
    "offsetof(struct kvm_run, apic_base)": 24,
    "offsetof(struct kvm_run, hypercall)": uapi.KVM_RUN_UNION_OFFSET,
    "offsetof(struct kvm_sregs, gdt)": 192,
    "offsetof(struct kvm_sregs, cr0)": 224,
    "offsetof(struct kvm_fpu, xmm)": 152,
    "offsetof(struct kvm_vcpu_events, flags)": 20,
    "offsetof(struct kvm_vcpu_events, exception_payload)": 56,
}


def numbers() -> dict[str, int]:
    known: dict[str, object] = vars(uapi) | vars(requests) | vars(capabilities)
    return {
        name: value
        for name, value in known.items()
        if name.startswith("KVM_") and isinstance(value, int)
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C compiler says of every name that the header has."""
    if shutil.which("gcc") is None or not HEADER.exists():
        pytest.skip("needs gcc and linux-libc-dev")
    header = HEADER.read_text() + Path("/usr/include/x86_64-linux-gnu/asm/kvm.h").read_text()
    words = set(re.findall(r"\w+", header + Path("/usr/include/linux/kvm_para.h").read_text()))
    wanted = {name: name for name in numbers() if name in words}
    wanted |= {f"sizeof(struct {name})": name for name in LAYOUTS if f"struct {name} {{" in header}
    wanted |= {expression: expression for expression in OFFSETS}
    lines = "".join(
        f'printf("%s\\t%llu\\n", "{expression}", (unsigned long long)({expression}));\n'
        for expression in wanted
    )
    folder = tmp_path_factory.mktemp("uapi")
    includes = "".join(
        f"#include <{name}>\n"
        for name in ("errno.h", "stddef.h", "stdio.h", "linux/kvm.h", "linux/kvm_para.h")
    )
    source = folder / "uapi.c"
    source.write_text(f"{includes}int main(void) {{\n{lines}return 0;\n}}\n")
    subprocess.run(["gcc", "-w", "-o", folder / "uapi", source], check=True, timeout=60)
    said = subprocess.run([folder / "uapi"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split("\t") for line in said.splitlines())}


def test_numbers_are_the_kernels(compiled: dict[str, int]) -> None:
    ours = {name: value for name, value in numbers().items() if name in compiled}
    assert len(ours) > 150
    assert {name: value & (1 << 32) - 1 for name, value in ours.items()} == {
        name: compiled[name] & (1 << 32) - 1 for name in ours
    }


def test_structures_have_the_kernels_sizes(compiled: dict[str, int]) -> None:
    ours = {
        f"sizeof(struct {name})": layout.size if isinstance(layout, Struct) else layout
        for name, layout in LAYOUTS.items()
    }
    known = {name: value for name, value in ours.items() if name in compiled}
    assert len(known) > 38
    assert known == {name: compiled[name] for name in known}


def test_fields_are_where_the_kernel_has_them(compiled: dict[str, int]) -> None:
    assert {name: compiled[name] for name in OFFSETS} == OFFSETS


def test_no_two_requests_share_a_number() -> None:
    seen: dict[int, str] = {}
    for name, value in numbers().items():
        if name in vars(requests) and value >> 8 & 0xFF == uapi.KVMIO:
            assert seen.setdefault(value, name) == name
