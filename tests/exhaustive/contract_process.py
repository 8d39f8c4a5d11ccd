# SPDX-License-Identifier: GPL-2.0-or-later
"""A user process as a value: its state, what it reaches, what is wrong with it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, Self

from contract_stage2 import (
    INSTANCES,
    PAGES,
    SHARED,
    Backing,
    Extent,
    Leaf,
    Table,
)
from contract_values import Cores, Letter, Page, Parcel, Setup, joined, put

from kvmsim.fault import Fault, NeedPage
from kvmsim.uapi import ABIS, PAGE_SIZE
from kvmsim.vm import Invalidation
from privfs.notifier.user import Granted
from privfs.notifier.wire import Record


class Vcpu(NamedTuple):
    """A vCPU.  Guest code that runs (``inside``) may use all of its TLB.

    One that ``retries`` executes the instruction that faulted again, and no other.
    """

    state: str = "idle"  # idle, retries, asks, waits, granted, inside
    at: int = -1  #: page of the gpa that it touches
    fault: Fault | None = None
    need: NeedPage | None = None
    req: int = 0
    grant: Granted | None = None
    made_for: tuple[int, ...] = ()  #: generations of the granted pages
    tlb: frozenset[Leaf] = frozenset()
    again: bool = False  #: needs the extent's descriptor once more

    def key(self) -> Hashable:
        return (*self[:2], self.fault and self.fault.key(), *self[3:])

    def name(self) -> str:
        """Return its state in words, the same ones in every run."""
        return repr(self._replace(tlb=sorted(self.tlb, key=repr)))  # type: ignore[arg-type]


class Debt(NamedTuple):
    """An invalidation that was zapped and not yet acknowledged."""

    seq: int
    epoch: int
    open: Invalidation | None = None


class Process:
    """One process.  It does not know its number: all that start alike are one machine."""

    def __init__(self, setup: Setup, cores: Cores, fates: frozenset[str]) -> None:
        self.setup, self.cores, self.fates = setup, cores, fates
        self.user = cores.user(setup.ring)
        self.leaves: frozenset[Leaf] = frozenset()
        self.extents: frozenset[Extent] = frozenset()
        self.shootdown = cores.shootdown(setup.vcpus)
        self.vcpus = (Vcpu(),) * setup.vcpus
        self.inbox: tuple[Letter | None, ...] = ()
        self.outboxes: tuple[tuple[Parcel | None, ...], ...] = ((),)
        self.owed: tuple[Debt, ...] = ()
        self.open: Invalidation | None = None  #: a change of attributes under way
        self.ranges: tuple[tuple[int, int], ...] = ()  #: gfns of open brackets
        self.registered = ("no",) * setup.files  # no, asked, yes, leaves
        self.comebacks = setup.reregister
        self.converts = setup.converts
        self.stores: frozenset[int] = frozenset()  #: files whose grants are for stores too
        self.alone: frozenset[int] = frozenset()  #: files that it was given for itself
        self.requests: tuple[tuple[int, str, int], ...] = ()  #: (request, what, of which)
        self.flags: frozenset[str] = frozenset()  #: what has happened to it
        self.problem: str | None = None
        self.granting: tuple[int, tuple[int, ...]] = (0, ())
        self.vm = cores.vm(Table(self), Backing(self), abi=setup.abi, around=1, window=4)
        self.vm.mmu.invalidate = cores.invalidate()
        private = ABIS[setup.abi].attribute_private
        if setup.abi == "upstream":
            end = max(gfn + pages for gfn, pages, _, _ in setup.bound)
            self.vm.set_memory_attributes(0, end * PAGE_SIZE, private)
        else:
            for gfn, pages, _, _ in setup.bound:
                self.vm.encrypt_region(gfn * PAGE_SIZE, pages * PAGE_SIZE, private=True)
        self._saying: list[tuple[Any, ...]] = []
        self._names: dict[Hashable, str] = {}  #: of states of vCPUs, the same for all copies

    # --- a part of the world ------------------------------------------------------------------

    def copy(self) -> Self:
        twin = type(self).__new__(type(self))
        twin.__dict__ = self.__dict__ | {"_saying": []}
        return twin

    def _sort(self) -> None:
        """Give the vCPUs their order, where they are not told apart."""
        shootdown = self._shootdown()
        names = self._names
        ranked = []
        for v, (vcpu, *rest) in enumerate(zip(self.vcpus, *self.shootdown.key(), strict=True)):  # type: ignore[arg-type]
            key = vcpu.key()
            ranked.append((names.setdefault(key, "") or vcpu.name(), rest, v))
            names[key] = ranked[-1][0]
        order = [v for *_, v in sorted(ranked)]
        self.vcpus = tuple([self.vcpus[v] for v in order])
        for slot in ("_consumed", "_in_guest"):
            setattr(shootdown, slot, [getattr(shootdown, slot)[v] for v in order])

    def key(self) -> Hashable:
        lags, inside = self.shootdown.key()
        vcpus: Any = zip([v.key() for v in self.vcpus], lags, inside, strict=True)  # type: ignore[call-overload]
        epoch = self.shootdown.epoch
        return (
            self.user.key(), self.vm.key(), self.leaves, self.extents,
            tuple(vcpus),
            tuple([(debt.seq, epoch - debt.epoch, debt.open) for debt in self.owed]),
            self.inbox, self.outboxes, self.open, self.ranges, self.registered, self.comebacks,
            self.converts, self.stores, self.alone, self.requests, self.flags, self.fates,
            self.problem,
        )  # fmt: skip

    def take(self, event: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        """Do what ``event`` says; the words that come back are for the host."""
        getattr(self, f"_on_{event[0]}")(*event[1:])
        self.granting = (0, ())
        if self.setup.alike and self.setup.vcpus > 1:
            self._sort()
        self.problem = self.problem or self._audit()
        said = tuple(self._saying)
        self._saying.clear()
        return said

    @property
    def healthy(self) -> bool:
        """Nothing has happened to it: it must be served, and nobody need wait for it for long."""
        return not self.flags

    @property
    def quiet(self) -> bool:
        """Whatever it asked for has come, whatever it was asked for has gone."""
        return not (
            self.inbox or any(self.outboxes) or self.owed or self.open
            or any(v.state not in ("idle", "inside") for v in self.vcpus)
        )  # fmt: skip

    def can_send(self) -> bool:
        return "closed" not in self.flags and len(self.outboxes[-1]) < self.setup.room

    def can_call(self, ino: int) -> bool:
        return self.can_send() and self.registered[ino - 1] == "yes" and "dead" not in self.flags

    def reach(self) -> frozenset[Page]:
        """Return all that guest code can touch now or when it next runs."""
        reach = set(self.leaves)
        for v, vcpu in enumerate(self.vcpus):
            if vcpu.state == "inside" or not self.shootdown.pending(v):
                reach |= vcpu.tlb
        return frozenset([leaf.page for leaf in reach if leaf.page is not None])

    # --- what the table asks ------------------------------------------------------------------

    def page_at(self, frame: int) -> Page | None:
        """Say what lies at a host-physical frame; of which generation, the grant says."""
        extent, page = divmod(frame, PAGES)
        if not extent:
            return None
        first, made_for = self.granting
        return extent // INSTANCES, page, made_for[page - first]

    # --- parts --------------------------------------------------------------------------------

    def _audit(self) -> str | None:
        """Every leaf is what slot and attribute say, or a bracket is open over it."""
        mmu = self.vm.mmu
        for low, high in self.ranges:
            for gfn in range(low, high):
                if not mmu.invalidate.retry(gfn, mmu.invalidate.seq):
                    return f"gfn {gfn} is being invalidated, and a fault on it would not retry"
        for at, page in self.leaves:
            gfn = at % SHARED
            slot = mmu.slots.find(gfn)
            if slot is None:
                return f"gfn {gfn} is mapped without a slot"
            if (at < SHARED) != bool(mmu.attributes.get(gfn)):
                return f"gfn {gfn} is mapped on the side of the other attribute"
            if page is not None and page[:2] != (slot.file, slot.private_page(gfn)):
                return f"gfn {gfn} maps another page than its slot says"
        return None

    def wrong(self, problem: str) -> None:
        self.problem = self.problem or problem

    def _say(self, *word: Any) -> None:
        self._saying.append(word)

    def _flag(self, flag: str) -> None:
        self.flags |= {flag}

    def _user(self) -> Any:
        """Return a user that this step may change."""
        self.user = self.user.copy()
        return self.user

    def _vm(self) -> Any:
        """Return a VM that this step may change."""
        self.vm = self.vm.copy(Table(self), Backing(self))
        return self.vm

    def _shootdown(self) -> Any:
        self.shootdown = self.shootdown.copy()
        return self.shootdown

    def _vcpu(self, v: int, **fields: Any) -> None:
        self.vcpus = put(self.vcpus, v, self.vcpus[v]._replace(**fields))

    def _ask(self, record: Record, what: str, number: int) -> None:
        self.requests = (*self.requests, (record.req, what, number))
        self._post(record, number if what == "register" else 0)

    def _post(self, record: Record, ino: int = 0) -> None:
        outbox = joined(self.outboxes[-1], Parcel(record, ino), self.setup.delivery)
        self.outboxes = put(self.outboxes, len(self.outboxes) - 1, outbox)

    def _waiting(self, req: int) -> int:
        return next(v for v, vcpu in enumerate(self.vcpus) if vcpu.req == req)
