# SPDX-License-Identifier: GPL-2.0-or-later
"""Two guests of one host, their files, the hardware's tables and second stages, all as they ship,
but for the vCPUs, whose accesses and instructions are made here: what must hold after any of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hwemu.arena import new_table_pool
from hwemu.cpu.api import CR0_PG, CR4_PAE, EFER_LMA, Access, InterceptExit, Regs, Sregs
from hwemu.encryptedaccess import RULES, Actor, Operation, Technology
from hwemu.stage2 import Stage2
from kvmsim.attributes import Attributes
from kvmsim.confidential.base import Confidential
from kvmsim.confidential.hostview import HostView
from kvmsim.confidential.kinds import make_guard
from kvmsim.confidential.platform import Platform
from kvmsim.effect import Installed, NeedPage, PageGrant
from kvmsim.fault import Fault
from kvmsim.guard import Again, Answer, GuardRefusal, Inject, Leave, Resolve
from kvmsim.hostmem import HostMemory
from kvmsim.invalidate import MmuInvalidate
from kvmsim.kind import KINDS
from kvmsim.memslot import Memslots
from kvmsim.mmu import Mmu
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import KVM_MEM_GUEST_MEMFD
from kvmsim.views.columns import Columns, no_leaves
from kvmsim.views.odd import is_wrong, mark, names
from kvmsim.vmm.launch import LaunchPage, PageType

PAGE, LARGE, GFNS = 4096, 512, 1536
PRIVATE = 8
GUESTS, PAGES = st.integers(0, 1), st.integers(0, GFNS - 1)
SIZES = st.sampled_from((1, 1, 2, 7, 300, LARGE, 700))


class Cpu:
    """A CPU with paging off, which forgets nothing that anybody asks about."""

    def get_sregs(self) -> Sregs:
        return Sregs()

    def flush(self, ranges: object) -> None: ...


@dataclass
class Vcpu:
    cpu: Cpu = field(default_factory=Cpu)
    interrupted: bool = False


class Store:
    """A file of private memory in the arena; ``held`` are the pages that it has given out.

    An index lies at the same place of its memory always, as with extents.
    """

    def __init__(self, host: HostMemory) -> None:
        self._host = host
        self._fd = os.memfd_create("store")
        os.ftruncate(self._fd, GFNS * PAGE)
        self.base = self.place()
        self.away = False  #: it is nowhere, after a move
        self.held = np.zeros(GFNS, np.bool_)

    def place(self) -> int:
        """Another place for what it holds: as good as a copy."""
        base = self._host.place(self._fd, 0, GFNS * PAGE)
        assert base % (LARGE * PAGE) == 0
        return base

    def close(self) -> None:
        os.close(self._fd)

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return start, end

    def hpa(self, instance: int, page: int) -> int | None:
        return self.base + page * PAGE if page < GFNS and not self.away else None


class Nothing:
    """No userspace memory."""

    def hpa(self, page: int) -> int | None:
        return None


class Guest:
    """What a guard knows of a VM, and the guard."""

    def __init__(self, kind: str, platform: Platform, host: HostMemory) -> None:
        self.vm, self.host, self.lock = self, host, threading.Lock()
        self.kind, self.label, self.batches = KINDS[kind], kind, False
        self.vcpus = [Vcpu()]
        self.stage2 = Stage2(new_table_pool(1 << 20), 256 << 20)
        self.store = Store(host)
        slots = Memslots(kind=self.kind)
        region = Region(0, KVM_MEM_GUEST_MEMFD, 0, GFNS * PAGE, 0)
        slots.set(region, shared=Nothing(), file=PrivateFile(3, GFNS))
        self.mmu = Mmu(
            slots, Attributes(), MmuInvalidate(), self.stage2, self.store, max_level=2
        )  # fmt: skip
        self.mmu.attributes.set(0, GFNS, PRIVATE)
        guard = make_guard(self.kind, platform, self)  # type: ignore[arg-type]
        assert guard is not None
        self.guard: Confidential = guard
        self.mmu.gate = guard
        guard.start(1)
        page = LaunchPage(0, b"\x5a" * PAGE, PageType.NORMAL)
        assert guard.stage(page)
        self.access(0)
        if kind == "snp":
            guard.stage(LaunchPage(0xFFFF_FFFF_F000, bytes(PAGE), PageType.VMSA, 0))
        guard.finish([None] * 1)  # type: ignore[list-item]

    @property
    def private_bit(self) -> int:
        return self.kind.half(private=True)

    def access(self, gfn: int, *, write: bool = True) -> None:
        """An access to the private side, until it is made or the guest is told."""
        gpa, kind = gfn * PAGE | self.private_bit, Access.WRITE if write else Access.READ
        for _ in range(4):
            if self.guard.finished and self.guard.fault(0, gpa, kind) is not None:
                return
            if self.resolve(gpa):
                return

    def resolve(self, gpa: int) -> bool:
        """Whether KVM had no more to do than leave the guest."""
        fault = Fault(0, gpa)
        fault.snapshot(self.mmu)
        need = fault.look_up(self.mmu)
        if not isinstance(need, NeedPage):
            return True
        self.arrive()
        self.store.held[need.start : need.end] = True
        grant = PageGrant(3, need.start, need.end, 0, 1, writable=True)
        return not isinstance(fault.page_arrived(self.mmu, grant), Installed)

    def accept(self, gfn: int, *, large: bool, take: bool, tries: int = 6) -> None:
        """TDG.MEM.PAGE.ACCEPT or PVALIDATE, tried until it is answered."""
        if large:
            gfn &= -LARGE
        name, regs = "tdcall", Regs(rip=0, rax=6, rcx=gfn * PAGE | large)
        if self.kind.name == "snp":
            regs = Regs(rip=0, rax=gfn * PAGE | self.private_bit, rcx=large, rdx=take)
            name = "pvalidate"
        for _ in range(tries):
            self.guard.enter(0)
            verdict = self.guard.instruction(0, InterceptExit(name, 4), regs)
            self.guard.leave(0)
            match verdict:
                case Resolve(gpa, _):
                    if self.resolve(gpa):
                        return
                case Again():
                    continue
                case Answer() | Inject() | Leave():
                    return

    def take_back(self, start: int, end: int) -> None:
        """A punch: zap, prove, tell the hardware, free; in this order."""
        self.zap(start, end)
        self.guard.released(self.store.base + start * PAGE, (end - start) * PAGE)
        self.store.held[start:end] = False

    def zap(self, start: int, end: int, *, moving: bool = False) -> None:
        self.mmu.begin_zap([(start, end)], self.kind.halves, moving=moving)
        self.mmu.invalidate.end()
        for _ in range(8):
            if not self.guard.drained():
                break
        else:
            raise AssertionError("the hardware never had enough of flushes")

    def leave(self) -> None:
        """All of the file's memory is on its way to another place."""
        self.zap(0, GFNS, moving=True)
        self.store.away = True
        if not self.guard.leaving(self.store.base, GFNS * PAGE):
            self.guard.released(self.store.base, GFNS * PAGE)

    def arrive(self) -> None:
        """It has come there, if it was on its way."""
        if not self.store.away:
            return
        old, self.store.base, self.store.away = self.store.base, self.store.place(), False
        self.guard.migrated(0, GFNS, old, self.store.base)
        assert not self.guard.keeps(old, GFNS * PAGE), "a page was left behind"
        self.guard.released(old, GFNS * PAGE)
        self.host.retire(old, GFNS * PAGE)

    def convert(self, start: int, end: int, *, private: bool) -> None:
        if self.mmu.attributes.set(start, end, PRIVATE if private else 0):
            self.take_back(start, end)

    def accepted(self) -> npt.NDArray[np.bool_]:
        """Which gfns the table says are the guest's to use."""
        tables = self.guard.tables()
        state = self.columns().entry.state
        return np.isin(state, list(tables.words.mapped))

    def columns(self) -> Columns:
        leaf = self.stage2.columns(self.private_bit, GFNS)
        private = np.zeros(GFNS, np.bool_)
        for run in self.mmu.attributes.runs(0, GFNS):
            private[run.start : run.end] = bool(run.value)
        tables = self.guard.tables()
        tables.prepare()
        found = Columns(
            0, 0, private, self.store.held.copy(), leaf, no_leaves(GFNS), tables.entries(0, leaf)
        )
        mark(found, tables.words)
        return found


def check(platform: Platform, guests: list[Guest]) -> None:
    """No leaf that the table forbids, no entry to what was freed, one owner of a frame, and for
    the host what the table of outcomes says.
    """
    frames = [np.zeros(0, np.int64)]
    for number, guest in enumerate(guests):
        found = guest.columns()
        for odd in np.unique(found.odd).tolist():
            wrong = [name for name in names(odd) if is_wrong(name)]
            at = int(np.flatnonzero(found.odd == odd)[0])
            assert not wrong, f"guest {number}, gfn {at:#x}: {wrong}"
        there = found.entry.hpa >= 0
        assert not (there & ~found.page).any(), f"guest {number}: an entry to a freed page"
        frames.append(found.entry.hpa[there])
        rule = RULES[Technology(guest.kind.name), Actor.HOST, Operation.READ].outcome
        for hpa in frames[-1][:2].tolist():
            met = HostView(platform).read(hpa, 64)
            assert met.outcome is rule
            assert met.data != b"\x5a" * 64
    known = np.concatenate(frames)
    assert len(np.unique(known)) == len(known), "a frame of both guests"


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
        self.guests = [Guest(self.kind, self.platform, self.host) for _ in range(2)]

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
            guest.guard.close()
        for guest in self.guests:
            guest.guard.released(guest.store.base, GFNS * PAGE)
            guest.store.close()
        left = [guest.guard.residue() for guest in self.guests]
        self.host.close()
        assert all(not count for one in left for count in one.values()), left


class SnpMachine(ConfidentialMachine):
    kind = "snp"


_SETTINGS = settings(
    max_examples=12, stateful_step_count=25, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
TestTdx = ConfidentialMachine.TestCase
TestTdx.settings = _SETTINGS
TestSnp = SnpMachine.TestCase
TestSnp.settings = _SETTINGS


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
    guest.guard.close()
    guest.guard.released(guest.store.base, GFNS * PAGE)
    guest.store.close()
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
    guest.guard.close()
    guest.guard.released(guest.store.base, GFNS * PAGE)
    guest.store.close()
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
    guest.guard.close()
    guest.guard.released(guest.store.base, GFNS * PAGE)
    guest.store.close()
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


@pytest.mark.parametrize(("kind", "step"), [("tdx", "drained"), ("snp", "released")])
def test_a_step_that_is_forgotten_is_found(
    kind: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = HostMemory("none")
    platform = Platform(host)
    guests = [Guest(kind, platform, host) for _ in range(2)]
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
        guest.guard.close()
        guest.guard.released(guest.store.base, GFNS * PAGE)
    guest.store.close()
    host.close()
