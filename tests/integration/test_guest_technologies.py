# SPDX-License-Identifier: GPL-2.0-or-later
"""The one guest kernel as a TD, an SNP guest, under pKVM and in a software-protected VM."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from confidential_vm import REPORT, ConfidentialVm, PkvmVm, SnpVm, TdxVm
from guest_vm import PAGE, GuestVm, numbers, values

from kvmsim.vmm.bootparams import BootFlag, RamRange, Technology
from kvmsim.vmm.bounce import SECTOR, Disk
from kvmsim.vmm.launch import PageType
from kvmsim.vmm.machine import MachineConfig, StopReason

pytest_plugins = ["guest_fixtures"]

MIB = 1 << 20
#: Behind the kernel, in a unit of 2 MiB that nothing has touched yet.
FRESH = 12 * MIB
MACHINES: dict[Technology, type[GuestVm]] = {
    Technology.SHARED_BIT: GuestVm,
    Technology.SW_PROTECTED: GuestVm,
    Technology.TDX: TdxVm,
    Technology.SNP: SnpVm,
    Technology.PKVM: PkvmVm,
}
CONFIDENTIAL = [Technology.TDX, Technology.SNP, Technology.PKVM]
ACCEPTING = [Technology.TDX, Technology.SNP]


class MemoryDisk:
    def __init__(self, sectors: int = 2048) -> None:
        self.data = bytearray(sectors * SECTOR)
        self.sectors = sectors

    def read(self, sector: int, count: int) -> bytes:
        return bytes(self.data[sector * SECTOR : (sector + count) * SECTOR])

    def write(self, sector: int, data: bytes) -> None:
        self.data[sector * SECTOR : sector * SECTOR + len(data)] = data


def config(technology: Technology, **changes: object) -> MachineConfig:
    ram = (RamRange(0, 16 * MIB), RamRange(16 * MIB, 1 * MIB, private=False))
    return replace(MachineConfig(ram, vcpus=2, technology=technology), **changes)  # type: ignore[arg-type]


def machine(technology: Technology, disk: Disk | None = None, **changes: object) -> GuestVm:
    return MACHINES[technology](config(technology, **changes), disk)


@pytest.fixture(scope="module", params=list(Technology), ids=lambda t: t.kind)
def any_vm(request: pytest.FixtureRequest, image: bytes) -> Iterator[GuestVm]:
    """One machine of each technology at its prompt; ``output`` holds what it said at boot."""
    with machine(request.param, MemoryDisk()) as vm:
        vm.boot(image)
        vm.boot_said = vm.until("\n> ")  # type: ignore[attr-defined]
        yield vm


def booted(vm: GuestVm, image: bytes) -> str:
    vm.boot(image)
    return vm.until("\n> ")


def technology_of(vm: GuestVm) -> Technology:
    return vm.machine.config.technology


# --- in every technology -----------------------------------------------------------------------


def test_boots_and_says_where(any_vm: GuestVm) -> None:
    said = any_vm.boot_said  # type: ignore[attr-defined]
    technology = technology_of(any_vm)
    where = f"private memory ({technology.kind})" if technology.confidential else "shared memory"
    assert f"boot stage in {where}: 2 vCPUs" in said
    assert "kernel in private memory 0x200000-" in said
    assert "2 vCPUs up" in said
    assert any_vm.machine.statistics.conversions_implicit == 0
    assert any_vm.machine.statistics.unknown_port_accesses == 0


def test_tech_tells_what_it_runs_as(any_vm: GuestVm) -> None:
    technology = technology_of(any_vm)
    told = values(any_vm.command("tech"))
    assert told["name"] == technology.kind
    assert int(told["shared_bit"]) == technology.shared_bit
    assert int(told["private_bit"]) == technology.private_bit
    assert int(told["accepts"]) == technology.accepts
    assert "incomplete" not in told
    expected = {
        Technology.TDX: {"gpaw": 40, "td_vcpus": 2, "vcpu_index": 0},
        Technology.SNP: {"c_bit": 39, "sev_status": 7, "hv_features": 3},
        Technology.PKVM: {"granule": 4096},
    }
    found = {name: int(told[name], 0) for name in expected.get(technology, {})}
    assert found == expected.get(technology, {})


def test_all_vcpus_share_the_memory_test(any_vm: GuestVm) -> None:
    answer = numbers(any_vm.command(f"test {8 * MIB:#x} 64"))
    assert (answer["pages"], answer["errors"]) == (64, 0)
    assert answer["counter"] == answer["expected"] == 40000


def test_convert_round_trip(any_vm: GuestVm) -> None:
    technology = technology_of(any_vm)
    any_vm.command("poke 0x900000 5")
    assert any_vm.command("convert 0x900000 3 shared").startswith("ok convert")
    kept = technology is Technology.PKVM
    assert int.from_bytes(any_vm.read_shared(0x900000, 8), "little") == (5 if kept else 0)
    any_vm.write_shared(0x900000, (6).to_bytes(8, "little"))
    assert numbers(any_vm.command("peek 0x900000 shared"))["value"] == 6
    assert any_vm.command("convert 0x900000 3 private").startswith("ok convert")
    assert numbers(any_vm.command("peek 0x900000"))["value"] == (6 if kept else 0)
    assert any_vm.machine.statistics.conversions_implicit == 0


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("convert 0x900001 1 shared", "the VMM answered -22"),
        ("convert 0x900000 0 shared", "the VMM answered -22"),
        ("convert 0x1000000 1 private", "the VMM answered -22"),
        ("touch", "GPA must be a number"),
        ("port 0x10000", "16 bits"),
        ("port 0x80 256", "8 bits"),
        ("cpuid", "LEAF must be a number"),
        ("rdmsr x", "INDEX must be a number"),
        ("accept 0x900000", "NPAGES must be a number"),
        ("report 0g", "two digits each"),
        ("report " + "00" * 65, "up to 64 bytes"),
        ("bounce", "say read or write"),
        ("bounce copy 0x900000 1 0", "say read or write"),
        ("bounce read 0x200000 1 0", "the kernel lives there"),
        ("bounce read 0x900000 1", "SECTOR must be a number"),
    ],
)
def test_wrong_commands_are_answered(any_vm: GuestVm, line: str, complaint: str) -> None:
    answer = any_vm.command(line)
    assert answer.startswith("error ")
    assert complaint in answer


def test_stray_instructions_work(any_vm: GuestVm) -> None:
    assert numbers(any_vm.command("port 0x80"))["value"] == 0xFF
    assert any_vm.command("port 0x3f8 0x21") == "!ok port port=0x3f8 written=0x21"
    leaf = numbers(any_vm.command("cpuid 0x8000001f"))
    if technology_of(any_vm) is Technology.SNP:
        assert leaf["ebx"] == 39
    if technology_of(any_vm) is Technology.TDX:
        assert (leaf["ebx"], leaf["ecx"], leaf["edx"]) == (1, 2, 3)


def test_devices_in_memory_are_reached(any_vm: GuestVm) -> None:
    before = any_vm.machine.statistics.mmio_accesses
    assert numbers(any_vm.command("peek 0x2000000 shared"))["value"] == (1 << 64) - 1
    assert any_vm.command("poke 0x2000000 1 shared").startswith("ok poke")
    assert any_vm.machine.statistics.mmio_accesses == before + 2


def test_bounced_pages_come_back(any_vm: GuestVm) -> None:
    disk = any_vm.machine.disk
    assert isinstance(disk, MemoryDisk)
    any_vm.command(f"fill {10 * MIB:#x} 70 0x1122334455667788")
    assert any_vm.command(f"bounce write {10 * MIB:#x} 70 8").startswith("ok bounce write")
    assert disk.data[8 * SECTOR :][: 70 * PAGE] == bytes.fromhex("8877665544332211") * (70 * 512)
    any_vm.command(f"fill {10 * MIB:#x} 70 0")
    assert any_vm.command(f"bounce read {10 * MIB:#x} 70 8").startswith("ok bounce read")
    total = numbers(any_vm.command(f"sum {10 * MIB:#x} 70"))["sum"]
    assert total == 0x1122334455667788 * 70 * 512 % (1 << 64)
    assert any_vm.machine.bounce is not None
    assert any_vm.machine.bounce.statistics.written_bytes % (70 * PAGE) == 0
    assert "outside the disk" in any_vm.command(f"bounce read {10 * MIB:#x} 1 2048")
    any_vm.command(f"fill {10 * MIB:#x} 70 0")


# --- in those that begin in private memory -----------------------------------------------------


@pytest.mark.parametrize("technology", CONFIDENTIAL, ids=lambda t: t.kind)
def test_low_memory_is_private_but_for_what_is_shared_for_ever(
    image: bytes, technology: Technology
) -> None:
    with machine(technology) as vm:
        booted(vm, image)
        params = vm.machine.config.boot_params()
        assert vm.machine.is_shared(params.log_gpa, params.log_size)
        assert not vm.machine.is_shared(0x7000, PAGE)
        assert not vm.machine.is_shared(params.bounce_gpa, PAGE)
        assert vm.read_shared(0x20000, 64) == bytes(64), "the image is no business of the host's"
        assert values(vm.command("peek 0x7000"))["side"] == "private"
        assert values(vm.command(f"peek {params.log_gpa:#x}"))["side"] == "shared"


@pytest.mark.parametrize("technology", ACCEPTING, ids=lambda t: t.kind)
def test_memory_is_accepted_when_it_is_used(image: bytes, technology: Technology) -> None:
    with machine(technology) as vm:
        assert isinstance(vm, ConfidentialVm)
        booted(vm, image)
        before = numbers(vm.command("info"))
        assert before["accepted"] + before["unaccepted"] == 14 * MIB
        assert before["accepted"] == 4 * MIB
        touched = vm.command(f"touch {FRESH:#x}")
        assert touched.startswith(f"error touch: gpa {FRESH:#x} (private): #V")
        assert numbers(vm.command("info"))["accepted"] == before["accepted"]
        assert numbers(vm.command(f"peek {FRESH + 8:#x}"))["value"] == 0
        after = numbers(vm.command("info"))
        assert after["accepted"] == before["accepted"] + 2 * MIB
        assert numbers(vm.command(f"touch {FRESH:#x}"))["value"] == 0
        assert (vm.large_accepts, vm.small_accepts) == (3, 0)


@pytest.mark.parametrize("technology", ACCEPTING, ids=lambda t: t.kind)
def test_eager_acceptance_takes_everything(image: bytes, technology: Technology) -> None:
    with machine(technology, flags=BootFlag.EAGER | BootFlag.SELFTEST) as vm:
        assert isinstance(vm, ConfidentialVm)
        said = booted(vm, image)
        assert "accepted all private memory: 14336 KiB" in said
        assert "ok test pages=" in said
        info = numbers(vm.command("info"))
        assert (info["accepted"], info["unaccepted"]) == (14 * MIB, 0)
        assert vm.large_accepts == 7


@pytest.mark.parametrize("technology", ACCEPTING, ids=lambda t: t.kind)
def test_small_mappings_are_accepted_by_4_kib(image: bytes, technology: Technology) -> None:
    with machine(technology) as vm:
        assert isinstance(vm, ConfidentialVm)
        vm.small_units.add(FRESH // (2 * MIB))
        booted(vm, image)
        assert vm.command(f"poke {FRESH:#x} 1").startswith("ok poke")
        assert (vm.large_accepts, vm.small_accepts) == (2, 512)


@pytest.mark.parametrize("technology", ACCEPTING, ids=lambda t: t.kind)
def test_accepting_twice_is_told(image: bytes, technology: Technology) -> None:
    with machine(technology) as vm:
        booted(vm, image)
        first = numbers(vm.command(f"accept {FRESH:#x} 4"))
        assert (first["accepted"], first["lost"]) == (512, 0)
        again = vm.command(f"accept {FRESH:#x} 4")
        assert again == f"error accept: page {FRESH:#x}: already accepted"
        again = vm.command(f"accept {FRESH:#x} 512")
        assert again == f"error accept: page {FRESH:#x}: already accepted"
        assert "the kernel lives there" in vm.command("accept 0x200000 1")
        assert "low memory" in vm.command("accept 0x7000 1")
        assert "already accepted" in vm.command(f"convert {FRESH:#x} 1 private")


@pytest.mark.parametrize("technology", ACCEPTING, ids=lambda t: t.kind)
def test_pages_that_the_host_took_are_lost_and_found_so(
    image: bytes, technology: Technology
) -> None:
    with machine(technology) as vm:
        booted(vm, image)
        vm.command(f"poke {FRESH:#x} 5")
        vm.punch(FRESH // PAGE, 1)
        assert "#V" in vm.command(f"peek {FRESH:#x}"), "an empty page in its place is not used"
        told = numbers(vm.command(f"accept {FRESH:#x} 1"))
        assert (told["accepted"], told["lost"]) == (0, 1)
        assert numbers(vm.command(f"peek {FRESH:#x}"))["value"] == 0


@pytest.mark.parametrize("technology", ACCEPTING, ids=lambda t: t.kind)
def test_memory_that_somebody_else_accepted_is_not_used(
    image: bytes, technology: Technology
) -> None:
    with machine(technology) as vm:
        assert isinstance(vm, ConfidentialVm)
        booted(vm, image)
        vm.small_units.add(FRESH // (2 * MIB))
        vm.usable.add(FRESH // PAGE + 7)
        stop = vm.until_stopped(f"poke {FRESH:#x} 1")
        assert f"panic: accepting {FRESH + 7 * PAGE:#x}: already accepted" in vm.output
        assert stop.reason is StopReason.GUEST_FATAL


def test_a_payload_is_not_accepted_again(image: bytes) -> None:
    for technology in ACCEPTING:
        with machine(technology) as vm:
            vm.boot(image, [(FRESH + PAGE, b"payload!")])
            vm.until("\n> ")
            assert numbers(vm.command(f"peek {FRESH + PAGE:#x}"))["value"] == int.from_bytes(
                b"payload!", "little"
            )
            assert numbers(vm.command(f"peek {FRESH:#x}"))["value"] == 0


@pytest.mark.parametrize("technology", list(Technology), ids=lambda t: t.kind)
def test_report(image: bytes, technology: Technology) -> None:
    with machine(technology) as vm:
        booted(vm, image)
        answer = vm.command("report 00ff10")
        rows = re.findall(r"report (0x[0-9a-f]+): ([0-9a-f]+)\n", answer)
        raw = bytes.fromhex("".join(row for _, row in rows))
        assert [int(at, 16) for at, _ in rows] == list(range(0, len(raw), 32))
        data = bytes.fromhex("00ff10").ljust(64, b"\0")
        expected = {
            Technology.TDX: ("tdreport", data.ljust(1024, b"\xab")),
            Technology.SNP: ("snp-report", data + REPORT),
        }
        kind, content = expected.get(technology, ("none", b""))
        assert answer.splitlines()[-1] == f"ok report kind={kind} bytes={len(content)}"
        assert raw == content
        again = vm.command("report")
        assert again.splitlines()[-1].startswith("ok report")


# --- TDX and SNP alone -------------------------------------------------------------------------


def test_map_gpa_goes_on_where_the_host_says(image: bytes) -> None:
    with machine(Technology.TDX) as vm:
        assert isinstance(vm, TdxVm)
        booted(vm, image)
        vm.retry_after = 8 * PAGE
        assert vm.command(f"convert {FRESH:#x} 50 shared").startswith("ok convert")
        assert vm.machine.is_shared(FRESH, 50 * PAGE)
        assert not vm.machine.is_shared(FRESH + 50 * PAGE, PAGE)


def test_a_td_reports_its_end(image: bytes) -> None:
    with machine(Technology.TDX) as vm:
        assert isinstance(vm, TdxVm)
        vm.boot(image)
        vm.small_units.add(1)
        vm.usable.add(2 * MIB // PAGE)
        stop = vm.until_stopped("")
        assert vm.fatal == b"memory not accepted"
        assert stop.reason is StopReason.GUEST_FATAL


def test_exceptions_are_few_where_the_kernel_asks_by_itself(image: bytes) -> None:
    for technology in ACCEPTING:
        with machine(technology) as vm:
            assert isinstance(vm, ConfidentialVm)
            booted(vm, image)
            vm.command("info")
            assert vm.exceptions == []
            vm.command("port 0x80")
            vm.command("rdmsr 0x8b")
            codes = {Technology.TDX: [30, 31], Technology.SNP: [0x7B, 0x7C]}[technology]
            assert [code for _, code in vm.exceptions] == codes


def test_an_snp_guest_is_loaded_by_typed_pages(image: bytes) -> None:
    with machine(Technology.SNP) as vm:
        assert isinstance(vm, SnpVm)
        vm.boot(image)
        assert {page.type for page in vm.loaded} == set(PageType) - {PageType.UNMEASURED}
        assert [page.vcpu for page in vm.loaded if page.type is PageType.VMSA] == [0, 1]
