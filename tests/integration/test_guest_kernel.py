# SPDX-License-Identifier: GPL-2.0-or-later
"""Boot the guest kernel on the vCPU engine and use its commands, the failing ways too."""

from __future__ import annotations

import pytest
from guest_vm import PAGE, TEST_GFN, TEST_GPA, GuestVm, numbers, small_config, values

from kvmsim.vmm.bootparams import BootFlag, RamRange
from kvmsim.vmm.machine import MachineConfig, StopReason

pytest_plugins = ["guest_fixtures"]

# --- boot --------------------------------------------------------------------------------------


def test_boot_makes_ram_private_and_moves_there(image: bytes) -> None:
    with GuestVm(small_config()) as vm:
        vm.boot(image)
        said = vm.until("\n> ")
        assert "boot stage in shared memory: 2 vCPUs" in said
        assert "private 0x200000-0x1000000: 100%" in said
        assert "kernel in private memory 0x200000-" in said
        assert "2 vCPUs up" in said
        assert vm.machine.statistics.conversions_explicit == 7
        assert vm.machine.statistics.conversions_implicit == 0
        assert vm.machine.statistics.unknown_port_accesses == 0
        # the shared copies went away, the boot stage's low memory did not
        assert vm.read_shared(0x200000, PAGE) == bytes(PAGE)
        assert vm.read_shared(0x20000, 16) != bytes(16)
        assert 0 < vm.private_pages() < 200


def test_boot_with_self_test_and_several_ranges(image: bytes) -> None:
    ram = (
        RamRange(0, 2 << 20, private=False),
        RamRange(3 << 20, 6 << 20),
        RamRange(16 << 20, 1 << 20),
    )
    config = MachineConfig(ram, vcpus=3, flags=BootFlag.SELFTEST)
    with GuestVm(config) as vm:
        vm.boot(image)
        said = vm.until("\n> ")
        assert "kernel goes to 0x300000" in said
        assert "ok test pages=" in said
        assert "errors=0 counter=60000 expected=60000 vcpus=3" in said


def test_boot_without_private_ram_says_why_it_ends(image: bytes) -> None:
    with GuestVm(MachineConfig((RamRange(0, 8 << 20, private=False),))) as vm:
        vm.boot(image)
        stop = vm.until_stopped("")
        assert "no private-capable RAM range" in vm.output
        assert (stop.reason, stop.status) == (StopReason.GUEST_EXIT, 0x7F)


# --- commands ----------------------------------------------------------------------------------


def test_help_names_every_command(shared_vm: GuestVm) -> None:
    answer = shared_vm.command("help")
    names = {usage.split()[0] for usage in answer.removeprefix("ok help ").split(";")}
    assert names >= {"info", "test", "spin", "stamp", "window", "stop", "stat", "peek", "poke"}
    assert names >= {"fill", "sum", "convert", "watch", "jump", "triple", "halt"}


def test_info(shared_vm: GuestVm) -> None:
    info = numbers(shared_vm.command("info"))
    assert info["vcpus"] == 2
    assert info["private_capable"] == 16 << 20
    assert info["shared_only"] == 1 << 20
    assert (info["kernel"], info["shared_bit"], info["log"]) == (0x200000, 39, 0x100000)
    assert info["kernel"] < info["free"] < TEST_GPA


def test_poke_peek_fill_sum(shared_vm: GuestVm) -> None:
    assert shared_vm.command("poke 0x400008 0x1234").startswith("ok poke")
    assert numbers(shared_vm.command("peek 0x400008"))["value"] == 0x1234
    assert numbers(shared_vm.command("sum 0x400000 1"))["sum"] == 0x1234
    assert shared_vm.command("fill 0x400000 2 3").startswith("ok fill")
    assert numbers(shared_vm.command("sum 0x400000 2"))["sum"] == 3 * 1024
    assert shared_vm.command("fill 0x400000 2 0").startswith("ok fill")


def test_shared_memory_is_seen_from_both_sides(shared_vm: GuestVm) -> None:
    shared_vm.write_shared(0x1000, (77).to_bytes(8, "little"))
    peeked = values(shared_vm.command("peek 0x1000"))
    assert (peeked["side"], int(peeked["value"], 0)) == ("shared", 77)
    shared_vm.command("poke 0x1000 78")
    assert shared_vm.read_shared(0x1000, 8) == (78).to_bytes(8, "little")


def test_memory_test_runs_on_all_vcpus(shared_vm: GuestVm) -> None:
    answer = numbers(shared_vm.command("test 0x400000 100"))
    assert (answer["pages"], answer["errors"]) == (100, 0)
    assert answer["counter"] == answer["expected"] == 40000
    assert numbers(shared_vm.command("sum 0x400000 100"))["sum"] == 0


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("frobnicate", "error frobnicate: no such command"),
        ("a b c d e f g", "error line: more than 6 words"),
        ("x" * 300, "error line: longer than"),
        ("peek", "GPA must be a number"),
        ("peek zzz", "GPA must be a number"),
        ("peek 0x", "GPA must be a number"),
        ("peek 99999999999999999999", "GPA must be a number"),
        ("peek 0x400001", "multiple of 8"),
        ("peek 0x8000000000", "below 2^39"),
        ("peek 0x400000 public", "side must be private or shared"),
        ("poke 0x400000", "VALUE must be a number"),
        ("fill 0x400000 0 1", "impossible number of pages"),
        ("fill 0x400800 1 1", "not a multiple of 4096"),
        ("fill 0x200000 1 1", "the kernel lives there"),
        ("fill 0x0 1 1", "low memory"),
        ("fill 0xfff000 2 1", "not inside one RAM range"),
        ("fill 0x400000 0x8000000000000000 1", "impossible number of pages"),
        ("sum 0x20000000 1", "not inside one RAM range"),
        ("test 0x400000", "NPAGES must be a number"),
        ("spin 2 0x400000 1", "no vcpu 2"),
        ("spin 1 0x400000 1 zigzag", "no pattern zigzag"),
        ("stamp 1 0x400000 1", "SEED must be a number"),
        ("window 0x400001", "multiple of 4096"),
        ("stop 7", "no vcpu 7"),
        ("stat 7", "no vcpu 7"),
        ("convert 0x400000 1", "say private or shared"),
        ("convert 0x200000 1 shared", "the kernel lives there"),
        ("convert 0x400001 1 shared", "the VMM answered -22"),
        ("convert 0x400000 0 shared", "the VMM answered -22"),
        ("convert 0x1000000 1 private", "the VMM answered -22"),
        ("watch 0x400004", "multiple of 8"),
        ("jump 0x8000000000", "below 2^39"),
        ("halt now", "STATUS must be a number"),
    ],
)
def test_wrong_commands_are_answered(shared_vm: GuestVm, line: str, complaint: str) -> None:
    answer = shared_vm.command(line)
    assert answer.startswith("error ")
    assert complaint in answer
    assert "\n" not in answer


def test_empty_lines_and_backspace(shared_vm: GuestVm) -> None:
    shared_vm.machine.feed(b"\n   \r")
    assert shared_vm.until("> > ") == "> > "
    assert shared_vm.command("infx\bo").startswith("ok info")


def test_bad_addresses_are_exceptions_that_are_reported(shared_vm: GuestVm) -> None:
    beyond = shared_vm.command("peek 0x7000000000")
    assert "error peek: gpa 0x7000000000 (private): #PF" in beyond
    assert beyond.startswith("error peek")
    assert "#PF" in shared_vm.command("poke 0x7000000000 1")
    # the private alias of low memory is not mapped: it would convert the boot data away
    assert "#PF" in shared_vm.command("peek 0x1000 private")


def test_hole_reads_float_high(shared_vm: GuestVm) -> None:
    before = shared_vm.machine.statistics.mmio_accesses
    assert numbers(shared_vm.command("peek 0x2000000 shared"))["value"] == (1 << 64) - 1
    assert shared_vm.command("poke 0x2000000 1 shared").startswith("ok poke")
    assert shared_vm.machine.statistics.mmio_accesses == before + 2


# --- conversions -------------------------------------------------------------------------------


def test_explicit_conversion_round_trip(vm: GuestVm) -> None:
    vm.command("poke 0x400000 5")
    before = vm.private_pages()
    assert vm.command("convert 0x400000 4 shared").startswith("ok convert")
    assert vm.private_pages() == before - 1
    vm.write_shared(TEST_GPA, (6).to_bytes(8, "little"))
    assert numbers(vm.command("peek 0x400000 shared"))["value"] == 6
    assert vm.command("convert 0x400000 4 private").startswith("ok convert")
    assert numbers(vm.command("peek 0x400000"))["value"] == 0, "the old private page was freed"
    assert vm.read_shared(TEST_GPA, 8) == bytes(8)
    assert vm.machine.statistics.conversions_implicit == 0


def test_access_of_the_other_type_converts(vm: GuestVm) -> None:
    vm.command("poke 0x400000 5")
    assert numbers(vm.command("peek 0x400000 shared"))["value"] == 0
    assert vm.machine.statistics.conversions_implicit == 1
    assert numbers(vm.command("peek 0x400000 private"))["value"] == 0
    assert vm.machine.statistics.conversions_implicit == 2


def test_private_access_without_a_private_side_ends_the_machine(vm: GuestVm) -> None:
    stop = vm.until_stopped("peek 0x1000000 private")
    assert stop.reason is StopReason.MEMORY
    assert "0x1000000" in stop.message


# --- code, halting, dying ----------------------------------------------------------------------


@pytest.mark.parametrize("side", ["private", "shared"])
def test_jump_runs_code_and_comes_back(vm: GuestVm, side: str) -> None:
    if side == "shared":
        vm.command("convert 0x400000 1 shared")
    # mov eax, 42; ret – then the same page with another number: new code must be seen
    for value in (42, 43):
        code = bytes([0xB8, value, 0, 0, 0, 0xC3, 0, 0])
        vm.command(f"poke 0x400000 {int.from_bytes(code, 'little')} {side}")
        assert numbers(vm.command(f"jump 0x400000 {side}"))["returned"] == value


def test_jump_to_what_is_no_code_is_reported(vm: GuestVm) -> None:
    vm.command(f"poke 0x400000 {int.from_bytes(bytes([0x0F, 0x0B]), 'little')}")
    answer = vm.command("jump 0x400000")
    assert answer.startswith("error jump: gpa 0x400000 (private): #UD invalid opcode")
    assert vm.command("info").startswith("ok info")


def break_private_map(vm: GuestVm) -> None:
    """Take the private direct map out of the guest's page tables, under its feet."""
    pml4 = vm.cpus[0].get_sregs().cr3
    assert vm.command(f"poke {pml4 + 256 * 8:#x} 0").startswith("ok poke")
    vm.punch(TEST_GFN, 1)  # so that the vCPUs forget what they have cached


def test_unexpected_exception_of_a_secondary_vcpu_kills_it_alone(vm: GuestVm) -> None:
    break_private_map(vm)
    vm.machine.feed(b"spin 1 0x400000 1\n")
    said = vm.until("\n") + vm.until("\n")
    if "> " not in said:
        vm.until("> ")
    assert "ok spin" in said  # before or after the panic
    assert "panic: vcpu 1: #PF page fault, error 0x0, rip 0xffffffff80" in said
    assert values(vm.command("stat 1"))["v1.mode"] == "dead"
    assert "is dead" in vm.command("stop 1")
    assert "busy or dead" in vm.command("spin 1 0x400000 1")
    assert "#PF" in vm.command("peek 0x400000")


def test_unexpected_exception_of_the_boot_vcpu_ends_the_machine(vm: GuestVm) -> None:
    break_private_map(vm)
    stop = vm.until_stopped("spin 0 0x400000 1")
    assert "panic: vcpu 0: #PF page fault" in vm.output
    assert (stop.reason, stop.status) == (StopReason.GUEST_EXIT, 0x7F)


def test_triple_fault_ends_the_machine(vm: GuestVm) -> None:
    assert vm.until_stopped("triple").reason is StopReason.SHUTDOWN


@pytest.mark.parametrize(("line", "status"), [("halt", 0), ("halt 7", 7)])
def test_halt_ends_with_the_status_that_was_asked(vm: GuestVm, line: str, status: int) -> None:
    stop = vm.until_stopped(line)
    assert (stop.reason, stop.status) == (StopReason.GUEST_EXIT, status)
