# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that moves under running vCPUs: no store is lost, every byte stays, addresses change.

Then the same with one rule of the contract switched off, which the guest itself must find out.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torture
from mounts import Mounted, Mounter

from kvmsim.emulator import prepare_process
from kvmsim.hostmem import HostMemory
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SIZE
from kvmsim.vcpus import Vcpu
from privfs import control

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

RAM = 16 << 20
GPA = 10 << 20  # behind the kernel
WORD = 0x1111
ALL = (0, 1 << 32)
WE_ARE_THE_USER = "t_ack=0"
MOVES = 12
#: What the guest says of memory that lost a store, or what ends it.
FOUND = re.compile(r"error test: FAIL|panic:|mismatches=[1-9]|machine check|internal error")


class NoFlush(RunningVm):
    """A vCPU enters guest code with whatever its TLB holds."""

    def _flush(self, vcpu: Vcpu) -> None:
        return


def _moving(fence: str) -> Iterator[HostMemory]:
    interval = sys.getswitchinterval()
    prepare_process()
    host = HostMemory(fence, movable=True)
    yield host
    host.close()
    sys.setswitchinterval(interval)


@pytest.fixture
def moving() -> Iterator[HostMemory]:
    """A host that lets its memory be moved."""
    yield from _moving("auto")


@pytest.fixture
def moving_unfenced() -> Iterator[HostMemory]:
    """The same, with nothing that would stop a vCPU that goes to the old place."""
    yield from _moving("none")


Boot = Callable[..., torture.Guest]


@pytest.fixture
def mounted(mount: Mounter) -> Mounted:
    return mount(WE_ARE_THE_USER)


@pytest.fixture
def ram(mounted: Mounted) -> Path:
    path = mounted.path / "ram"
    path.touch()
    os.truncate(path, RAM)
    return path


@pytest.fixture
def boot(image: bytes, ram: Path) -> Iterator[Boot]:
    made: list[torture.Guest] = []

    def start(host: HostMemory, running: type[RunningVm] = RunningVm) -> torture.Guest:
        made.append(torture.boot(host, image, ram, running=running))
        return made[-1]

    yield start
    for guest in made:
        guest.close()


def hpa(guest: torture.Guest, gpa: int) -> int:
    running = guest.emulator.running
    with running.lock:
        return running.stage2.walk(gpa).hpa


def compact(path: Path) -> int:
    """Move all of a file; return the bytes that were moved."""
    moved: int = control.compact(path, *ALL, lambda progress: None)["bytes"]
    return moved


def test_a_guest_at_work_loses_no_store_and_sees_the_same_bytes(
    mounted: Mounted, ram: Path, moving: HostMemory, boot: Boot
) -> None:
    """``test``: patterns that a neighbour checks, and ``lock inc`` from all vCPUs on a counter."""
    guest = boot(moving)
    command, running = guest.console.command, guest.emulator.running
    command(f"fill {GPA:#x} 64 {WORD:#x}")
    before = hpa(guest, GPA)
    moves = 0
    for _ in range(3):
        guest.emulator.feed(b"test 0xb00000 256\n")
        for _ in range(MOVES // 3):  # a bounded number: each takes the guest all that it has mapped
            assert compact(ram) > 64 * PAGE_SIZE, "the kernel itself is in there"
            moves += 1
        answer = guest.console.expect(r"(ok|error) test.*\n").group(0)
        assert answer.startswith("ok"), answer
    assert f"sum={WORD * 64 * PAGE_SIZE // 8:#x}" in command(f"sum {GPA:#x} 64")
    assert hpa(guest, GPA) != before
    assert running.statistics.pages_moved > 0
    status = mounted.ask("status")
    assert (status["kills"], status["failures"], status["moves"]) == (0, 0, moves)
    mounted.audit()


def test_a_guest_that_writes_while_pages_are_punched_and_moved(
    mounted: Mounted, ram: Path, moving: HostMemory, boot: Boot
) -> None:
    """What is gone without a punch is ``lost``, what is there after one is ``stale``."""
    tortured = torture.Torture(boot(moving), ram, 11)
    tortured.start()

    def bad() -> bool:  # asked after every 25
        compact(ram)
        return False

    tortured.punch(200, bad)
    result = tortured.stop()
    assert (result.punches, result.bad) == (200, 0), result
    assert mounted.ask("status")["moves"] == 8
    mounted.audit()


def test_what_kvm_asks_for_is_that_nothing_moves(
    mounted: Mounted, ram: Path, host: HostMemory, boot: Boot
) -> None:
    guest = boot(host)
    guest.console.command(f"fill {GPA:#x} 64 {WORD:#x}")
    before = hpa(guest, GPA)
    with pytest.raises(control.ControlError, match=r"UNMOVABLE.*, as .+\(\d+\) asked") as caught:
        compact(ram)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert hpa(guest, GPA) == before, "nobody was disturbed"


def test_a_forgotten_flush_loses_stores_and_is_found_out(
    ram: Path, moving_unfenced: HostMemory, boot: Boot
) -> None:
    """The kernel's own stack and data lie in what moves, so that it may not live to tell."""
    guest = boot(moving_unfenced, NoFlush)
    for _ in range(20):
        guest.emulator.feed(b"test 0xb00000 256\n")
        for _ in range(5):
            if not FOUND.search(guest.console.text) and not guest.emulator.running.stop_reason:
                compact(ram)
        try:
            guest.console.expect(r"(ok|error) test.*\n", timeout=5)
        except AssertionError:
            return  # it hangs or has ended: that is found out too
        if FOUND.search(guest.console.text):
            return
    raise AssertionError("nothing was found out")
