# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests of one host, their files, the hardware's tables and second stages, all as they ship, but
for the vCPUs, whose accesses and instructions are made here; and what must hold of them always.
"""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hwemu.arena import new_table_pool
from hwemu.cpu.api import Access, InterceptExit, Regs, Sregs
from hwemu.encryptedaccess import RULES, Actor, Operation, Technology
from hwemu.pkvm.hypercall import MEM_SHARE, MEM_UNSHARE
from hwemu.pkvm.state import PageState
from hwemu.stage2 import Stage2
from kvmsim.attributes import Attributes
from kvmsim.confidential.base import Confidential
from kvmsim.confidential.hostview import HostView
from kvmsim.confidential.kinds import make_guard
from kvmsim.confidential.platform import Platform
from kvmsim.effect import Installed, NeedPage, PageGrant
from kvmsim.exits import HypercallExit
from kvmsim.fault import Fault
from kvmsim.guard import Again, Answer, GuardRefusal, Inject, Leave, Resolve
from kvmsim.hostmem import HostMemory
from kvmsim.inplace import InPlaceFile
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

    in_place = False

    def __init__(self, kind: str, platform: Platform, host: HostMemory) -> None:
        self.vm, self.host, self.lock = self, host, threading.Lock()
        self.death: GuardRefusal | None = None
        self.kind, self.label, self.batches = KINDS[kind], kind, False
        self.vcpus = [Vcpu()]
        self.stage2 = Stage2(new_table_pool(1 << 20), 256 << 20)
        self.store = Store(host)
        slots = Memslots(kind=self.kind)
        region = Region(0, KVM_MEM_GUEST_MEMFD, 0, GFNS * PAGE, 0)
        file = PrivateFile(3, GFNS, in_place=self.in_place)
        slots.set(region, shared=Nothing(), file=file)
        self.mmu = Mmu(
            slots, Attributes(), MmuInvalidate(), self.stage2, self.store, max_level=2
        )  # fmt: skip
        self.types = self.mmu.attributes
        if self.in_place:
            self.mmu.files = {3: InPlaceFile.of(file)}
            self.types = self.mmu.files[3].attributes
        self.types.set(0, GFNS, PRIVATE)
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
        where = self.store.base + start * PAGE, (end - start) * PAGE
        try:
            self.guard.released(*where)
        except GuardRefusal as refused:
            assert self.death is None
            self.death = refused
            self.guard.released(*where)
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
        if self.types.set(start, end, PRIVATE if private else 0):
            self.take_back(start, end)

    def accepted(self) -> npt.NDArray[np.bool_]:
        """Which gfns the table says are the guest's to use."""
        tables = self.guard.tables()
        state = self.columns().entry.state
        return np.isin(state, list(tables.words.mapped))

    def hidden(self, found: Columns) -> npt.NDArray[np.int64]:
        """The hpas of pages that are nobody else's to see."""
        return found.entry.hpa[found.entry.hpa >= 0]

    def end(self) -> None:
        """Its teardown, and that of its file."""
        self.guard.close()
        self.guard.released(self.store.base, GFNS * PAGE)
        self.store.close()

    def columns(self) -> Columns:
        leaf = self.stage2.columns(self.private_bit, GFNS)
        private = np.zeros(GFNS, np.bool_)
        for run in self.types.runs(0, GFNS):
            private[run.start : run.end] = bool(run.value)
        tables = self.guard.tables()
        tables.prepare()
        found = Columns(
            0, 0, private, self.store.held.copy(), leaf, no_leaves(GFNS), tables.entries(0, leaf),
            sided=not self.in_place, whole=self.in_place,
        )  # fmt: skip
        mark(found, tables.words)
        return found


class Protected(Guest):
    """A protected VM of pKVM's: its pages convert in place, and it dies of a punch in one."""

    in_place = True

    def access(self, gfn: int, *, write: bool = True) -> None:
        if self.death is None:
            super().access(gfn, write=write)

    def accept(self, gfn: int, *, large: bool, take: bool, tries: int = 6) -> None:
        """MEM_SHARE, or MEM_UNSHARE; the VMM refuses ``large``."""
        self.call(MEM_SHARE if take else MEM_UNSHARE, gfn, refuse=large)

    def call(self, number: int, gfn: int, *, refuse: bool = False) -> None:
        """An HVC for one page, tried until it is answered."""
        regs = Regs(rip=0, rax=number, rbx=gfn * PAGE)
        while self.death is None:
            self.guard.enter(0)
            verdict = self.guard.instruction(0, InterceptExit("vmcall", 3), regs)
            self.guard.leave(0)
            match verdict:
                case Resolve(gpa, _):
                    assert not self.resolve(gpa)
                case Leave(HypercallExit(_, (gpa, npages, attributes), _)):
                    if not refuse:
                        start = gpa // PAGE
                        self.convert(start, start + npages, private=bool(attributes))
                    done = self.guard.complete(0, -errno.EPERM if refuse else 0, regs)
                    assert isinstance(done, Answer)
                    return
                case _:
                    assert isinstance(verdict, Answer)
                    return

    def convert(self, start: int, end: int, *, private: bool) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES2: nothing is freed, and EL2 has its own idea."""
        if self.types.set(start, end, PRIVATE if private else 0):
            self.zap(start, end)

    def accepted(self) -> npt.NDArray[np.bool_]:
        """The state of every page; nothing less must survive a move."""
        return self.columns().entry.state  # type: ignore[return-value]

    def hidden(self, found: Columns) -> npt.NDArray[np.int64]:
        return found.entry.hpa[found.entry.state == PageState.OWNED]


def born(kind: str, platform: Platform, host: HostMemory) -> Guest:
    return (Protected if kind == "pkvm" else Guest)(kind, platform, host)


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
        for hpa in guest.hidden(found)[:2].tolist():
            met = HostView(platform).read(hpa, 64)
            assert met.outcome is rule
            assert met.data != b"\x5a" * 64
    known = np.concatenate(frames)
    assert len(np.unique(known)) == len(known), "a frame of both guests"
