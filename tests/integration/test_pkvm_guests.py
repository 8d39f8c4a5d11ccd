# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of protected VMs under pKVM: freed under them, given back by them, moved."""

from __future__ import annotations

import os
from typing import Any

import pytest
from booted import AT, MIB, PAGE, WORD, Boot, Guest
from mounts import Mounted

from hwemu.encryptedaccess import Met, Outcome
from kvmsim.confidential.pkvmhost import PkvmHost
from kvmsim.hostmem import HostMemory
from kvmsim.hostpages import HostPages, HostPin
from kvmsim.region import Region
from kvmsim.uapi import KVM_MEM_GUEST_MEMFD
from kvmsim.vmm.bootparams import Technology

pytest_plugins = ["guest_fixtures", "actor_fixtures", "program_fixtures", "booted_fixtures"]
pytestmark = pytest.mark.fuse


def owned(guest: Guest) -> int:
    count: int = guest.guard.describe()["pages"].get("OWNED", 0)
    return count


def ended(guest: Guest, mounted: Mounted, caplog: pytest.LogCaptureFixture) -> str:
    """How the VM has died, and that nothing is left of it."""
    outcome = guest.emulator.wait(30)
    assert outcome is not None
    assert outcome.status != 0
    assert "it must be dying" in outcome.message
    label = guest.emulator.config.label
    assert [record.getMessage() for record in caplog.records] == [f"{label}: {outcome.message}"]
    guest.punch(AT + PAGE, 3)  # of a dead one anything can be freed
    assert mounted.ask("status")["kills"] == 0
    mounted.audit()
    guest.close()
    assert not any(guest.guard.residue().values())
    return outcome.message


def delete_slot(guest: Guest, gpa: int) -> None:
    """KVM_SET_USER_MEMORY_REGION2 of size 0: what lies there stays the guest's for EL2."""
    running = guest.emulator.running
    with running.lock:
        slot = running.vm.mmu.slots.find(gpa // PAGE)
        assert slot is not None
        region = Region(slot.id, KVM_MEM_GUEST_MEMFD, slot.base_gfn * PAGE, 0, slot.userspace_addr)
        zapped = running.vm.set_user_memory_region2(region)
    running.flush_zapped(zapped)


@pytest.mark.logs("vm: dead")
@pytest.mark.parametrize("how", ["in use", "shared", "shrunk", "at work", "no slot"])
def test_a_guest_dies_of_a_page_that_is_freed_under_it(
    host: HostMemory, boot: Boot, mounted: Mounted, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    guest = boot(host, Technology.PKVM)
    if how == "shared":
        assert guest.ask(f"convert {AT:#x} 4 shared").startswith("ok")
    elif how == "at work":
        guest.emulator.feed(f"spin 1 {AT:#x} 4\nspin 0 {AT:#x} 4\n".encode())
        guest.console.expect("ok spin vcpu=0")
    elif how == "no slot":
        delete_slot(guest, AT)
    before = guest.guard.describe()["pages"]
    if how == "shrunk":
        os.truncate(guest.ram, AT)
    else:
        guest.punch(AT, 2)
    after = guest.guard.describe()["pages"]
    if how != "shrunk":
        assert sum(before.values()) - sum(after.values()) == 2
    size = 2 * MIB if how == "shrunk" else 2 * PAGE  # of what it had been given
    assert f"gpa {AT:#x}+{size:#x} is freed" in ended(guest, mounted, caplog)


def test_what_it_has_relinquished_may_be_freed(
    host: HostMemory, boot: Boot, mounted: Mounted
) -> None:
    guest = boot(host, Technology.PKVM)
    before = owned(guest)
    assert guest.ask(f"relinquish {AT + PAGE:#x} 2").startswith("ok")
    assert owned(guest) == before - 2
    assert guest.emulator.host_read(AT + PAGE, 8) == Met(Outcome.DONE, bytes(8)), "wiped"
    guest.punch(AT + PAGE, 2)
    assert guest.number(f"peek {AT + 2 * PAGE:#x}", "value") == 0
    assert guest.whole(AT, 1)
    assert guest.whole(AT + 3 * PAGE, 1)
    assert "error relinquish" in guest.ask(f"relinquish {AT + 1:#x} 1")
    mounted.audit()
    guest.close()
    assert not any(guest.guard.residue().values())


def test_what_it_shares_moves_with_what_it_does_not(
    moving: HostMemory, boot: Boot, mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = boot(moving, Technology.PKVM)
    hyp = guest.platform.hardware(PkvmHost, PkvmHost).hypervisor
    assert guest.ask(f"convert {AT + PAGE:#x} 1 shared").startswith("ok")
    _, old = guest.entry(AT + PAGE)
    guest.compact()
    assert guest.emulator.machine.read_shared(AT + PAGE, 8) == WORD.to_bytes(8, "little")
    _, new = guest.entry(AT + PAGE)
    assert new != old
    assert guest.emulator.host_read(AT, 8) == Met(Outcome.STAGE2_ABORT)
    pin, moves = HostPages.pin, iter([guest.compact])

    def pinned(*where: Any, **how: Any) -> HostPin:
        made = pin(*where, **how)
        for move in moves:
            move()
            assert not made.held
        return made

    monkeypatch.setattr(HostPages, "pin", pinned)
    guest.emulator.machine.write_shared(AT + PAGE, bytes(8))  # moved as the device has it in hand
    assert next(moves, None) is None
    assert guest.number(f"peek {AT + PAGE:#x} shared", "value") == 0
    assert guest.ask(f"convert {AT + PAGE:#x} 1 private").startswith("ok")
    assert guest.whole(AT + 2 * PAGE, 2)
    with guest.emulator.running.lock:
        assert guest.emulator.running.stage2.columns(AT, 1).level[0] == 2, "2 MiB, as before"
    assert hyp.vmemmap.host_state[(old >> 12) - hyp.vmemmap.first] == 0, "the host's again"
    assert not guest.platform.hardware(PkvmHost, PkvmHost).vacated
    mounted.audit()


@pytest.mark.logs("vm: dead")
def test_it_dies_of_what_is_freed_on_its_way(
    moving: HostMemory, boot: Boot, mounted: Mounted, caplog: pytest.LogCaptureFixture
) -> None:
    guest = boot(moving, Technology.PKVM)
    guest.compact()
    guest.punch(AT + PAGE, 1)
    assert f"gpa {AT + PAGE:#x}+{PAGE:#x} is freed" in ended(guest, mounted, caplog)
    assert not guest.platform.hardware(PkvmHost, PkvmHost).vacated
