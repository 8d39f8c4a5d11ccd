# SPDX-License-Identifier: GPL-2.0-or-later
"""The API on a device: nothing leaks, a run can be ended, what may not be touched is an error."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path

import pytest
from kvm.world import RAM, SIZE, World, Worlds, answer, real

from kvmsim import exits
from kvmsim.api import IoctlError, Kvm, Simulation
from kvmsim.api.guest import MAILBOX, SHARED_VIEW, Agent
from kvmsim.uapi import (
    KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CAP_PRE_FAULT_MEMORY,
    KVM_CAP_VM_TYPES,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_SIZE,
)


def held() -> tuple[set[str], int, int]:
    """Descriptors, mappings of devices and files, and threads of this process."""
    fds = set(os.listdir("/proc/self/fd"))
    maps = Path("/proc/self/maps").read_text().count("kvm")
    return fds, maps, threading.active_count()


def use(world: World) -> None:
    file = world.file()
    world.slot(file)
    assert world.store(0, 1) == "done"
    world.vm.create_vcpu()
    memory = world.kvm.allocate(SIZE)
    memory.write(0, b"x")
    memory.close()
    with pytest.raises(IoctlError, match="unmapped"):
        memory.read(0, 1)
    if world.kind == "real":
        file.map().close()


def test_nothing_is_left(worlds: Worlds) -> None:
    with worlds() as world:  # what is loaded once is loaded now
        use(world)
    before = held()
    for _ in range(3):
        with worlds() as world:
            use(world)
    assert held() == before


def test_nothing_is_left_of_what_fails(worlds: Worlds) -> None:
    with worlds() as world:
        use(world)
    before = held()
    with worlds() as world:
        for _ in range(3):
            with pytest.raises(IoctlError):
                world.vm.create_vcpu(1 << 20)
            with pytest.raises(IoctlError):
                world.vm.create_guest_memfd(1)
            with pytest.raises(IoctlError):
                world.kvm.create_vm(77)
            with pytest.raises(IoctlError):
                world.kvm.allocate(0)
    assert held() == before


def test_a_run_is_cancelled_from_another_thread(worlds: Worlds) -> None:
    with worlds() as world:
        world.slot(world.file())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        for _ in range(20):
            world.tell(0)
            world.store(0, 0)
            world.agent.start("race", rcx=RAM, rbx=5, rsi=SHARED_VIEW + MAILBOX)
            runner = threading.Thread(target=world.agent.resume)
            runner.start()
            world.told(1)
            world.agent.vcpu.cancel()
            runner.join()
            assert world.agent.exit == exits.InterruptedExit()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
        assert world.load(0) == "0x5"


def test_a_cancel_before_the_run_is_not_lost(worlds: Worlds) -> None:
    with worlds() as world:
        world.agent.start("load", rcx=RAM)
        world.agent.vcpu.cancel()
        world.agent.vcpu.cancel()
        assert world.agent.resume() == exits.InterruptedExit()
        assert isinstance(world.agent.resume(), exits.MmioExit)


def test_a_cancel_that_meets_another_exit_is_for_the_next_run(worlds: Worlds) -> None:
    """Each cancel interrupts one run, whoever was first."""
    with worlds() as world:
        vcpu = world.agent.vcpu
        world.agent.start("load", rcx=RAM)  # no slot there: an exit at once
        interrupted = 0
        for _ in range(30):
            canceller = threading.Thread(target=vcpu.cancel)
            canceller.start()
            first = world.agent.resume()
            canceller.join()
            if first == exits.InterruptedExit():
                interrupted += 1
            else:
                assert isinstance(first, exits.MmioExit)
                assert world.agent.resume() == exits.InterruptedExit()
                interrupted += 1
            world.agent.start("load", rcx=RAM)
        assert interrupted == 30
        assert isinstance(world.agent.resume(), exits.MmioExit)


def test_settling_takes_no_cancel_away(worlds: Worlds) -> None:
    with worlds() as world:
        left = world.agent.do("load", rcx=RAM)
        assert isinstance(left, exits.MmioExit)
        world.agent.vcpu.complete(bytes(range(8)))
        world.agent.vcpu.cancel()
        world.agent.vcpu.settle()
        assert world.agent.vcpu.regs.rbx == 0x0706050403020100
        assert world.agent.resume() == exits.InterruptedExit()
        assert world.agent.resume() is None


def test_immediate_exit(worlds: Worlds) -> None:
    with worlds() as world:
        world.slot(world.file())
        world.agent.start("store", rcx=RAM, rbx=1)
        world.agent.vcpu.immediate_exit = True
        assert world.agent.resume() == exits.InterruptedExit()
        world.agent.vcpu.immediate_exit = False
        assert world.load(0) == "0x0"


def test_a_signal_of_the_program_ends_a_run(worlds: Worlds) -> None:
    """Ctrl-C works: it interrupts KVM_RUN in the main thread and its handler is called."""

    class Rang(Exception):
        pass

    def ring(number: int, frame: object) -> None:
        raise Rang

    def when_it_runs() -> None:
        world.told(1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    with worlds() as world:
        world.slot(world.file())
        world.agent.start("race", rcx=RAM, rbx=5, rsi=SHARED_VIEW + MAILBOX)
        world.tell(0)
        alarm = threading.Thread(target=when_it_runs)
        before = signal.signal(signal.SIGALRM, ring)
        try:
            alarm.start()
            with pytest.raises(Rang):
                world.agent.resume()
        finally:
            alarm.join()
            signal.signal(signal.SIGALRM, before)
        assert world.load(0) == "0x5"  # and it goes on


def test_what_a_device_reads_is_what_the_guest_gets(worlds: Worlds) -> None:
    with worlds() as world:
        left = world.agent.do("load", rcx=RAM)
        assert left == exits.MmioExit(RAM, 8, False)
        world.agent.vcpu.complete(b"\x11\x22\x33\x44\x55\x66\x77\x88")
        assert world.agent.resume() is None
        assert world.agent.vcpu.regs.rbx == 0x8877665544332211
        left = world.agent.do("store", rcx=RAM, rbx=7)
        assert left == exits.MmioExit(RAM, 8, True, (7).to_bytes(8, "little"))


def test_a_plain_slot_moves(worlds: Worlds) -> None:
    with worlds() as world:
        memory = world.kvm.allocate(SIZE)
        memory.write(0, b"\x2a")
        slot = world.vm.add_slot(RAM, memory)
        assert world.load(0) == "0x2a"
        slot.move(RAM + SIZE)
        assert (world.load(0), world.load(16)) == ("MMIO read +0x0+8", "0x2a")
        slot.write(RAM + SIZE, b"\x2b")
        assert world.load(16) == "0x2b"
        with world.slot(world.file()) as fixed:
            with pytest.raises(IoctlError, match="KVM_SET_USER_MEMORY_REGION2") as caught:
                fixed.move(RAM + 4 * SIZE)
            assert caught.value.errno == errno.EINVAL
            assert fixed.gpa == RAM
        assert world.vm.slots == [world.agent.guest.slot, slot]


@pytest.mark.kvm
def test_memory_that_is_not_the_hosts_is_an_error_and_no_signal() -> None:
    with real() as world:
        memory = world.file(mappable_only=True).map()
        for access in (lambda: memory.read(0, 1), lambda: memory.write(0, b"x")):
            with pytest.raises(IoctlError, match="not the host's") as caught:
                access()
            assert caught.value.errno == errno.EFAULT
        with pytest.raises(IoctlError, match="mmap"):
            world.file(pages=1).map(0, 2 * PAGE_SIZE)
        memory.close()


def test_what_a_kvm_lacks_it_says(worlds: Worlds) -> None:
    """Every capability that a VMM asks for holds what it promises."""
    with worlds() as world:
        slot = world.slot(world.file())
        attributes = world.vm.check_extension(KVM_CAP_MEMORY_ATTRIBUTES)
        converted = answer(lambda: world.vm.convert(RAM, SIZE, private=True))
        assert converted == ("0" if attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE else "ENOTTY")
        vcpu = world.agent.vcpu
        if world.vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY):
            assert vcpu.pre_fault(RAM, SIZE) == 0
            assert answer(lambda: vcpu.pre_fault(RAM + slot.size, SIZE)) == "ENOENT"
        else:
            assert answer(lambda: vcpu.pre_fault(RAM, SIZE)) == "EOPNOTSUPP"
        for number in range(6):
            offered = world.kvm.check_extension(KVM_CAP_VM_TYPES) >> number & 1
            made = answer(lambda number=number: world.kvm.create_vm(number))
            assert made == ("0" if offered else "EINVAL"), number


def test_refusals_say_why(worlds: Worlds) -> None:
    with worlds() as world:
        with pytest.raises(IoctlError) as caught:
            world.vm.create_guest_memfd(SIZE + 1)
        assert caught.value.operation == "KVM_CREATE_GUEST_MEMFD"
        assert str(caught.value).count("KVM_CREATE_GUEST_MEMFD") == 1
        assert str(caught.value).count("EINVAL") == 1


def test_vcpus_run_in_threads_of_their_own(worlds: Worlds) -> None:
    with worlds() as world:
        world.slot(world.file())
        other = Agent(world.agent.guest, world.vm.create_vcpu())
        world.tell(0)
        world.agent.start("race", rcx=RAM, rbx=5, rsi=SHARED_VIEW + MAILBOX)
        runner = threading.Thread(target=world.agent.resume)
        runner.start()
        try:
            world.told(1)
            assert other.load(RAM) == 5
            assert other.store(RAM, 6)
        finally:
            runner.join()
        assert world.agent.exit is None, "it found another's word"


def test_what_came_from_a_closed_kvm_is_closed(worlds: Worlds) -> None:
    """And reaches no other file that has got its number since."""
    with worlds() as world:
        vcpu, vm, file = world.agent.vcpu, world.vm, world.file()
    for call in (
        vcpu.run, vcpu.cancel, lambda: vcpu.regs, lambda: vm.check_extension(0), vm.create_vcpu,
        lambda: file.discard(0, SIZE), lambda: file.map(),
    ):  # fmt: skip
        assert answer(call) == "EBADF"
    with pytest.raises(ValueError, match="closed"):
        world.kvm.create_vm()


@pytest.mark.kvm
def test_no_such_device() -> None:
    with pytest.raises(FileNotFoundError):
        Kvm("/dev/no-such-kvm")
    with pytest.raises(IoctlError, match="KVM_GET_API_VERSION: ENOTTY"):
        Kvm("/dev/null")


def test_worlds_are_apart(worlds: Worlds) -> None:
    with worlds() as one, worlds() as other:
        assert isinstance(one, World)
        one.slot(one.file())
        assert one.store(0, 1) == "done"
        assert other.load(0) == "MMIO read +0x0+8"


@pytest.mark.fuse
def test_a_simulation_is_traced(directory: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with Kvm(Simulation(directory, trace=trace)) as kvm:
        world = World("simulated", kvm)
        world.slot(world.file())
        assert world.store(3, 7) == "done"
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    names = {event["event"] for event in events}
    assert {"kvm_page_fault", "kvm_vm_set_mem_attributes", "kvmsim_page_arrived"} <= names
    (changed,) = [e for e in events if e["event"] == "kvm_vm_set_mem_attributes"]
    assert (changed["start"], changed["end"]) == (RAM >> 12, (RAM + SIZE) >> 12)
    assert RAM + 3 * PAGE_SIZE in [
        event["address"] for event in events if event["event"] == "kvm_page_fault"
    ]
