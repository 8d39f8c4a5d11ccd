# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM_MEMORY_ENCRYPT_OP answers and refuses, where no memory is loaded."""

from __future__ import annotations

import contextlib
import ctypes
import errno
from collections.abc import Callable, Iterator

import pytest
from confidential_program import SnpGuest, Td, init_vm
from device_program import PAGE, Program

from kvmsim import uapi
from kvmsim.device import vmsa
from kvmsim.emulator import set_entry
from kvmsim.uapi import requests, sev, structs, tdx
from kvmsim.vmm.vmsa import EntryState, pack_vmsa

BAD = 8  # an address that nobody has
OP = requests.KVM_MEMORY_ENCRYPT_OP


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError, match=r"KVM_|caller memory") as caught:
        yield
    assert caught.value.errno == number, caught.value


@pytest.fixture
def td() -> Iterator[Td]:
    with Td(None) as program:
        yield program


@pytest.fixture
def snp() -> Iterator[SnpGuest]:
    with SnpGuest(None) as program:
        yield program


@pytest.mark.parametrize("type", [uapi.KVM_X86_DEFAULT_VM, uapi.KVM_X86_SW_PROTECTED_VM, 30])
def test_ordinary_vms_have_no_launch(type: int) -> None:
    with Program(type=type) as program:
        vcpu = program.add_vcpu(0)
        with refused(errno.ENOTTY):
            program.ioctl(program.vm, OP, tdx.TDX_CMD, 0, 0, 0, 0)
        with refused(errno.EINVAL):
            program.ioctl(vcpu, OP, tdx.TDX_CMD, 0, 0, 0, 0)
        for request in (uapi.KVM_MEMORY_ENCRYPT_REG_REGION, uapi.KVM_MEMORY_ENCRYPT_UNREG_REGION):
            with refused(errno.ENOTTY):
                program.ioctl(program.vm, request, uapi.ENC_REGION, 0, PAGE)


# --- TDs ------------------------------------------------------------------------------------------


def test_a_td_is_told_what_can_be_had(td: Td) -> None:
    space = ctypes.create_string_buffer(tdx.TDX_CAPABILITIES.size + 8 + 40)
    tail = tdx.TDX_CAPABILITIES.size
    at = ctypes.addressof(space)
    with refused(errno.E2BIG):
        td.command(td.vm, tdx.KVM_TDX_CAPABILITIES, at)
    tdx.CPUID2_HEAD.pack_into(space, tail, 1, 0)
    td.command(td.vm, tdx.KVM_TDX_CAPABILITIES, at)
    attributes, xfam, *more = tdx.TDX_CAPABILITIES.unpack_from(space)
    assert (attributes, xfam, more) == (1 << 28, 3, [0] * 4)
    entry = structs.CPUID_ENTRY2.unpack_from(space, tail + 8)
    assert tdx.CPUID2_HEAD.unpack_from(space, tail) == (1, 0)
    assert entry[:4] == (0x8000_0008, 0, 0, 0xFF << 16)
    # once more, after the TD is there
    td.init_vm(attributes=attributes, xfam=xfam)
    td.command(td.vm, tdx.KVM_TDX_CAPABILITIES, at)


@pytest.mark.parametrize(
    ("id", "data", "flags", "hw_error", "number"),
    [
        (tdx.KVM_TDX_CAPABILITIES, 0, 0, 1, errno.EINVAL),
        (tdx.KVM_TDX_CAPABILITIES, 0, 1, 0, errno.EINVAL),
        (tdx.KVM_TDX_CAPABILITIES, BAD, 0, 0, errno.EFAULT),
        (tdx.KVM_TDX_INIT_VM, 0, 1, 0, errno.EINVAL),
        (tdx.KVM_TDX_INIT_VM, BAD, 0, 0, errno.EFAULT),
        (tdx.KVM_TDX_FINALIZE_VM, 0, 0, 0, errno.EINVAL),
        (tdx.KVM_TDX_INIT_VCPU, 0, 0, 0, errno.EINVAL),
        (tdx.KVM_TDX_INIT_MEM_REGION, 0, 0, 0, errno.EINVAL),
        (tdx.KVM_TDX_GET_CPUID, 0, 0, 0, errno.EINVAL),
        (6, 0, 0, 0, errno.EINVAL),
        (1 << 31, 0, 0, 0, errno.EINVAL),
    ],
)
def test_commands_of_a_td_that_are_refused(
    td: Td, id: int, data: int, flags: int, hw_error: int, number: int
) -> None:
    with refused(number):
        td.command(td.vm, id, data, flags, hw_error)
    td.init_vm()  # nothing was changed


@pytest.mark.parametrize(
    ("number", "parameters"),
    [
        (errno.EINVAL, init_vm(attributes=1)),  # DEBUG
        (errno.EINVAL, init_vm(attributes=1 << 63)),
        (errno.EINVAL, init_vm(xfam=7)),
        (errno.EINVAL, init_vm(width=None)),
        (errno.EINVAL, init_vm(width=48)),
        (errno.EINVAL, init_vm(entries=((1, 0, 0, 0, 0, 0, 0),))),
        (errno.EINVAL, init_vm(padding=1)),
        (errno.EINVAL, init_vm(reserved=bytes(95) + b"\1")),
        (errno.E2BIG, init_vm(nent=257)),
    ],
)
def test_parameters_of_a_td_that_are_refused(td: Td, number: int, parameters: bytes) -> None:
    space = ctypes.create_string_buffer(parameters)
    with refused(number):
        td.command(td.vm, tdx.KVM_TDX_INIT_VM, ctypes.addressof(space))
    with refused(errno.EIO):
        td.add_vcpu(0)
    td.init_vm()


def test_a_td_and_its_vcpus_come_in_order(td: Td) -> None:
    with refused(errno.EIO):
        td.add_vcpu(0)
    td.init_vm(attributes=tdx.TDX_TD_ATTR_SEPT_VE_DISABLE)
    with refused(errno.EINVAL):
        td.init_vm()
    vcpu = td.add_vcpu(0)
    with refused(errno.EINVAL):  # KVM_TDX_INIT_VCPU comes first
        td.load_from(vcpu, 0, 0, 1)
    for flags, hw_error in ((1, 0), (0, 1)):
        with refused(errno.EINVAL):
            td.command(vcpu, tdx.KVM_TDX_INIT_VCPU, 0, flags, hw_error)
    for id in (tdx.KVM_TDX_CAPABILITIES, tdx.KVM_TDX_INIT_VM, tdx.KVM_TDX_FINALIZE_VM, 6):
        with refused(errno.EINVAL):  # commands of the VM
            td.command(vcpu, id)
    td.command(vcpu, tdx.KVM_TDX_INIT_VCPU)
    with refused(errno.EINVAL):
        td.command(vcpu, tdx.KVM_TDX_INIT_VCPU)
    with refused(errno.EINVAL):  # KVM_TDX_FINALIZE_VM comes first
        td.ioctl(vcpu, uapi.KVM_RUN)
    with refused(errno.EOPNOTSUPP):
        td.ioctl(vcpu, uapi.KVM_PRE_FAULT_MEMORY, uapi.PRE_FAULT_MEMORY, 0, PAGE, 0)
    td.finalize()
    with refused(errno.EINVAL):
        td.finalize()
    for id in (tdx.KVM_TDX_INIT_VCPU, tdx.KVM_TDX_INIT_MEM_REGION, tdx.KVM_TDX_GET_CPUID):
        with refused(errno.EINVAL):
            td.command(vcpu, id)
    with refused(errno.EIO):
        td.add_vcpu(1)


def test_a_vcpu_of_a_td_that_was_not_initialized_does_not_run(td: Td) -> None:
    td.init_vm()
    vcpus = td.add_td_vcpu(0), td.add_vcpu(1)
    td.finalize()
    with refused(errno.EINVAL):
        td.ioctl(vcpus[1], uapi.KVM_RUN)
    td.run_buffer(vcpus[0])[uapi.KVM_RUN_IMMEDIATE_EXIT_OFFSET] = 1
    with pytest.raises(OSError, match="immediate"):
        td.ioctl(vcpus[0], uapi.KVM_RUN)


def test_what_cpuid_says_in_a_td(td: Td) -> None:
    td.init_vm()
    vcpu = td.add_td_vcpu()
    space = ctypes.create_string_buffer(8 + 100 * 40)
    with refused(errno.E2BIG):
        td.command(vcpu, tdx.KVM_TDX_GET_CPUID, ctypes.addressof(space))
    count = tdx.CPUID2_HEAD.unpack_from(space)[0]
    assert count > 3
    td.command(vcpu, tdx.KVM_TDX_GET_CPUID, ctypes.addressof(space))
    entries = list(structs.CPUID_ENTRY2.iter_unpack(space.raw[8 : 8 + 40 * count]))
    leaves = {entry[0]: entry[3:] for entry in entries}
    assert leaves[0x8000_0008][0] >> 16 & 0xFF == 40
    assert 0x4000_0000 not in leaves
    with refused(errno.EFAULT):
        td.command(vcpu, tdx.KVM_TDX_GET_CPUID, BAD)


REGISTERS: list[tuple[int, int]] = [
    (requests.KVM_GET_REGS, structs.REGS.size),
    (requests.KVM_SET_REGS, structs.REGS.size),
    (requests.KVM_GET_SREGS, structs.SREGS_SIZE),
    (requests.KVM_SET_SREGS, structs.SREGS_SIZE),
    (requests.KVM_GET_SREGS2, structs.SREGS2_SIZE),
    (requests.KVM_SET_SREGS2, structs.SREGS2_SIZE),
    (requests.KVM_GET_FPU, structs.FPU.size),
    (requests.KVM_SET_FPU, structs.FPU.size),
    (requests.KVM_GET_XSAVE, structs.XSAVE_SIZE),
    (requests.KVM_GET_XSAVE2, structs.XSAVE_SIZE),
    (requests.KVM_SET_XSAVE, structs.XSAVE_SIZE),
    (requests.KVM_GET_XCRS, structs.XCRS_SIZE),
    (requests.KVM_SET_XCRS, structs.XCRS_SIZE),
    (requests.KVM_GET_DEBUGREGS, structs.DEBUGREGS.size),
    (requests.KVM_SET_DEBUGREGS, structs.DEBUGREGS.size),
    (requests.KVM_SET_GUEST_DEBUG, structs.GUEST_DEBUG.size),
]


@pytest.mark.parametrize(("request_", "size"), REGISTERS)
def test_nobody_sees_the_registers_of_a_td(td: Td, request_: int, size: int) -> None:
    td.init_vm()
    vcpu = td.add_vcpu(0)
    with refused(errno.EINVAL):
        td.process.ioctl(vcpu, request_, ctypes.create_string_buffer(size))


def test_model_specific_registers_of_a_td_are_not_the_processors(td: Td) -> None:
    td.init_vm()
    vcpu = td.add_td_vcpu()
    for request in (requests.KVM_GET_MSRS, requests.KVM_SET_MSRS):
        for index, done in ((0xC000_0080, 0), (0x8B, 1)):  # EFER; the microcode's revision
            data = structs.MSRS.pack(1) + structs.MSR_ENTRY.pack(index, 0)
            assert td.put(vcpu, request, data) == done


def test_registers_do_not_travel_in_kvm_run(td: Td) -> None:
    assert td.ioctl(td.vm, uapi.KVM_CHECK_EXTENSION, None, uapi.KVM_CAP_SYNC_REGS) == 0
    assert td.ioctl(td.kvm, uapi.KVM_CHECK_EXTENSION, None, uapi.KVM_CAP_SYNC_REGS) == 7
    td.init_vm()
    vcpu = td.add_td_vcpu()
    td.finalize()
    structs.RUN_SYNC.pack_into(td.run_buffer(vcpu), 288, 1, 0)
    with refused(errno.EINVAL):
        td.ioctl(vcpu, uapi.KVM_RUN)


def test_the_interrupt_controller_of_a_td_is_split(td: Td) -> None:
    def split(program: Program, pins: int) -> None:
        program.ioctl(program.vm, requests.KVM_ENABLE_CAP, structs.ENABLE_CAP,
                      uapi.KVM_CAP_SPLIT_IRQCHIP, 0, pins, 0, 0, 0)  # fmt: skip

    def offered(program: Program) -> int:
        what = uapi.KVM_CAP_SPLIT_IRQCHIP
        return program.ioctl(program.vm, uapi.KVM_CHECK_EXTENSION, None, what)

    assert offered(td) == 1
    with refused(errno.EINVAL):
        split(td, 4097)
    split(td, 24)
    with refused(errno.EEXIST):
        split(td, 24)
    td.init_vm()
    vcpus = [td.add_td_vcpu(id) for id in (0, 1)]
    for vcpu in vcpus:  # neither waits for a SIPI
        state = td.get(vcpu, requests.KVM_GET_MP_STATE, structs.MP_STATE.size)
        assert structs.MP_STATE.unpack(state) == (uapi.KVM_MP_STATE_RUNNABLE,)
    with Program() as ordinary:
        assert offered(ordinary) == 0
        with refused(errno.EINVAL):
            split(ordinary, 24)


def test_regions_are_sevs(td: Td) -> None:
    with refused(errno.ENOTTY):
        td.ioctl(td.vm, uapi.KVM_MEMORY_ENCRYPT_REG_REGION, uapi.ENC_REGION, 0, PAGE)


def test_as_many_tds_as_there_are_keys(td: Td) -> None:
    """ENOSPC, and the next one when a TD is gone."""
    td.init_vm()
    made = []
    for _ in range(31):
        vm = td.ioctl(td.kvm, uapi.KVM_CREATE_VM, None, uapi.KVM_X86_TDX_VM)
        made.append(vm)
        space = ctypes.create_string_buffer(init_vm())
        td.command(vm, tdx.KVM_TDX_INIT_VM, ctypes.addressof(space))
    last = td.ioctl(td.kvm, uapi.KVM_CREATE_VM, None, uapi.KVM_X86_TDX_VM)
    space = ctypes.create_string_buffer(init_vm())
    with refused(errno.ENOSPC):
        td.command(last, tdx.KVM_TDX_INIT_VM, ctypes.addressof(space))
    td.process.close(made.pop())
    td.command(last, tdx.KVM_TDX_INIT_VM, ctypes.addressof(space))
    pages = td.device.platform.pages
    for vm in (*made, last, td.vm):
        td.process.close(vm)
    assert pages.used == 0


# --- SNP guests -----------------------------------------------------------------------------------


def _begun(snp: SnpGuest) -> None:
    snp.init2()


def _started(snp: SnpGuest) -> None:
    snp.init2()
    snp.start()


def _nothing(snp: SnpGuest) -> None:
    pass


START = sev.SNP_LAUNCH_START.pack(0x30000, bytes(16), 0)
UPDATE = sev.SNP_LAUNCH_UPDATE.pack(0, 0, PAGE, 1, 0)
FINISH = sev.SNP_LAUNCH_FINISH.pack(0, 0, 0, 0, 0, bytes(32), 0)


@pytest.mark.parametrize(
    ("before", "id", "data", "number"),
    [
        (_nothing, sev.KVM_SEV_INIT, bytes(48), errno.EINVAL),
        (_nothing, sev.KVM_SEV_ES_INIT, bytes(48), errno.EINVAL),
        (_nothing, sev.KVM_SEV_LAUNCH_START, bytes(48), errno.ENOTTY),
        (_nothing, sev.KVM_SEV_SEND_CANCEL, bytes(48), errno.ENOTTY),
        (_nothing, sev.KVM_SEV_SEND_UPDATE_VMSA, bytes(48), errno.EINVAL),
        (_nothing, 99, bytes(48), errno.EINVAL),
        (_nothing, 103, bytes(48), errno.EINVAL),
        (_nothing, sev.KVM_SEV_INIT2, None, errno.EFAULT),
        (_nothing, sev.KVM_SEV_INIT2, sev.SEV_INIT.pack(1, 0, 2), errno.EINVAL),
        (_nothing, sev.KVM_SEV_INIT2, sev.SEV_INIT.pack(0, 1, 2), errno.EINVAL),
        (_nothing, sev.KVM_SEV_INIT2, sev.SEV_INIT.pack(0, 0, 1), errno.EINVAL),
        (_nothing, sev.KVM_SEV_INIT2, sev.SEV_INIT.pack(0, 0, 3), errno.EINVAL),
        (_nothing, sev.KVM_SEV_SNP_LAUNCH_START, START, errno.ENOTTY),
        (_nothing, sev.KVM_SEV_SNP_LAUNCH_UPDATE, UPDATE, errno.EINVAL),
        (_nothing, sev.KVM_SEV_SNP_LAUNCH_FINISH, FINISH, errno.ENOTTY),
        (_begun, sev.KVM_SEV_INIT2, sev.SEV_INIT.pack(0, 0, 2), errno.EPERM),
        (_begun, sev.KVM_SEV_LAUNCH_START, bytes(48), errno.EPERM),
        (_begun, 99, bytes(48), errno.EPERM),
        (_begun, 103, bytes(48), errno.EINVAL),
        (_begun, sev.KVM_SEV_SNP_LAUNCH_UPDATE, UPDATE, errno.EINVAL),
        (_begun, sev.KVM_SEV_SNP_LAUNCH_FINISH, FINISH, errno.EINVAL),
        (_begun, sev.KVM_SEV_SNP_LAUNCH_START, None, errno.EFAULT),
        (_begun, sev.KVM_SEV_SNP_LAUNCH_START, START[:24] + b"\1" + START[25:], errno.EINVAL),
        (_begun, sev.KVM_SEV_SNP_LAUNCH_START, sev.SNP_LAUNCH_START.pack(0x10000, bytes(16), 0),
         errno.EINVAL),  # bit 17
        (_begun, sev.KVM_SEV_SNP_LAUNCH_START, sev.SNP_LAUNCH_START.pack(0x70000, bytes(16), 0),
         errno.EINVAL),  # a migration agent
        (_begun, sev.KVM_SEV_SNP_LAUNCH_START,
         sev.SNP_LAUNCH_START.pack(1 << 40 | 0x30000, bytes(16), 0), errno.EINVAL),
        (_started, sev.KVM_SEV_SNP_LAUNCH_START, START, errno.EINVAL),
        (_started, sev.KVM_SEV_SNP_LAUNCH_UPDATE, None, errno.EFAULT),
        (_started, sev.KVM_SEV_SNP_LAUNCH_UPDATE, UPDATE, errno.EINVAL),  # no slot
        (_started, sev.KVM_SEV_SNP_LAUNCH_UPDATE, sev.SNP_LAUNCH_UPDATE.pack(0, 0, 0, 1, 0),
         errno.EINVAL),
        (_started, sev.KVM_SEV_SNP_LAUNCH_UPDATE, sev.SNP_LAUNCH_UPDATE.pack(0, 0, 1, 1, 0),
         errno.EINVAL),
        (_started, sev.KVM_SEV_SNP_LAUNCH_UPDATE, sev.SNP_LAUNCH_UPDATE.pack(0, 0, PAGE, 1, 1),
         errno.EINVAL),
        (_started, sev.KVM_SEV_SNP_LAUNCH_UPDATE, sev.SNP_LAUNCH_UPDATE.pack(0, 0, PAGE, 2, 0),
         errno.EINVAL),  # a VMSA
        (_started, sev.KVM_SEV_SNP_LAUNCH_UPDATE, sev.SNP_LAUNCH_UPDATE.pack(0, 0, PAGE, 7, 0),
         errno.EINVAL),
        (_started, sev.KVM_SEV_SNP_LAUNCH_FINISH, None, errno.EFAULT),
        (_started, sev.KVM_SEV_SNP_LAUNCH_FINISH,
         sev.SNP_LAUNCH_FINISH.pack(0, 0, 0, 0, 0, bytes(32), 1), errno.EINVAL),
        (_started, sev.KVM_SEV_SNP_LAUNCH_FINISH,
         sev.SNP_LAUNCH_FINISH.pack(0, 0, 1, 0, 0, bytes(32), 0), errno.EINVAL),
        (_started, sev.KVM_SEV_SNP_LAUNCH_FINISH,
         sev.SNP_LAUNCH_FINISH.pack(BAD, BAD, 1, 0, 0, bytes(32), 0), errno.EFAULT),
    ],
)  # fmt: skip
def test_commands_of_an_snp_guest_that_are_refused(
    snp: SnpGuest, before: Callable[[SnpGuest], None], id: int, data: bytes | None, number: int
) -> None:
    before(snp)
    with refused(number):
        snp.command(id, data, BAD)
    assert snp.error == 0  # the AMD-SP was not asked


def test_a_null_pointer_asks_whether_there_is_sev(snp: SnpGuest) -> None:
    assert snp.process.ioctl(snp.vm, OP, 0) == 0
    with refused(errno.EFAULT):
        snp.process.ioctl(snp.vm, OP, BAD)


def test_the_amd_sp_says_why_it_refuses(snp: SnpGuest) -> None:
    snp.init2()
    with refused(errno.EIO):
        snp.start(policy=0x20000)  # no SMT, on a machine that has it
    assert snp.error == 0x07  # POLICY_FAILURE
    assert snp.device.platform.pages.used == 0
    snp.start()
    snp.finish()
    with refused(errno.EIO):
        snp.finish()
    assert snp.error == 0x02  # INVALID_GUEST_STATE


def test_an_snp_guest_and_its_vcpus_come_in_order(snp: SnpGuest) -> None:
    vcpu = snp.add_vcpu(0)
    with refused(errno.EINVAL):
        snp.ioctl(vcpu, uapi.KVM_RUN)
    with refused(errno.EINVAL):  # KVM_SEV_INIT2 comes before vCPUs
        snp.init2()
    with refused(errno.ENOTTY):
        snp.ioctl(vcpu, OP, sev.SEV_CMD, 0, 0, 0, 0)


def test_registers_are_seen_until_they_are_measured(snp: SnpGuest) -> None:
    snp.init2()
    snp.start()
    vcpu = snp.add_vcpu(0)
    snp.set_regs(vcpu, rip=0x1234)
    assert snp.regs(vcpu)["rip"] == 0x1234
    with refused(errno.EOPNOTSUPP):
        snp.ioctl(vcpu, uapi.KVM_PRE_FAULT_MEMORY, uapi.PRE_FAULT_MEMORY, 0, PAGE, 0)
    with refused(errno.EINVAL):
        snp.ioctl(vcpu, uapi.KVM_RUN)
    snp.finish()
    for request, size in REGISTERS:
        with refused(errno.EINVAL):
            snp.process.ioctl(vcpu, request, ctypes.create_string_buffer(size))
    late = snp.add_vcpu(1)  # it was not measured, and does not run
    with refused(errno.EINVAL):
        snp.ioctl(late, uapi.KVM_RUN)


def test_regions_are_pinned_by_hva(snp: SnpGuest) -> None:
    def region(request: int, address: int, size: int) -> None:
        snp.ioctl(snp.vm, request, uapi.ENC_REGION, address, size)

    pin, unpin = uapi.KVM_MEMORY_ENCRYPT_REG_REGION, uapi.KVM_MEMORY_ENCRYPT_UNREG_REGION
    memory = snp.process.ranges.allocate(4 * PAGE)
    ordinary = ctypes.create_string_buffer(3 * PAGE)
    with refused(errno.ENOTTY):
        region(pin, memory.address, PAGE)
    snp.init2()
    for address, size in ((memory.address, 4 * PAGE), (ctypes.addressof(ordinary), 2 * PAGE)):
        region(pin, address, size)
    for address, size, number in (
        (memory.address, 0, errno.EINVAL),
        ((1 << 64) - PAGE, PAGE, errno.EINVAL),
        (BAD, PAGE, errno.ENOMEM),
    ):
        with refused(number):
            region(pin, address, size)
    with refused(errno.EINVAL):
        region(unpin, memory.address, PAGE)
    region(unpin, memory.address, 4 * PAGE)
    with refused(errno.EINVAL):
        region(unpin, memory.address, 4 * PAGE)
    with refused(errno.EFAULT):
        snp.process.ioctl(snp.vm, pin, BAD)


def test_a_vcpu_is_measured_as_the_boot_protocol_has_it(snp: SnpGuest) -> None:
    """Who starts it by registers, and who writes the save area, come to the same digest."""
    snp.add_vcpu(0)
    cpu = snp.process.caller.objects[snp.vcpus[0]].cpu  # type: ignore[union-attr]
    entry = EntryState(0x20_0000, 0x9000, 1, 0x3000, 0x4000 | 1 << 39, 0x5000, 23)
    set_entry(cpu, entry)
    made = vmsa.pack(
        cpu.get_regs(), cpu.get_sregs(), cpu.get_fpu(), dr6=0xFFFF_0FF0, dr7=0x400,
        pat=cpu.get_msr(0x277),
    )  # fmt: skip
    assert made == pack_vmsa(entry)
