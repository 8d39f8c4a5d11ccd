# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest kernel's work on several vCPUs, and whether stamps tell right from wrong."""

from __future__ import annotations

import pytest
from guest_vm import TEST_GFN, TEST_GPA, GuestVm, numbers, values

from kvmsim.vmm.stamplog import StampLog, Verdict

pytest_plugins = ["guest_fixtures"]

# --- work on several vCPUs ---------------------------------------------------------------------


def wait_for(vm: GuestVm, vcpu: int, counter: str, least: int) -> dict[str, int]:
    """Ask for a vCPU's statistics until a counter has got somewhere."""
    for _ in range(2000):
        stat = numbers(vm.command(f"stat {vcpu}"))
        if stat[f"v{vcpu}.{counter}"] >= least:
            return stat
    raise AssertionError(f"vcpu {vcpu}: {counter} stays below {least}: {stat}")


@pytest.mark.parametrize("pattern", ["random", "seq", "read", "write"])
def test_secondary_vcpu_spins_while_the_console_answers(vm: GuestVm, pattern: str) -> None:
    assert vm.command(f"spin 1 0x400000 64 {pattern}").startswith("ok spin")
    assert "busy" in vm.command("spin 1 0x400000 64")
    assert "stop them first" in vm.command("test 0x400000 1")
    stat = wait_for(vm, 1, "loops", 2000)
    assert stat["v1.mismatches"] == 0
    assert (stat["v1.reads"] == 0) == (pattern == "write")
    assert (stat["v1.writes"] == 0) == (pattern == "read")
    assert values(vm.command("stat 1"))["v1.mode"] == "spin"
    assert vm.command("stop 1") == "ok stop"
    assert values(vm.command("stat 1"))["v1.mode"] == "idle"


def test_memory_test_fails_when_memory_does_not_keep_its_bytes(vm: GuestVm) -> None:
    vm.machine.feed(b"test 0x400000 2048\n")
    while "\n> " not in vm.output:
        vm.step()
        vm.punch(TEST_GFN, 2048)
    assert vm.output.startswith("error test: FAIL pages=2048 errors=")
    assert "first=0x" in vm.output
    assert "counter=40000 expected=40000" in vm.output


def test_spinning_sees_foreign_values_and_zeroes(vm: GuestVm) -> None:
    vm.command("fill 0x400000 8 0xdead")
    vm.command("spin 1 0x400000 8 read")
    assert wait_for(vm, 1, "reads", 100)["v1.mismatches"] > 0
    vm.command("stop")
    vm.punch(TEST_GFN, 8)
    before = numbers(vm.command("stat 1"))["v1.zeros"]
    vm.command("spin 1 0x400000 8 read")
    assert wait_for(vm, 1, "zeros", before + 100)


def test_boot_vcpu_works_between_commands(vm: GuestVm) -> None:
    vm.command("spin 0 0x400000 8")
    assert wait_for(vm, 0, "loops", 2000)["v0.mismatches"] == 0
    assert vm.command("stop") == "ok stop"


def test_watch_reports_the_first_new_value(vm: GuestVm) -> None:
    vm.command("poke 0x400000 5")
    vm.machine.feed(b"watch 0x400000\n")
    vm.until("watching gpa=0x400000 side=private value=0x5\n")
    for _ in range(3):
        vm.step()
    vm.punch(TEST_GFN, 1)
    answer = numbers(vm.until("\n> "))
    assert (answer["before"], answer["after"]) == (5, 0)
    assert answer["reads"] > 1


def test_watch_ends_on_input(vm: GuestVm) -> None:
    vm.machine.feed(b"watch 0x400000\n")
    vm.until("value=0x0\n")
    vm.machine.feed(b"\n")
    assert "ended by input" in vm.until("\n> ")


# --- stamps ------------------------------------------------------------------------------------


def stamp_all(vm: GuestVm, npages: int, vcpus: tuple[int, ...] = (0, 1)) -> StampLog:
    for vcpu in vcpus:
        assert vm.command(f"stamp {vcpu} {TEST_GPA:#x} {npages} {vcpu}").startswith("ok stamp")
    return StampLog(vm)


def run_slices(vm: GuestVm, slices: int) -> None:
    for _ in range(slices):
        vm.step()


def test_stamps_survive_and_every_record_agrees_with_its_verdict(vm: GuestVm) -> None:
    log = stamp_all(vm, 16)
    run_slices(vm, 20)
    for vcpu in range(2):
        stats = log.stats(vcpu)
        assert stats.bad == 0
        assert stats.reads > 100
        assert stats.zeros <= 32, "pages are zero only before their first stamp"
        records = log.records(vcpu)
        assert len(records) > 100
        assert all(r.judged() is r.verdict for r in records)
        assert any(r.verdict is Verdict.SAME for r in records)


def test_punches_are_seen_and_raise_no_alarm(vm: GuestVm) -> None:
    npages = 8
    log = stamp_all(vm, npages)
    for turn in range(60):
        gfn = TEST_GFN + turn % npages
        log.begin_punch(gfn, 1)
        if turn % 3 == 0:
            vm.step()  # the guest goes on between the begin and the punch …
        vm.punch(gfn, 1)
        if turn % 3 == 1:
            vm.step()  # … or between the punch and its return
        log.end_punch(gfn, 1)
        vm.step()
    stats = [log.stats(vcpu) for vcpu in range(2)]
    assert [s.bad for s in stats] == [0, 0], [log.first_bad(v) for v in range(2)]
    assert sum(s.decisive for s in stats) > 10
    assert sum(s.windowed for s in stats) > 0
    assert sum(s.skipped for s in stats) > 0


def bad_after(vm: GuestVm, log: StampLog) -> int:
    run_slices(vm, 6)
    return sum(log.stats(vcpu).bad for vcpu in range(len(vm.cpus)))


def test_a_forgotten_flush_is_caught(vm: GuestVm) -> None:
    log = stamp_all(vm, 4)
    run_slices(vm, 6)
    for page in range(4):
        log.begin_punch(TEST_GFN + page, 1)
        vm.punch(TEST_GFN + page, 1, spare=(1,))
        log.end_punch(TEST_GFN + page, 1)
    assert bad_after(vm, log) > 0
    first = log.first_bad(1)
    assert first is not None
    assert first.judged() is first.verdict
    assert first.verdict.bad


def test_a_forgotten_flush_of_the_only_stamping_vcpu_is_caught(vm: GuestVm) -> None:
    # vcpu 1: the other looks at the console, and the engine flushes after a port access
    log = stamp_all(vm, 4, vcpus=(1,))
    run_slices(vm, 6)
    log.begin_punch(TEST_GFN, 4)
    vm.punch(TEST_GFN, 4, spare=(1,))
    log.end_punch(TEST_GFN, 4)
    assert bad_after(vm, log) > 0
    first = log.first_bad(1)
    assert first is not None
    assert first.verdict is Verdict.STALE


def test_a_punch_that_nobody_asked_for_is_caught(vm: GuestVm) -> None:
    log = stamp_all(vm, 4)
    run_slices(vm, 6)
    vm.punch(TEST_GFN, 4)
    assert bad_after(vm, log) > 0
    verdicts = {r.verdict for v in range(2) if (r := log.first_bad(v)) is not None}
    assert verdicts == {Verdict.LOST}


def test_stamps_keep_to_their_window(vm: GuestVm) -> None:
    assert vm.command("window 0x500000").startswith("ok window")
    assert "outside the window" in vm.command("stamp 1 0x400000 1 1")
    assert vm.command("stamp 1 0x500000 16 1").startswith("ok stamp")
    assert "stop it first" in vm.command("window 0x400000")
    assert StampLog(vm).window_gfn == 0x500
    assert vm.command("stop") == "ok stop"
