# SPDX-License-Identifier: GPL-2.0-or-later
"""TDs and SNP guests through the simulated device's ioctls alone, from launch to their end."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from actors import until
from confidential_program import (
    FRESH,
    LOAD_R15,
    LOAD_RAX,
    PORT,
    PVALIDATE,
    RAM,
    ROM,
    ROM_SIZE,
    SHARED,
    STORE_R15,
    STORE_RAX,
    TABLES,
    TDCALL,
    TEXT,
    SnpGuest,
    Td,
    mov,
    reset_page,
    tables,
    td_out,
    tdvmcall,
    write_ghcb_msr,
)
from device_program import PAGE
from mounts import Mounted, Mounter

from hwemu.snp import cpuidpage
from hwemu.snp.guestcontext import IdBlock
from kvmsim import exits
from kvmsim.confidential.snphost import SnpHost, make_host
from kvmsim.device.results import Begun, Failure
from kvmsim.device.sev import SevLaunch
from kvmsim.device.tdx import TdxLaunch
from kvmsim.device.vm import VmDevice
from kvmsim.kind import SHARED_BIT
from kvmsim.uapi import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_PRE_FAULT_MEMORY,
    KVM_RUN_UNION_OFFSET,
    PRE_FAULT_MEMORY,
    requests,
    tdx,
)

pytestmark = pytest.mark.fuse
HYPERCALL_RET = KVM_RUN_UNION_OFFSET + 56
ENCRYPTED = 1 << 4


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


def vm_of(program: Td | SnpGuest) -> VmDevice:
    found = program.process.caller.objects[program.vm]
    assert isinstance(found, VmDevice)
    return found


def refused(call: Callable[[], object]) -> int:
    with pytest.raises(OSError, match="KVM_") as caught:
        call()
    return caught.value.errno or 0


# --- TDs ------------------------------------------------------------------------------------------


def accept(gpa: int) -> bytes:
    return mov(rax=6, rcx=gpa, rdx=0) + TDCALL


def test_a_td_runs_what_it_was_loaded_with(td: Td) -> None:
    code = accept(FRESH) + mov(rbx=FRESH, r15=0x1234) + STORE_R15 + LOAD_R15 + td_out()
    vcpu = td.launch(code)
    assert td.run(vcpu) == out(0x1234)


def test_a_td_converts_memory_and_shares_it(td: Td) -> None:
    gpa = 0x40000
    code = tdvmcall(r11=0x10001, r12=gpa | SHARED_BIT, r13=PAGE)
    code += mov(rbx=SHARED + gpa) + LOAD_R15 + td_out()
    code += tdvmcall(r11=12)  # HLT
    words = {f"r{n}": n for n in range(12, 16)}
    code += tdvmcall(r11=0x10003, **words)  # ReportFatalError
    vcpu = td.launch(code)
    td.forward_hypercalls()
    left = td.run(vcpu)
    assert left == exits.HypercallExit(KVM_HC_MAP_GPA_RANGE, (gpa, 1, 0, 0, 0, 0))
    td.answer(vcpu, HYPERCALL_RET, 0)
    td.attributes(gpa, PAGE, 0)
    vm_of(td).host.write(vm_of(td).memory.side.hpa(_page_of(td, gpa)) or 0, b"\x2a\0\0\0")
    assert td.run(vcpu) == out(0x2A)
    assert td.run(vcpu) == exits.HltExit()
    left = td.run(vcpu)
    assert isinstance(left, exits.SystemEventExit)
    assert left.event == 7
    assert left.data[12:16] == (12, 13, 14, 15)
    assert len(left.data) == 16


def _page_of(program: Td, gpa: int) -> int:
    slot = vm_of(program).running.vm.mmu.slots.find(gpa // PAGE)
    assert slot is not None
    return slot.shared_page(gpa // PAGE)


def test_a_td_whose_vmm_does_not_convert(td: Td) -> None:
    """Nobody has enabled KVM_CAP_EXIT_HYPERCALL: the guest hears no, and the VMM nothing."""
    code = tdvmcall(r11=0x10001, r12=0x40000 | SHARED_BIT, r13=PAGE)
    code += b"\x4d\x89\xd7\x49\xc1\xef\x20" + td_out()  # mov %r10,%r15; shr $32,%r15
    vcpu = td.launch(code)
    assert td.run(vcpu) == out(0x8000_0000)


def test_memory_of_the_wrong_type_leaves_a_td(td: Td) -> None:
    vcpu = td.launch(mov(rbx=SHARED + FRESH) + LOAD_R15 + td_out())
    left = td.run(vcpu)
    assert left == exits.MemoryFaultExit(FRESH, PAGE, False, errno.EFAULT)
    td.attributes(FRESH, PAGE, 0)
    assert td.run(vcpu) == out(0)


def test_devices_and_ports_answer_a_td(td: Td) -> None:
    gpa = 0xD000_0000
    code = tdvmcall(r11=48, r12=4, r13=0, r14=gpa)  # a load from a device
    code += b"\x4d\x89\xdf" + td_out()  # mov %r11,%r15
    code += tdvmcall(r11=30, r12=2, r13=0, r14=PORT) + b"\x4d\x89\xdf" + td_out()
    vcpu = td.launch(code)
    assert td.run(vcpu) == exits.MmioExit(gpa, 4, False)
    td.answer(vcpu, KVM_RUN_UNION_OFFSET + 8, 0x1122_3344)
    assert td.run(vcpu) == out(0x1122_3344)
    assert td.run(vcpu) == exits.IoExit(PORT, 2, False)
    td.run_buffer(vcpu)[PAGE : PAGE + 2] = b"\x34\x12"
    assert td.run(vcpu) == out(0x1234)


def test_vcpus_of_a_td_start_at_the_reset_vector(td: Td) -> None:
    """Each with its index and with what KVM_TDX_INIT_VCPU said."""
    code = b"\x48\xc1\xe6\x08\x4d\x89\xc7\x49\x01\xf7" + td_out()  # r15 = rcx's twin + (rsi << 8)
    td.init_vm()
    vcpus = [td.add_td_vcpu(id, 0x40 + id) for id in (0, 1)]
    td.add_slot(0, 0, RAM)
    td.add_slot(1, ROM, ROM_SIZE)
    td.load(vcpus[1], TABLES, tables(0, SHARED_BIT))
    td.load(vcpus[0], TEXT, code)
    td.load(vcpus[0], ROM + ROM_SIZE - PAGE, reset_page())
    td.finalize()
    assert [td.run(vcpu) for vcpu in vcpus] == [out(0x40), out(0x141)]


def measured(program: Td | SnpGuest) -> str:
    launch = vm_of(program).launch
    assert isinstance(launch, TdxLaunch | SevLaunch)
    found = launch.describe()
    assert found is not None
    return str(found.get("mrtd") or found["measurement"])


def test_a_td_is_measured_page_by_page(mounted: Mounted) -> None:
    """Order and flags count, contents of what is not measured do not."""

    def build(content: bytes, *, measure: bool) -> str:
        with Td(mounted.path) as td:
            td.init_vm()
            vcpu = td.add_td_vcpu()
            td.add_slot(0, 0, RAM)
            td.load(vcpu, 0, b"\1" * 2 * PAGE)
            td.load(vcpu, 4 * PAGE, content, measure=measure)
            td.finalize()
            return measured(td)

    digest = hashlib.sha384()
    for gpa in (0, PAGE, 4 * PAGE):
        digest.update(b"MEM.PAGE.ADD".ljust(16, b"\0") + gpa.to_bytes(8, "little") + bytes(104))
        if gpa < 4 * PAGE:
            for at in range(gpa, gpa + PAGE, 256):
                digest.update(b"MR.EXTEND".ljust(16, b"\0") + at.to_bytes(8, "little") + bytes(104))
                digest.update(b"\1" * 256)
    assert build(b"\2" * PAGE, measure=False) == digest.hexdigest()
    assert build(b"\3" * PAGE, measure=False) == digest.hexdigest()
    assert build(b"\2" * PAGE, measure=True) != digest.hexdigest()


def test_pages_that_a_td_does_not_take(td: Td) -> None:
    td.init_vm()
    vcpu = td.add_td_vcpu()
    td.add_slot(0, 0, RAM)
    source = td.process.ranges.allocate(4 * PAGE).address
    for address, gpa, npages, flags, number in (
        (source + 1, 0, 1, 0, errno.EINVAL),
        (source, 1, 1, 0, errno.EINVAL),
        (source, 0, 0, 0, errno.EINVAL),
        (source, 0, 1, 2, errno.EINVAL),
        (source, (1 << 64) - PAGE, 1, 0, errno.EINVAL),
        (source, SHARED_BIT, 1, 0, errno.EINVAL),
        (source, SHARED_BIT - PAGE, 2, 0, errno.EINVAL),
        (source, 0, 1 << 52, 0, errno.EINVAL),
        (source, RAM, 1, 0, errno.EINVAL),  # no slot
        (PAGE, 0, 1, 0, errno.EFAULT),
    ):
        found = refused(partial(td.load_from, vcpu, address, gpa, npages, flags))
        assert (found, address, gpa) == (number, address, gpa)
        assert td.region == (address, gpa, npages)
    assert refused(lambda: td.command(vcpu, tdx.KVM_TDX_INIT_MEM_REGION, 8)) == errno.EFAULT
    td.attributes(0, PAGE, 0)
    assert refused(lambda: td.load_from(vcpu, source, 0, 1)) == errno.EINVAL  # not private
    td.attributes(0, PAGE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
    assert td.load_from(vcpu, source, 0, 1) == (source + PAGE, PAGE, 0)
    assert refused(lambda: td.load_from(vcpu, source, 0, 1)) == errno.EEXIST


def test_what_was_loaded_before_an_error_stays(td: Td) -> None:
    td.init_vm()
    vcpu = td.add_td_vcpu()
    gmem, _ = td.add_slot(0, 0, RAM)
    source = td.process.ranges.allocate(4 * PAGE).address
    td.attributes(2 * PAGE, PAGE, 0)
    assert refused(lambda: td.load_from(vcpu, source, 0, 4)) == errno.EINVAL
    assert td.region == (source + 2 * PAGE, 2 * PAGE, 2)
    td.attributes(2 * PAGE, PAGE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
    source, gpa, npages = td.region
    assert td.load_from(vcpu, source, gpa, npages)[2] == 0
    # the file is gone: its pages with it
    os.close(gmem)
    td.extra.remove(gmem)


def test_the_host_reaches_no_memory_of_a_file_that_is_gone(td: Td) -> None:
    td.init_vm()
    vcpu = td.add_td_vcpu()
    gmem, _ = td.add_slot(0, 0, RAM)
    source = td.process.ranges.allocate(PAGE).address
    os.close(gmem)
    td.extra.remove(gmem)

    def gone() -> bool:
        try:
            td.load_from(vcpu, source, 0, 1)
        except OSError as error:
            return error.errno == errno.EFAULT
        td.attributes(0, PAGE, 0)  # it was there still: take the page away, and once more
        td.attributes(0, PAGE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        return False

    until(gone, "the file is gone")


def test_a_signal_ends_the_loading_of_a_td(td: Td) -> None:
    td.init_vm()
    vcpu = td.add_td_vcpu()
    td.add_slot(0, 0, RAM)
    npages = RAM // PAGE
    source = td.process.ranges.allocate(RAM).address
    region = ctypes.create_string_buffer(tdx.TDX_INIT_MEM_REGION.pack(source, 0, npages), 24)
    command = tdx.TDX_CMD.pack(
        tdx.KVM_TDX_INIT_MEM_REGION, tdx.KVM_TDX_MEASURE_MEMORY_REGION, ctypes.addressof(region), 0
    )
    space = ctypes.create_string_buffer(command, len(command))
    caller = td.process.caller
    begun = caller.objects[vcpu].ioctl(
        requests.KVM_MEMORY_ENCRYPT_OP, ctypes.addressof(space), caller
    )
    assert isinstance(begun, Begun)
    begun.pending.cancel()
    outcome = begun.pending.wait(60)
    assert isinstance(outcome, Failure)
    assert outcome.errno == errno.EINTR
    at, gpa, left = tdx.TDX_INIT_MEM_REGION.unpack(region.raw)
    assert 0 < left <= npages
    assert (at - source, gpa) == (gpa, (npages - left) * PAGE)
    assert td.load_from(vcpu, at, gpa, left)[2] == 0  # goes on where it was
    td.finalize()


def test_memory_is_mapped_beforehand_once_a_td_is_final(td: Td) -> None:
    code = accept(FRESH) + mov(r15=7) + td_out()
    vcpu = td.launch(code)
    space = ctypes.create_string_buffer(PRE_FAULT_MEMORY.pack(FRESH, 2 * PAGE, 0))
    td.process.ioctl(vcpu, KVM_PRE_FAULT_MEMORY, space)
    assert PRE_FAULT_MEMORY.unpack_from(space)[:2] == (FRESH + 2 * PAGE, 0)
    assert td.run(vcpu) == out(7)


def test_nothing_is_left_of_a_td(td: Td) -> None:
    vcpu = td.launch(accept(FRESH) + td_out())
    td.run(vcpu)
    platform = td.device.platform
    assert platform.pages.used
    td.process.close(vcpu)
    td.process.close(td.vm)
    assert platform.pages.used == 0


# --- SNP guests -----------------------------------------------------------------------------------

GHCB = 0x60000


def terminate(reason: int) -> bytes:
    return write_ghcb_msr(0x100 | reason << 12)


def test_an_snp_guest_runs_what_it_was_loaded_with(snp: SnpGuest) -> None:
    validate = mov(rax=FRESH, rcx=0, rdx=1) + PVALIDATE
    code = validate + mov(rbx=FRESH, rax=3) + STORE_RAX + mov(rax=0) + LOAD_RAX
    code += b"\x48\xc1\xe0\x0c\x48\x0d\x00\x01\x00\x00"  # shl $12,%rax; or $0x100,%rax
    code += b"\x31\xd2\xb9\x30\x01\x01\xc0\x0f\x30\xf3\x0f\x01\xd9"  # WRMSR, VMGEXIT
    vcpu = snp.launch(code)
    assert snp.run(vcpu) == exits.SystemEventExit(6, (0x3100,))


def change(gpa: int, operation: int) -> bytes:
    """SNP Page State Change Request of the GHCB MSR protocol."""
    return write_ghcb_msr(operation << 52 | gpa | 0x14)


def test_an_snp_guest_converts_memory_and_shares_it(snp: SnpGuest) -> None:
    code = change(GHCB, 2) + mov(rbx=SHARED + GHCB, rax=0x55) + STORE_RAX + change(GHCB, 1)
    code += terminate(1)
    vcpu = snp.launch(code)
    snp.forward_hypercalls()
    assert snp.run(vcpu) == exits.HypercallExit(KVM_HC_MAP_GPA_RANGE, (GHCB, 1, 0, 0, 0, 0))
    snp.answer(vcpu, HYPERCALL_RET, 0)
    snp.attributes(GHCB, PAGE, 0)
    left = snp.run(vcpu)
    assert left == exits.HypercallExit(KVM_HC_MAP_GPA_RANGE, (GHCB, 1, ENCRYPTED, 0, 0, 0))
    snp.answer(vcpu, HYPERCALL_RET, 0)
    assert snp.run(vcpu) == exits.SystemEventExit(6, (0x1100,))


def test_an_snp_guest_whose_vmm_does_not_convert(snp: SnpGuest) -> None:
    vcpu = snp.launch(change(GHCB, 2) + terminate(2))
    assert snp.run(vcpu) == exits.SystemEventExit(6, (0x2100,))


def test_memory_of_the_wrong_type_leaves_an_snp_guest(snp: SnpGuest) -> None:
    vcpu = snp.launch(mov(rbx=SHARED + FRESH) + LOAD_RAX + terminate(1))
    assert snp.run(vcpu) == exits.MemoryFaultExit(FRESH, PAGE, False, errno.EFAULT)
    snp.attributes(FRESH, PAGE, 0)
    assert snp.run(vcpu) == exits.SystemEventExit(6, (0x1100,))


@pytest.mark.parametrize("type", [1, 3, 4, 5, 6])
def test_pages_of_each_type_are_loaded(snp: SnpGuest, type: int) -> None:
    snp.init2()
    snp.start()
    snp.add_slot(0, 0, RAM)
    memory = snp.process.ranges.allocate(2 * PAGE)
    done = snp.load_from(memory.address, 3, 2 * PAGE, type)
    assert done == (5, memory.address + (0 if type == 3 else 2 * PAGE), 0)
    assert refused(lambda: snp.load_from(memory.address, 3, PAGE, type)) == errno.EIO
    assert snp.error == 0
    before = measured(snp)
    snp.load_from(memory.address, 5, PAGE, type)
    assert measured(snp) != before
    snp.finish()
    assert refused(lambda: snp.load_from(memory.address, 8, PAGE, type)) == errno.EIO


def test_a_part_of_an_snp_guests_pages(snp: SnpGuest) -> None:
    """Up to what does not work, or the end of the slot: success, and what is left is told."""
    snp.init2()
    snp.start()
    snp.add_slot(0, 0, RAM)
    memory = snp.process.ranges.allocate(4 * PAGE)
    snp.attributes(2 * PAGE, PAGE, 0)
    assert snp.load_from(memory.address, 0, 4 * PAGE) == (
        2, memory.address + 2 * PAGE, 2 * PAGE
    )  # fmt: skip
    assert refused(lambda: snp.load_from(memory.address, 2, PAGE)) == errno.EIO
    last = RAM // PAGE - 1
    assert snp.load_from(memory.address, last, 4 * PAGE) == (
        last + 1, memory.address + PAGE, 3 * PAGE
    )  # fmt: skip
    assert refused(lambda: snp.load_from(PAGE, 8, PAGE)) == errno.EIO  # nothing is at that address
    # a page that its file has lost can be loaded again
    gmem = snp.extra[0]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    assert libc.fallocate(gmem, 3, 0, PAGE) == 0
    assert snp.load_from(memory.address, 0, PAGE)[2] == 0


def test_a_cpuid_page_that_claims_too_much(snp: SnpGuest) -> None:
    """EIO with INVALID_PARAM, and the source page is what would have been accepted."""
    host = snp.device.platform.hardware(SnpHost, make_host)
    host.firmware._cpuid = {(1, 0): (0xF, 0xF0, 0, 0)}
    snp.init2()
    snp.start()
    snp.add_slot(0, 0, RAM)
    memory = snp.process.ranges.allocate(PAGE)
    memory.write(0, cpuidpage.pack({(1, 0): (0xFF, 0xFF, 1, 0)}))
    assert refused(lambda: snp.load_from(memory.address, 3, PAGE, 6)) == errno.EIO
    assert snp.error == 0x16
    accepted = cpuidpage.pack({(1, 0): (0xF, 0xF0, 0, 0)})
    assert memory.read(0, PAGE) == accepted
    assert snp.load_from(memory.address, 3, PAGE, 6)[2] == 0  # which it is now


def test_an_author_says_what_a_launch_must_come_to(mounted: Mounted) -> None:
    """An ID block: the digest and policy that LAUNCH_FINISH compares."""
    for right in (True, False):
        with SnpGuest(mounted.path) as snp:
            snp.init2()
            snp.start()
            snp.add_slot(0, 0, RAM)
            snp.load(0, b"\1" * PAGE)
            digest = bytes.fromhex(measured(snp)) if right else bytes(48)
            block = ctypes.create_string_buffer(IdBlock(digest, 0x30000).pack())
            auth = ctypes.create_string_buffer(4096)
            places = ctypes.addressof(block), ctypes.addressof(auth)
            if right:
                snp.finish(b"h" * 32, *places, block_en=True)
                continue
            finish = partial(snp.finish, b"h" * 32, *places, block_en=True)
            assert refused(finish) == errno.EIO
            assert snp.error == 0x0B  # BAD_MEASUREMENT


def test_nothing_is_left_of_an_snp_guest(snp: SnpGuest) -> None:
    vcpu = snp.launch(terminate(1))
    snp.run(vcpu)
    platform = snp.device.platform
    assert platform.pages.used
    snp.process.close(vcpu)
    snp.process.close(snp.vm)
    assert platform.pages.used == 0


def test_both_kinds_on_one_host(mounted: Mounted) -> None:
    with Td(mounted.path) as td:
        first = td.launch(mov(r15=1) + td_out())
        vm = td.vm
        snp = SnpGuest.__new__(SnpGuest)
        snp.__dict__.update(td.__dict__)
        snp.vcpus = []
        snp.vm = td.ioctl(td.kvm, 0xAE01, None, SnpGuest.kind)
        second = snp.launch(terminate(4))
        assert snp.run(second) == exits.SystemEventExit(6, (0x4100,))
        assert td.run(first) == out(1)
        assert vm != snp.vm
