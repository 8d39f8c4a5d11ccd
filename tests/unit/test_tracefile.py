# SPDX-License-Identifier: GPL-2.0-or-later
"""A trace on its way to a file, and a VM that tells what happens in it."""

from __future__ import annotations

import ast
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hwemu.cpu.api import Regs, Sregs
from kvmsim import exits, running
from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.main import call
from kvmsim.hostmem import HostMemory, SharedRam
from kvmsim.kind import SHARED_BIT
from kvmsim.region import Region
from kvmsim.running import RunningVm
from kvmsim.trace import Value
from kvmsim.tracedvm import traced
from kvmsim.tracefile import TraceFile
from kvmsim.uapi import PAGE_SIZE

FIELDS: dict[str, Value] = {"rip": 1}


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the file -----------------------------------------------------------------------------------


def test_events_of_many_threads_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"

    def tell(number: int) -> None:
        for count in range(200):
            trace.tell("kvm_entry", "vm", number, {"rip": count})

    with TraceFile(str(path)) as trace:
        threads = [threading.Thread(target=tell, args=(n,), name=f"t{n}") for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    trace.close()
    found = lines(path)
    for number in range(4):
        mine = [line for line in found if line["vcpu"] == number]
        assert [line["rip"] for line in mine] == list(range(200))
        assert {line["task"] for line in mine} == {f"t{number}"}
        times = [line["time"] for line in mine]
        assert times == sorted(times)  # type: ignore[type-var]


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with TraceFile(str(path), limit=0) as trace:
        for _ in range(7):
            trace.tell("kvm_entry", "vm", 0, FIELDS)
    assert lines(path) == [{"event": "lost", "count": 7}]


@pytest.mark.logs("trace /dev/full: No space left on device; it ends here")
def test_a_full_disk_ends_the_trace_alone() -> None:
    trace = TraceFile("/dev/full", "text")
    trace.tell("kvm_entry", "vm", 0, FIELDS)
    trace.close()
    trace.tell("kvm_entry", "vm", 0, FIELDS)
    trace.close()


def test_a_file_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TraceFile(str(tmp_path / "none" / "t"))


@pytest.mark.parametrize(
    ("options", "why"),
    [(["--trace=/nonexistent/t"], "--trace /nonexistent/t: No such file or directory"),
     (["--trace-format=text"], "--trace-format needs --trace FILE"),
     (["--trace=/dev/null", "--trace-format=xml"], "'xml' is not one of")],
)  # fmt: skip
def test_wrong_usage(options: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["boot", "--memory=/nonexistent/ram", *options]) == Exit.USAGE
    assert why in capsys.readouterr().err


# --- a VM ---------------------------------------------------------------------------------------

PML4, PDPT, TABLE, CODE, STACK = 0x1000, 0x2000, 0x3000, 0x8000, 0xC000
SIZE = 16 * PAGE_SIZE
#: mov %rbx,(%rcx); mov $12,%eax; vmmcall; out %al,$0x80; mov 0x10000,%rax (no memory); hlt
PROGRAM = bytes.fromhex("488919 b80c000000 0f01d9 e680 488b042500000100 f4")


class Told:
    """A tracer that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Value]]] = []

    def tell(self, name: str, vm: str, vcpu: int | None, fields: dict[str, Value]) -> None:
        assert vm == "traced"
        self.events.append((name, fields))

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def of(self, name: str) -> list[dict[str, Value]]:
        return [fields for known, fields in self.events if known == name]


@pytest.fixture
def host() -> Iterator[HostMemory]:
    host = HostMemory()
    yield host
    host.close()


def run(host: HostMemory, make: type[RunningVm]) -> list[exits.Exit]:
    """Run PROGRAM in shared memory to its HLT; its exits."""
    vm = make(host, 1, "traced")
    ram = SharedRam(host, SIZE, "traced")
    seen: list[exits.Exit] = []

    def handle(index: int, left: exits.Exit) -> bool:
        seen.append(left)
        match left:
            case exits.HypercallExit():
                vm.vcpus[0].cpu.complete(0)
            case exits.MmioExit(write=False, length=length):
                vm.vcpus[0].cpu.complete(bytes(length))
        return not isinstance(left, exits.HltExit)

    try:
        flags = SHARED_BIT | 7
        ram.write(PML4, struct.pack("<Q", PDPT | flags))
        ram.write(PDPT, struct.pack("<Q", TABLE | flags))
        ram.write(TABLE, struct.pack("<Q", flags | 0x80))
        ram.write(CODE, PROGRAM)
        with vm.lock:
            vm.vm.set_user_memory_region2(Region(0, 0, 0, SIZE, 0), shared=ram)
        cpu = vm.vcpus[0].cpu
        cpu.set_regs(Regs(rip=CODE, rsp=STACK, rcx=STACK, rbx=5))
        cpu.set_sregs(Sregs.long_mode(PML4 | SHARED_BIT))
        vm.make_runnable(0)
        vm.start(handle)
        assert vm.wait(20)
        with vm.lock:
            vm.vm.invalidate_shared(ram, 0, 2)
            zapped = vm.vm.set_memory_attributes(0, PAGE_SIZE, 8)
        assert zapped.ranges
    finally:
        vm.close()
        ram.close()
    return seen


def test_a_vm_tells_the_kernels_story(host: HostMemory) -> None:
    told = Told()
    seen = run(host, traced(told))
    assert [type(left).__name__ for left in seen] == [
        "HypercallExit", "IoExit", "MmioExit", "HltExit",
    ]  # fmt: skip
    names = told.names()
    entries = [name for name in names if name in ("kvm_entry", "kvm_exit")]
    assert entries == ["kvm_entry", "kvm_exit"] * (len(entries) // 2), "entry and exit in turn"
    assert told.of("kvm_entry")[0] == {"rip": CODE}
    first = told.of("kvm_page_fault")[0]
    assert first["rip"] == CODE
    assert told.of("kvm_mmu_set_spte")[0]["access"] == "rwx"
    reasons = [fields["reason"] for fields in told.of("kvm_exit")]
    assert [reason for reason in reasons if reason not in ("npf", "interrupt")] == [
        "hypercall", "io", "hlt",
    ]  # fmt: skip
    store = told.of("kvm_hypercall")
    assert store == [{"nr": 12, "a0": 5, "a1": STACK, "a2": 0, "a3": 0}]
    assert told.of("kvm_pio") == [
        {"direction": "write", "port": 0x80, "size": 1, "count": 1, "val": 0}
    ]
    mmio = told.of("kvm_mmio")
    assert [(fields["type"], fields["gpa"]) for fields in mmio] == [("unsatisfied-read", 0x10000)]
    assert [fields["reason"] for fields in told.of("kvm_userspace_exit")] == [
        "KVM_EXIT_HYPERCALL", "KVM_EXIT_IO", "KVM_EXIT_MMIO", "KVM_EXIT_HLT",
    ]  # fmt: skip
    assert told.of("kvm_unmap_hva_range") == [{"start": 0, "end": 2 * PAGE_SIZE}]
    assert told.of("kvm_vm_set_mem_attributes") == [{"start": 0, "end": 1, "attributes": 8}]
    assert told.of("kvmsim_set_memory_region")[0]["change"] == "create"


def test_a_trace_changes_nothing(host: HostMemory) -> None:
    assert run(host, traced(Told())) == run(host, RunningVm)


def test_what_is_not_traced_knows_no_trace() -> None:
    """No line of the running VM or of the core is there for a trace."""
    package = Path(running.__file__).parent
    for name in ("running", "proven", "vm", "fault", "mmu", "memslot", "attributes", "private"):
        imported = {
            module
            for node in ast.walk(ast.parse((package / f"{name}.py").read_text()))
            if isinstance(node, ast.ImportFrom)
            for module in [node.module or ""]
        }
        assert not any("trace" in module for module in imported), name
