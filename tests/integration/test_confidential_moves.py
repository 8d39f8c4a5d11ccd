# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory of confidential guests is moved: what they accepted they keep, with what lies in it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from booted import AT, PAGE, RAM, WORD, Boot
from mounts import Mounted

from hwemu.encryptedaccess import Encrypt, Outcome
from hwemu.snp.guestops import Leaf, Vcpu, rmpadjust
from hwemu.snp.outcome import GuestStatus, Returned
from kvmsim.confidential.snphost import SnpHost, make_host
from kvmsim.hostmem import HostMemory
from kvmsim.region import Region
from kvmsim.uapi import KVM_MEM_GUEST_MEMFD
from kvmsim.vmm.bootparams import Technology
from privfs import control

pytest_plugins = ["guest_fixtures", "actor_fixtures", "program_fixtures", "booted_fixtures"]
pytestmark = pytest.mark.fuse

#: How many pages the hardware says are the guest's.
PAGES_OF: dict[Technology, Callable[[dict[str, Any]], int]] = {
    Technology.TDX: lambda told: told["pamt_pages"]["REG"],
    Technology.SNP: lambda told: told["frames"],
    Technology.PKVM: lambda told: told["pages"]["OWNED"],
}
each = pytest.mark.parametrize("technology", PAGES_OF, ids=lambda technology: technology.kind)
accepting = pytest.mark.parametrize(
    "technology",
    [technology for technology in PAGES_OF if technology.accepts],
    ids=lambda technology: technology.kind,
)


@each
@pytest.mark.parametrize("encrypt", [Encrypt.VIEW, None])
def test_what_was_accepted_stays_accepted(
    moving: HostMemory,
    boot: Boot,
    mounted: Mounted,
    technology: Technology,
    encrypt: Encrypt | None,
) -> None:
    guest = boot(moving, technology, encrypt)
    usable, before = guest.entry(AT)
    count = PAGES_OF[technology]
    pages, placed = count(guest.guard.describe()), moving.arena.statistics().placed_bytes
    assert usable
    assert guest.compact() > RAM // 2
    assert guest.whole()
    usable, after = guest.entry(AT)
    assert usable
    assert after != before
    assert guest.hpa(AT) == after
    assert count(guest.guard.describe()) == pages
    assert moving.arena.statistics().placed_bytes == placed, "nothing keeps the old addresses"
    assert guest.ask(f"poke {AT:#x} 7").startswith("ok")
    assert guest.number(f"peek {AT:#x}", "value") == 7
    mounted.audit()
    guest.close()
    assert not any(guest.guard.residue().values())


@each
def test_a_guest_at_work_loses_no_store(
    moving: HostMemory, boot: Boot, mounted: Mounted, technology: Technology
) -> None:
    """``test``: both vCPUs write what the other checks."""
    guest = boot(moving, technology)
    for _ in range(2):
        guest.emulator.feed(b"test 0x800000 64\n")
        for _ in range(3):
            assert guest.compact() > RAM // 2
        answer = guest.console.expect(r"(ok|error|panic).*\n").group(0)
        assert answer.startswith("ok test"), answer
    assert guest.whole()
    status = mounted.ask("status")
    assert (status["kills"], status["failures"], status["moves"]) == (0, 0, 6)
    assert guest.emulator.running.statistics.pages_moved > 0
    mounted.audit()


@accepting
def test_a_punch_before_it_arrives(
    moving: HostMemory, boot: Boot, mounted: Mounted, technology: Technology
) -> None:
    """Moved twice meanwhile; what is punched is lost, its neighbours are not."""
    guest = boot(moving, technology)
    count = PAGES_OF[technology]
    pages = count(guest.guard.describe())
    guest.compact()
    guest.compact()
    guest.punch(AT + PAGE, 1)
    assert count(guest.guard.describe()) == pages - 1
    assert guest.whole(AT, 1)
    assert guest.number(f"accept {AT + PAGE:#x} 1", "lost") == 1
    assert guest.number(f"peek {AT + PAGE:#x}", "value") == 0
    assert guest.whole(AT + 2 * PAGE, 2)
    mounted.audit()


@accepting
def test_a_guest_converts_what_has_moved(
    moving: HostMemory, boot: Boot, mounted: Mounted, technology: Technology
) -> None:
    """What becomes shared is gone, and what is private again is empty; nothing else is."""
    guest = boot(moving, technology)
    for target in ("shared", "private"):
        guest.compact()
        assert guest.ask(f"convert {AT:#x} 1 {target}").startswith("ok")
    assert guest.number(f"peek {AT:#x}", "value") == 0
    assert guest.whole(AT + PAGE, 3)
    mounted.audit()


@each
def test_it_ends_before_they_arrive(
    moving: HostMemory, boot: Boot, mounted: Mounted, technology: Technology
) -> None:
    guest = boot(moving, technology)
    guest.compact()
    guest.close()
    assert not any(guest.guard.residue().values())
    mounted.audit()


@accepting
def test_its_slots_end_before_they_arrive(
    moving: HostMemory, boot: Boot, mounted: Mounted, technology: Technology
) -> None:
    """The file is used no more: nothing may wait for its memory."""
    guest = boot(moving, technology)
    guest.compact()
    running = guest.emulator.running
    running.stop("its vCPUs have ended")
    assert running.wait(30)
    slots, placed = list(running.vm.mmu.slots), moving.arena.statistics().placed_bytes
    for slot in slots:
        region = Region(slot.id, KVM_MEM_GUEST_MEMFD, slot.base_gfn * PAGE, 0, 0)
        with running.lock:
            zapped = running.vm.set_user_memory_region2(region)
        running.flush_zapped(zapped)
    for file in {slot.file for slot in slots if slot.file is not None}:
        running.private.forget(file)
    assert moving.arena.statistics().placed_bytes <= placed - RAM // 2
    told = guest.guard.describe()
    if technology is Technology.TDX:
        assert "REG" not in told["pamt_pages"]
    else:
        assert told["frames"] == len(running.vcpus), "their VMSAs"
    mounted.audit()


def test_a_move_heals_no_poison(moving: HostMemory, boot: Boot) -> None:
    guest = boot(moving, Technology.TDX)
    assert guest.emulator.host_write(AT, b"x").outcome is Outcome.POISONS
    guest.compact()
    assert guest.number(f"peek {AT + PAGE:#x}", "value") == WORD
    guest.emulator.feed(f"peek {AT:#x}\n".encode())
    outcome = guest.emulator.wait(30)
    assert outcome is not None
    assert "133: machine check: the host has written" in outcome.message


def test_pages_of_2m_move_as_such_with_what_each_vmpl_may_do(
    moving: HostMemory, boot: Boot
) -> None:
    guest = boot(moving, Technology.SNP)
    rmp = guest.platform.hardware(SnpHost, make_host).rmp
    _, hpa = guest.entry(AT)
    with guest.platform.lock:
        leaf = Leaf(AT, hpa // PAGE, 2)
        vcpu = Vcpu(rmp.entry(hpa // PAGE).asid)
        done = rmpadjust(rmp, vcpu, leaf, 1, target=1, permissions=3)
        assert done == Returned(GuestStatus.SUCCESS)
        before = rmp.entry(hpa // PAGE)
    assert before.large
    cipher = guest.emulator.host_read(AT, PAGE)
    guest.compact()
    assert guest.whole()
    _, moved = guest.entry(AT)
    assert rmp.entry(moved // PAGE) == before
    assert not rmp.entry(hpa // PAGE).assigned
    found = guest.emulator.host_read(AT, PAGE)
    assert found.outcome is cipher.outcome is Outcome.CIPHERTEXT
    assert found.data != cipher.data, "encrypted anew, for its new address"


@accepting
def test_ciphertext_in_the_file_stays_where_it_is(
    moving: HostMemory, boot: Boot, technology: Technology
) -> None:
    guest = boot(moving, technology, Encrypt.BACKING)
    with pytest.raises(control.ControlError, match="UNMOVABLE") as refused:
        guest.compact()
    assert refused.value.errno == errno.EOPNOTSUPP


def test_so_does_a_file_whose_extents_are_large(moving: HostMemory, boot: Boot) -> None:
    guest = boot(moving, Technology.TDX, size=(4 << 30) + PAGE)
    with pytest.raises(control.ControlError, match="UNMOVABLE"):
        guest.compact()


@each
def test_kvm_asks_that_nothing_moves(host: HostMemory, boot: Boot, technology: Technology) -> None:
    guest = boot(host, technology)
    with pytest.raises(control.ControlError, match="UNMOVABLE"):
        guest.compact()
    assert guest.whole()
