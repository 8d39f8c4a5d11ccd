# SPDX-License-Identifier: GPL-2.0-or-later
"""Two guests of one host, their files, the hardware's tables and second stages, all as they ship,
but for the vCPUs, whose accesses and instructions are made here: what must hold after any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from confidential_world import GFNS, LARGE, PAGE, Cpu, Guest, Protected, born, check
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hwemu.cpu.api import CR0_PG, CR4_PAE, EFER_LMA, Access, InterceptExit, Regs, Sregs
from hwemu.pkvm.hypercall import MEM_RELINQUISH
from kvmsim.confidential.platform import Platform
from kvmsim.guard import GuardRefusal, Inject, Leave, Resolve
from kvmsim.hostmem import HostMemory

GUESTS, PAGES = st.integers(0, 1), st.integers(0, GFNS - 1)
SIZES = st.sampled_from((1, 1, 2, 7, 300, LARGE, 700))


class ConfidentialMachine(RuleBasedStateMachine):
    """Two guests of ``kind`` on one platform."""

    kind = "tdx"

    def __init__(self) -> None:
        super().__init__()
        self.host = HostMemory("none")
        self.platform = Platform(self.host)
        self.guests: list[Guest] = []

    @initialize()
    def launch(self) -> None:
        self.guests = [born(self.kind, self.platform, self.host) for _ in range(2)]

    @rule(guest=GUESTS, gfn=PAGES, write=st.booleans())
    def access(self, guest: int, gfn: int, write: bool) -> None:
        self.guests[guest].access(gfn, write=write)

    @rule(guest=GUESTS, gfn=PAGES, large=st.booleans(), take=st.sampled_from((True, True, False)))
    def accept(self, guest: int, gfn: int, large: bool, take: bool) -> None:
        self.guests[guest].accept(gfn, large=large, take=take)

    @rule(guest=GUESTS, gfn=PAGES, size=SIZES)
    def punch(self, guest: int, gfn: int, size: int) -> None:
        self.guests[guest].take_back(gfn, min(gfn + size, GFNS))

    @rule(guest=GUESTS, gfn=PAGES, size=SIZES, private=st.booleans())
    def convert(self, guest: int, gfn: int, size: int, private: bool) -> None:
        self.guests[guest].convert(gfn, min(gfn + size, GFNS), private=private)

    @rule(guest=GUESTS, block=st.integers(0, GFNS // LARGE - 1))
    def take_all_of_a_block(self, guest: int, block: int) -> None:
        """Large pages are rare among single steps."""
        self.guests[guest].take_back(block * LARGE, (block + 1) * LARGE)
        self.guests[guest].convert(block * LARGE, (block + 1) * LARGE, private=True)
        self.guests[guest].accept(block * LARGE, large=True, take=True)
        self.guests[guest].access(block * LARGE + 3)

    @rule(guest=GUESTS)
    def move(self, guest: int) -> None:
        """Pages stay accepted, or not, whether or not they have come to their new place."""
        if not self.guests[guest].guard.movable:
            return
        self.guests[guest].arrive()
        before = self.guests[guest].accepted()
        self.guests[guest].leave()
        check(self.platform, self.guests)
        assert (self.guests[guest].columns().leaf.level == 0).all()
        self.guests[guest].arrive()
        assert (self.guests[guest].accepted() == before).all()

    @rule(guest=GUESTS)
    def leave(self, guest: int) -> None:
        """Other things happen before the next access brings it back."""
        if self.guests[guest].guard.movable:
            self.guests[guest].leave()

    @invariant()
    def holds(self) -> None:
        check(self.platform, self.guests)

    def teardown(self) -> None:
        for guest in self.guests:
            guest.end()
        left = [guest.guard.residue() for guest in self.guests]
        self.host.close()
        assert all(not count for one in left for count in one.values()), left


class SnpMachine(ConfidentialMachine):
    kind = "snp"


class PkvmMachine(ConfidentialMachine):
    kind = "pkvm"

    @rule(guest=GUESTS, gfn=PAGES, size=SIZES)
    def punch(self, guest: int, gfn: int, size: int) -> None:
        """The guest dies of it if it has any of the pages, and only then."""
        victim, end = self.guests[guest], min(gfn + size, GFNS)
        alive, has = victim.death is None, (victim.columns().entry.hpa[gfn:end] >= 0).any()
        victim.take_back(gfn, end)
        if alive:
            assert (victim.death is not None) == has

    @rule(guest=GUESTS, gfn=PAGES, size=SIZES)
    def relinquish(self, guest: int, gfn: int, size: int) -> None:
        """What the guest gives back may be punched, but for what it had shared."""
        victim, end = self.guests[guest], min(gfn + size, GFNS)
        assert isinstance(victim, Protected)
        for page in range(gfn, end):
            victim.call(MEM_RELINQUISH, page)
        if victim.death is None and not (victim.columns().entry.hpa[gfn:end] >= 0).any():
            victim.take_back(gfn, end)
            assert victim.death is None

    @rule(guest=GUESTS, block=st.integers(0, GFNS // LARGE - 1))
    def take_all_of_a_block(self, guest: int, block: int) -> None:
        self.relinquish(guest, block * LARGE, LARGE)
        self.guests[guest].access(block * LARGE + 3)

    @rule(guest=GUESTS)
    def move(self, guest: int) -> None:
        if self.guests[guest].death is None:
            super().move(guest)

    @rule(guest=GUESTS)
    def leave(self, guest: int) -> None:
        if self.guests[guest].death is None:
            super().leave(guest)

    @rule(guest=GUESTS)
    def replace_the_dead(self, guest: int) -> None:
        if self.guests[guest].death is not None:
            self.guests[guest].end()
            self.guests[guest] = born(self.kind, self.platform, self.host)


_SETTINGS = settings(
    max_examples=12, stateful_step_count=25, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
TestTdx = ConfidentialMachine.TestCase
TestTdx.settings = _SETTINGS
TestSnp = SnpMachine.TestCase
TestSnp.settings = _SETTINGS
TestPkvm = PkvmMachine.TestCase
TestPkvm.settings = _SETTINGS


def test_a_page_of_a_large_one_is_given_up() -> None:
    """PSMASH leaves the second stage no leaf that is larger than the RMP's entries."""
    host = HostMemory("none")
    platform = Platform(host)
    guest = Guest("snp", platform, host)
    guest.accept(LARGE, large=True, take=True)
    guest.access(LARGE + 3)
    assert guest.columns().leaf.level[LARGE + 3] == 2
    for tries in (1, 2):  # it is broken, then the page is given up
        guest.accept(LARGE + 9, large=False, take=False, tries=tries)
        check(platform, [guest])
    guest.access(LARGE + 3)
    assert guest.columns().leaf.level[LARGE + 3] == 1
    check(platform, [guest])
    guest.end()
    host.close()


@pytest.fixture
def td() -> Iterator[Guest]:
    """A TD with a page of 2 MiB at gfn 512, in use, and one that it has not accepted at 1030."""
    host = HostMemory("none")
    guest = Guest("tdx", Platform(host), host)
    guest.accept(LARGE, large=True, take=True)
    guest.access(LARGE + 3)
    guest.access(1030)
    assert guest.columns().entry.level[LARGE + 3] == 2
    yield guest
    guest.end()
    assert not any(guest.guard.residue().values())
    host.close()


def test_one_flush_proves_zaps_of_many_kinds(td: Guest) -> None:
    """Two punches in one large page, and a move of all of it, before anybody has drained."""
    before = td.accepted()
    for start, end, moving in ((520, 521, False), (0, GFNS, True), (530, 532, False)):
        td.mmu.begin_zap([(start, end)], td.kind.halves, moving=moving)
        td.mmu.invalidate.end()
    while td.guard.drained():
        pass
    td.store.away = True
    assert not td.accepted().any()
    td.store.held[[520, 530, 531]] = False
    td.arrive()
    before[[520, 530, 531]] = False
    assert (td.accepted() == before).all()
    found = td.columns()
    assert (found.entry.hpa[[520, 530, 531]] == -1).all()
    there = np.flatnonzero(found.entry.hpa >= 0)
    assert 1030 in there, "what is pending moves, too"
    assert (found.entry.hpa[there] == td.store.base + there * PAGE).all()


def test_what_cannot_be_relocated_is_refused(td: Guest, caplog: pytest.LogCaptureFixture) -> None:
    td.leave()
    old = td.store.base
    td.guard.migrated(0, GFNS, old, 1 << 51)  # in no TDMR
    assert "stays blocked at hpa" in caplog.records[-1].getMessage()
    caplog.clear()
    with pytest.raises(GuardRefusal, match="was not relocated"):
        td.guard.admit(3 + LARGE, 0, GFNS, old, private=True, writable=True)
    assert td.guard.keeps(old, GFNS * PAGE)
    with pytest.raises(RuntimeError, match="is the TD's still"):
        td.guard.released(old, GFNS * PAGE)
    td.take_back(0, GFNS)
    assert not td.guard.keeps(old, GFNS * PAGE)
    td.store.away = False


@pytest.fixture
def snp() -> Iterator[Guest]:
    """An SNP guest with a page of 2 MiB at gfn 512, in use."""
    host = HostMemory("none")
    guest = Guest("snp", Platform(host), host)
    guest.accept(LARGE, large=True, take=True)
    guest.access(LARGE + 3)
    yield guest
    guest.end()
    assert not any(guest.guard.residue().values())
    host.close()


@pytest.mark.logs("did not move from hpa")
def test_what_the_firmware_does_not_move_is_told_to_the_guest(
    snp: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes the page anew, as one that was punched."""
    assert snp.accepted()[LARGE : 2 * LARGE].all()
    snp.leave()
    old = snp.store.base
    snp.guard.migrated(0, GFNS, old, 1 << 51)  # no RMP covers it
    message = caplog.records[-1].getMessage()
    assert message.startswith(f"gpa {LARGE * PAGE:#x}+{LARGE * PAGE:#x} did not move from hpa")
    assert not snp.guard.keeps(old, GFNS * PAGE)
    assert not snp.accepted().any()
    snp.arrive()  # somewhere else: what is lost stays lost
    assert not snp.accepted().any()
    snp.access(LARGE + 3)
    verdict = snp.guard.fault(0, (LARGE + 3) * PAGE | snp.private_bit, Access.READ)
    assert verdict == Inject(29, 0x404), "not validated"
    snp.accept(LARGE + 3, large=False, take=True)
    assert snp.accepted()[LARGE + 3]


def test_a_page_table_that_is_on_its_way_is_waited_for(snp: Guest) -> None:
    """PVALIDATE names a linear address, and the tables that map it are private memory."""
    table, bit = (LARGE + 5) * PAGE, snp.private_bit

    @dataclass
    class Paging(Cpu):
        def get_sregs(self) -> Sregs:
            return replace(Sregs(), cr0=CR0_PG, cr4=CR4_PAE, efer=EFER_LMA, cr3=table | bit)

    snp.vcpus[0].cpu = Paging()
    regs = Regs(rip=0, rax=9 * PAGE, rcx=0, rdx=1)
    snp.leave()
    snp.guard.enter(0)
    verdict = snp.guard.instruction(0, InterceptExit("pvalidate", 4), regs)
    assert verdict == Resolve(table | bit, Access.READ)
    assert snp.resolve(table | bit) is False
    verdict = snp.guard.instruction(0, InterceptExit("pvalidate", 4), regs)
    assert isinstance(verdict, Leave), "it is there, and maps nothing"
    snp.guard.leave(0)


@pytest.mark.parametrize(
    ("kind", "step"), [("tdx", "drained"), ("snp", "released"), ("pkvm", "released")]
)
def test_a_step_that_is_forgotten_is_found(
    kind: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = HostMemory("none")
    platform = Platform(host)
    guests = [born(kind, platform, host) for _ in range(2)]
    for guest in guests:
        guest.access(5)
        guest.accept(5, large=False, take=True)
    check(platform, guests)
    if step == "released":
        monkeypatch.setattr(guests[0].guard, step, lambda hpa, size: None)
    else:
        monkeypatch.setattr(guests[0].guard, step, lambda: False)
        monkeypatch.setattr(guests[0].guard, "released", lambda hpa, size: None)
    guests[0].take_back(5, 6)
    with pytest.raises(AssertionError, match="an entry to a freed page"):
        check(platform, guests)
    monkeypatch.undo()
    for guest in guests:
        guest.end()
    host.close()
