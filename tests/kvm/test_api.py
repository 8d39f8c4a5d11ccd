# SPDX-License-Identifier: GPL-2.0-or-later
"""The API on a device: nothing leaks, a run can be ended, what may not be touched is an error."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import pytest
from kvm.world import MAPPABLE, RAM, SHARED, SIZE, World, real

from kvmsim import exits
from kvmsim.api import IoctlError, Kvm
from kvmsim.api.guest import MAILBOX, SHARED_VIEW
from kvmsim.uapi import KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_PRE_FAULT_MEMORY, PAGE_SIZE

pytestmark = pytest.mark.kvm


def held() -> tuple[set[str], int, int]:
    """Descriptors, mappings of devices and files, and threads of this process."""
    fds = set(os.listdir("/proc/self/fd"))
    maps = Path("/proc/self/maps").read_text().count("kvm")
    return fds, maps, threading.active_count()


def test_nothing_is_left(tmp_path: Path) -> None:
    with real() as world:  # what is loaded once is loaded now
        world.store(0, 0)
    before = held()
    for _ in range(3):
        with real() as world:
            file = world.file()
            memory = file.map()
            world.slot(file, memory=memory)
            assert world.store(0, 1) == "done"
            world.vm.create_vcpu()
            memory.close()
            with pytest.raises(IoctlError, match="unmapped"):
                memory.read(0, 1)
    assert held() == before


def test_a_run_is_cancelled_from_another_thread() -> None:
    with real() as world:
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


def test_a_cancel_before_the_run_is_not_lost() -> None:
    with real() as world:
        world.agent.start("load", rcx=RAM)
        world.agent.vcpu.cancel()
        world.agent.vcpu.cancel()
        assert world.agent.resume() == exits.InterruptedExit()
        assert isinstance(world.agent.resume(), exits.MmioExit)


def test_immediate_exit() -> None:
    with real() as world:
        world.slot(world.file())
        world.agent.start("store", rcx=RAM, rbx=1)
        world.agent.vcpu.immediate_exit = True
        assert world.agent.resume() == exits.InterruptedExit()
        world.agent.vcpu.immediate_exit = False
        assert world.load(0) == "0x0"


def test_a_signal_of_the_program_ends_a_run() -> None:
    """Ctrl-C works: it interrupts KVM_RUN in the main thread and its handler is called."""

    class Rang(Exception):
        pass

    def ring(number: int, frame: object) -> None:
        raise Rang

    with real() as world:
        world.slot(world.file())
        world.agent.start("race", rcx=RAM, rbx=5, rsi=SHARED_VIEW + MAILBOX)
        before = signal.signal(signal.SIGALRM, ring)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Rang):
                world.agent.resume()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert world.load(0) == "0x5"  # and it goes on


def test_what_a_device_reads_is_what_the_guest_gets() -> None:
    with real() as world:
        left = world.agent.do("load", rcx=RAM)
        assert left == exits.MmioExit(RAM, 8, False)
        world.agent.vcpu.complete(b"\x11\x22\x33\x44\x55\x66\x77\x88")
        assert world.agent.resume() is None
        assert world.agent.vcpu.regs.rbx == 0x8877665544332211
        left = world.agent.do("store", rcx=RAM, rbx=7)
        assert left == exits.MmioExit(RAM, 8, True, (7).to_bytes(8, "little"))


def test_a_plain_slot_moves() -> None:
    with real() as world:
        memory = world.kvm.allocate(SIZE)
        memory.write(0, b"\x2a")
        slot = world.vm.add_slot(RAM, memory)
        assert world.load(0) == "0x2a"
        slot.move(RAM + SIZE)
        assert (world.load(0), world.load(16)) == ("MMIO read +0x0+8", "0x2a")
        slot.write(RAM + SIZE, b"\x2b")
        assert world.load(16) == "0x2b"
        file = world.file()
        with world.slot(file) as fixed:
            with pytest.raises(IoctlError, match="KVM_SET_USER_MEMORY_REGION2") as caught:
                fixed.move(RAM + 4 * SIZE)
            assert caught.value.errno == errno.EINVAL
            assert fixed.gpa == RAM
        assert world.vm.slots == [world.agent.guest.slot, slot]


def test_memory_that_is_not_the_hosts_is_an_error_and_no_signal() -> None:
    with real() as world:
        memory = world.file(flags=MAPPABLE).map()
        for access in (lambda: memory.read(0, 1), lambda: memory.write(0, b"x")):
            with pytest.raises(IoctlError, match="not the host's") as caught:
                access()
            assert caught.value.errno == errno.EFAULT
        beyond = world.file(pages=1, flags=SHARED)
        with pytest.raises(IoctlError, match="mmap"):
            beyond.map(0, 2 * PAGE_SIZE)
        memory.close()


def test_what_a_kernel_lacks_it_says() -> None:
    with real() as world:
        if not world.kvm.check_extension(KVM_CAP_MEMORY_ATTRIBUTES):
            with pytest.raises(IoctlError, match="KVM_SET_MEMORY_ATTRIBUTES: ENOTTY"):
                world.vm.convert(RAM, SIZE, private=True)
        if not world.kvm.check_extension(KVM_CAP_PRE_FAULT_MEMORY):
            with pytest.raises(IoctlError, match="KVM_PRE_FAULT_MEMORY: EOPNOTSUPP"):
                world.agent.vcpu.pre_fault(RAM, SIZE)


def test_no_such_device() -> None:
    with pytest.raises(FileNotFoundError):
        Kvm("/dev/no-such-kvm")
    with pytest.raises(IoctlError, match="KVM_GET_API_VERSION: ENOTTY"):
        Kvm("/dev/null")


def test_worlds_are_apart() -> None:
    with real() as one, real() as other:
        assert isinstance(one, World)
        one.slot(one.file())
        assert one.store(0, 1) == "done"
        assert other.load(0) == "MMIO read +0x0+8"
