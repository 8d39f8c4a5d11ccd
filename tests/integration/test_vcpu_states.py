# SPDX-License-Identifier: GPL-2.0-or-later
"""An invalidation reaches vCPUs that run, that wait for a page and that are halted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from actors import Cast, until
from mounts import Mounted, Mounter
from torture import Guest, boot

from kvmsim.hostmem import HostMemory
from kvmsim.vcpus import State
from kvmsim.vmm.loader import LOW_SIZE

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

PAGE = 4096
PAGES = 8192
FREE = 4096  # a file page behind the guest kernel
GPA = LOW_SIZE + FREE * PAGE


@pytest.fixture
def mounted(mount: Mounter) -> Mounted:
    mounted = mount("t_ack=300")
    (mounted.path / "ram").touch()
    os.truncate(mounted.path / "ram", PAGES * PAGE)
    return mounted


@pytest.fixture
def guest(mounted: Mounted, host: HostMemory, image: bytes) -> Iterator[Guest]:
    guest = boot(host, image, mounted.path / "ram")
    yield guest
    guest.close()


def punch(actor: Cast, path: Path, page: int) -> None:
    actor("storm", path, str(page), str(page + 1), "1", "0").expect("done 1 0")


def test_running_vcpus_lose_the_page(guest: Guest, mounted: Mounted, actor: Cast) -> None:
    for vcpu in (0, 1):
        guest.console.command(f"spin {vcpu} {GPA:#x} 1 write")
    running = guest.emulator.running
    until(lambda: FREE in mapped(mounted), "both have the page")
    flushes = running.statistics.flushes
    punch(actor, mounted.path / "ram", FREE)
    until(lambda: running.statistics.flushes >= flushes + 2, "both have flushed")
    found = guest.console.command("stat")
    assert "v0.mismatches=0" in found
    assert "v1.mismatches=0" in found
    mounted.audit()


def test_a_halted_vcpu_flushes_before_it_reads_again(
    guest: Guest, mounted: Mounted, actor: Cast
) -> None:
    guest.console.command(f"poke {GPA:#x} 0x1234")
    guest.console.command(f"spin 1 {GPA:#x} 1 read")
    guest.console.command("stop 1")
    vcpu = guest.emulator.running.vcpus[1]
    until(lambda: vcpu.state is State.HALTED, "the second vCPU is halted")
    punch(actor, mounted.path / "ram", FREE)
    assert vcpu.state is State.HALTED, "nothing woke it"
    assert guest.emulator.running.shootdown.pending(1)
    guest.console.command(f"spin 1 {GPA:#x} 1 read")
    until(lambda: not guest.emulator.running.shootdown.pending(1), "it has flushed")
    assert "value=0x0" in guest.console.command(f"peek {GPA:#x}")
    mounted.audit()


def test_a_vcpu_that_waits_for_a_page_holds_nothing_up(
    guest: Guest, mounted: Mounted, actor: Cast
) -> None:
    path = mounted.path / "ram"
    held = actor("light_user", path, "held", "held")
    held.expect("ready")
    other = actor("light_user", path, "ack", "other")
    other.expect("ready")
    guest.console.command(f"poke {GPA:#x} 0x1234")
    guest.console.command(f"poke {GPA + PAGE:#x} 0x5678")
    caller = actor("storm", path, str(FREE), str(FREE + 1), "1", "0")
    until(lambda: waits(mounted) == {"vm0": 0, "held": 1, "other": 0}, "one has not acknowledged")
    guest.emulator.feed(f"peek {GPA:#x}\n".encode())
    vcpu = guest.emulator.running.vcpus[0]
    until(lambda: vcpu.state is State.WAITS, "the fault is parked")
    other.send(f"punch {FREE + 1} {FREE + 2}")
    until(lambda: waits(mounted) == {"vm0": 0, "held": 2, "other": 0}, "the VM acknowledges too")
    assert vcpu.state is State.WAITS
    held.send("ack")
    held.send("ack")
    caller.expect("done 1 0")
    other.expect("punched 0")
    guest.console.expect(r"ok peek .*value=0x0\b")
    mounted.audit()


def waits(mounted: Mounted) -> dict[str, int]:
    """Unacknowledged invalidations by user."""
    rows = mounted.ask("status")["sessions"]
    return {row["user"].split("(")[0]: row["unacknowledged"] for row in rows}


def mapped(mounted: Mounted) -> set[int]:
    """Pages that somebody was granted."""
    rows = mounted.ask("map", ino=(mounted.path / "ram").stat().st_ino)["rows"]
    return {
        page
        for row in rows
        if row["state"] == "mapped"
        for page in range(row["start"] // PAGE, row["end"] // PAGE)
    }
