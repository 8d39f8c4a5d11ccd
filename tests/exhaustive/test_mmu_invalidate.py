# SPDX-License-Identifier: GPL-2.0-or-later
"""Every interleaving of invalidations and faults in two small worlds.

The first world is the counter alone, used as KVM uses it: each step is one section under mmu_lock
or one access without it. The second is the VM that ships, with punches, conversions and slots that
come and go. In both, one rule switched off must be found: that is the test of these tests.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Protocol, Self

import pytest
from mutant_users import (
    BlindVm,
    LateSnapshot,
    MergedRange,
    NeverEnds,
    NewestRange,
    NoSeq,
    SeqOnly,
)

from kvmsim.fault import (
    Effect,
    Fault,
    Installed,
    LeaveGuest,
    NeedPage,
    PageGrant,
    Retry,
    State,
)
from kvmsim.invalidate import MmuInvalidate
from kvmsim.kind import SHARED_BIT
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, PAGE_SIZE
from kvmsim.vm import Invalidation, Vm
from privfs import testing
from privfs.testing import Report

pytestmark = pytest.mark.exhaustive


class World(Protocol):
    def copy(self) -> Self: ...
    def key(self) -> Hashable: ...
    def events(self) -> Iterator[str]: ...
    def step(self, event: str) -> None: ...
    def wrong(self) -> str | None: ...
    def finished(self) -> bool: ...


class Stepped:
    """A world that changes in place, as the explorer wants it."""

    def __init__(self, world: World) -> None:
        self._world = world

    def start(self) -> World:
        return self._world

    def successors(self, state: World) -> Iterator[tuple[str, World]]:
        for event in state.events():
            after = state.copy()
            after.step(event)
            yield event, after

    def key(self, state: World) -> Hashable:
        return state.key()

    def violation(self, state: World) -> str | None:
        return state.wrong()


def explore(start: World) -> Report:
    """Every state must also be able to reach the finish: no dead end, no loop without an exit."""
    return testing.explore(Stepped(start), goal=lambda world: world.finished())


# --- the counter alone ------------------------------------------------------------------------

# One bracket: its ranges are those of the slots that the invalidated file range is bound to.
ONE_SLOT = ((0, 1),)
NEIGHBOUR = ((1, 2),)
TWO_SLOTS = ((0, 1), (2, 3))

KERNEL_ORDER = ("begin", "zap", "free", "end")


class Counter:
    """Brackets × faults over three gfns; a page's content is its generation."""

    def __init__(
        self,
        brackets: tuple[tuple[tuple[int, int], ...], ...],
        faults: tuple[int, ...],
        *,
        invalidate: Callable[[], MmuInvalidate] = MmuInvalidate,
        order: tuple[str, ...] = KERNEL_ORDER,
        snapshot_first: bool = True,
        check_at_store: bool = True,
    ) -> None:
        self.brackets, self.gfns = brackets, faults
        self.order = order
        self.snapshot_first, self.check_at_store = snapshot_first, check_at_store
        self.invalidate = invalidate()
        self.page = [0, 0, 0]
        self.spte: list[int | None] = [None, None, None]
        self.at = [0] * len(brackets)
        # Per fault: step, snapshot, page found. Step 4 is the resumed vCPU.
        self.fault: list[tuple[int, int, int]] = [(0, -1, -1)] * len(faults)

    def copy(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__ = self.__dict__ | {
            "invalidate": self.invalidate.copy(),
            "page": self.page.copy(),
            "spte": self.spte.copy(),
            "at": self.at.copy(),
            "fault": self.fault.copy(),
        }
        return twin

    def key(self) -> Hashable:
        return (
            self.invalidate.key(),
            tuple(self.page),
            tuple(self.spte),
            tuple(self.at),
            tuple(self.fault),
        )

    def script(self, bracket: int) -> list[tuple[str, tuple[int, int]]]:
        """The steps of a bracket; "zap" stands for one section per slot, the rest is once."""
        ranges = self.brackets[bracket]
        return [
            (what, r)
            for what in self.order
            for r in (ranges if what in ("zap", "add", "clear", "free") else ranges[:1])
        ]

    def events(self) -> Iterator[str]:
        for index, at in enumerate(self.at):
            if at < len(self.script(index)):
                yield f"invalidator {index}"
        for index, (step, _, _) in enumerate(self.fault):
            if step < 4:
                yield f"fault {index}"

    def step(self, event: str) -> None:
        who, _, number = event.partition(" ")
        index = int(number)
        if who == "fault":
            self.fault[index] = self._fault(self.gfns[index], *self.fault[index])
            return
        what, (start, end) = self.script(index)[self.at[index]]
        self.at[index] += 1
        if what == "begin":
            self.invalidate.begin()
        if what in ("zap", "add"):
            self.invalidate.range_add(start, end)
        if what in ("zap", "clear"):
            self.spte[start:end] = [None] * (end - start)
        if what == "free":
            self.page[start:end] = [generation + 1 for generation in self.page[start:end]]
        if what == "end":
            self.invalidate.end()

    def _fault(self, gfn: int, step: int, snap: int, page: int) -> tuple[int, int, int]:
        looking, snapping = (1, 0) if self.snapshot_first else (0, 1)
        if step == snapping:
            return step + 1, self.invalidate.seq, page
        if step == looking:
            return step + 1, snap, self.page[gfn]
        if step == 2:
            if self.invalidate.retry(gfn, snap):
                return 0, -1, -1
            if not self.check_at_store:
                return 3, snap, page
        self.spte[gfn] = page
        return 4, -1, -1

    def wrong(self) -> str | None:
        for gfn, (spte, page) in enumerate(zip(self.spte, self.page, strict=True)):
            if spte is not None and spte != page:
                return f"gfn {gfn} maps a freed page"
        return None

    def finished(self) -> bool:
        return self.invalidate.in_progress == 0 and all(step == 4 for step, _, _ in self.fault)


WORLDS = {
    "one bracket, one fault": ((ONE_SLOT,), (0,)),
    "two brackets on one gfn": ((ONE_SLOT, ONE_SLOT), (0, 0)),
    "neighbours": ((ONE_SLOT, NEIGHBOUR), (0, 1)),
    "a bracket over two slots": ((TWO_SLOTS,), (0, 2)),
    "two slots and a neighbour": ((TWO_SLOTS, NEIGHBOUR), (0, 2)),
}


@pytest.mark.parametrize("name", WORLDS)
def test_no_interleaving_maps_a_freed_page_and_every_fault_ends(name: str) -> None:
    found = explore(Counter(*WORLDS[name]))
    assert found.problem is None, found
    assert found.states > 20


class ProgressOnly(MmuInvalidate):
    """The retry test looks at what is in progress and not at the count of ends."""

    def retry(self, gfn: int, snapshot: int) -> bool:
        return super().retry(gfn, self.seq)


COUNTER_MUTATIONS: dict[str, Callable[[], Counter]] = {
    "merged range": lambda: Counter((TWO_SLOTS,), (0,), invalidate=MergedRange),
    "newest range": lambda: Counter((ONE_SLOT, NEIGHBOUR), (0,), invalidate=NewestRange),
    "no seq": lambda: Counter((ONE_SLOT,), (0,), invalidate=NoSeq),
    "seq only": lambda: Counter((ONE_SLOT,), (0,), invalidate=SeqOnly),
    "in progress only": lambda: Counter((ONE_SLOT,), (0,), invalidate=ProgressOnly),
    "snapshot after the page": lambda: Counter((ONE_SLOT,), (0,), snapshot_first=False),
    "check before the lock": lambda: Counter((ONE_SLOT,), (0,), check_at_store=False),
    "zap before begin": lambda: Counter(
        (ONE_SLOT,), (0,), order=("clear", "begin", "add", "free", "end")
    ),
    "end before free": lambda: Counter((ONE_SLOT,), (0,), order=("begin", "zap", "end", "free")),
    "free before zap": lambda: Counter((ONE_SLOT,), (0,), order=("begin", "free", "zap", "end")),
}


@pytest.mark.parametrize("name", COUNTER_MUTATIONS)
def test_a_counter_rule_switched_off_is_found(name: str) -> None:
    found = explore(COUNTER_MUTATIONS[name]())
    assert found.problem == "gfn 0 maps a freed page", found
    assert found.trace


def test_the_merged_range_needs_two_slots_to_show() -> None:
    found = explore(Counter((ONE_SLOT,), (0,), invalidate=MergedRange))
    assert found.problem is None


# --- the VM that ships ------------------------------------------------------------------------

P = PAGE_SIZE
FILE = PrivateFile(1, 4)
PRIVATE = KVM_MEMORY_ATTRIBUTE_PRIVATE
SLOT = Region(0, KVM_MEM_GUEST_MEMFD, 0, 2 * P)  # gfns 0 and 1, file pages 0 and 1
MOVED = replace(SLOT, guest_memfd_offset=2 * P)  # the same gfns, file pages 2 and 3
HALF = SHARED_BIT // P
RAM = -1  # what a shared leaf points at, in place of a generation


class Ram:
    """The shared side: always there, at the page's own number, below all private hpas."""

    def hpa(self, page: int) -> int | None:
        return page * P


RAM_SIDE = Ram()


class Table:
    """Leaves by page of the gpa."""

    def __init__(self, leaves: dict[int, int] | None = None) -> None:
        self.leaves = dict(leaves or {})

    def map(self, gpa: int, hpa: int, npages: int, *, writable: bool, executable: bool) -> None:
        for index in range(npages):
            self.leaves[gpa // P + index] = hpa + index * P

    def zap(self, gpa: int, npages: int) -> int:
        gone = [page for page in self.leaves if gpa // P <= page < gpa // P + npages]
        for page in gone:
            del self.leaves[page]
        return len(gone)


def hpa_of(page: int, generation: int) -> int:
    return (0x1000 + generation * 0x100 + page) * P


class Pages:
    """The user's half: invalidations processed here, as (seq, start, end)."""

    def __init__(self, ring: tuple[tuple[int, int, int], ...] = ()) -> None:
        self.ring = ring

    def copy(self) -> Self:
        return type(self)(self.ring)

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        for newer, first, last in self.ring:
            if newer > seq:
                if first <= page < last:
                    return page, page
                start, end = (max(start, last), end) if last <= page else (start, min(end, first))
        return start, end

    def hpa(self, instance: int, page: int) -> int | None:
        return hpa_of(page, instance)


class Trusting(Pages):
    """Installs whatever it was granted."""

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        return start, end


class Shipping:
    """One VM, two private faults and a shared one, against a script of changes.

    The owner is the simplest that keeps its side: an active punch parks grants, a page's
    generation counts its frees, one punch at a time.
    """

    def __init__(
        self,
        changes: tuple[str, ...],
        gpas: tuple[int, ...],
        *,
        vm: type[Vm] = Vm,
        pages: type[Pages] = Pages,
        fault: type[Fault] = Fault,
        invalidate: type[MmuInvalidate] = MmuInvalidate,
        steps: tuple[str, ...] = ("send", "zap", "end", "free"),
    ) -> None:
        self.changes, self.steps = changes, steps
        self.table, self.pages = Table(), pages()
        self.vm = vm(self.table, self.pages, around=2, window=2)
        self.vm.set_user_memory_region2(SLOT, shared=RAM_SIDE, file=FILE)
        self.vm.set_memory_attributes(0, 2 * P, PRIVATE)
        self.vm.mmu.invalidate = invalidate()
        self.generation = [0] * FILE.npages
        self.seq = 0
        self.active: tuple[int, int] | None = None  # the punch under way, as the owner knows it
        self.queued: tuple[int, int, int] | None = None  # INVALIDATE, not processed here yet
        self.at = (0, 0)  # change, step of it
        self.open: Invalidation | None = None
        self.faults = [fault(index, gpa) for index, gpa in enumerate(gpas)]
        self.needs: list[Effect | None] = [None] * len(gpas)
        self.grants: list[PageGrant | None] = [None] * len(gpas)

    def copy(self) -> Self:
        twin = object.__new__(type(self))
        table, pages = Table(self.table.leaves), self.pages.copy()
        twin.__dict__ = self.__dict__ | {
            "table": table,
            "pages": pages,
            "vm": self.vm.copy(table, pages),
            "generation": self.generation.copy(),
            "faults": [fault.copy() for fault in self.faults],
            "needs": self.needs.copy(),
            "grants": self.grants.copy(),
        }
        return twin

    def key(self) -> Hashable:
        return (
            self.vm.key(),
            tuple(sorted(self.table.leaves.items())),
            self.pages.ring,
            tuple(self.generation),
            self.seq,
            self.active,
            self.queued,
            self.at,
            tuple(fault.key() for fault in self.faults),
            tuple(self.needs),
            tuple(self.grants),
        )

    # events: one step of the changes, or of a fault

    def script(self) -> tuple[str, ...]:
        change = self.changes[self.at[0]]
        return self.steps if change.startswith("punch") else ("begin", "end")

    def events(self) -> Iterator[str]:
        if self.at[0] < len(self.changes):
            yield f"{self.changes[self.at[0]]}: {self.script()[self.at[1]]}"
        for index, fault in enumerate(self.faults):
            if fault.state is State.NEW:
                yield f"vcpu {index}: snapshot"
            elif fault.state is State.SNAPPED:
                yield f"vcpu {index}: look up"
            elif fault.state is State.WAIT_SHARED or self.grants[index]:
                yield f"vcpu {index}: install"
            elif fault.state is State.WAIT_PAGE and self._grantable(index):
                yield f"owner: grant {index}"

    def _grantable(self, index: int) -> bool:
        need = self.needs[index]
        assert isinstance(need, NeedPage)
        return self.active is None or not self.active[0] <= need.page < self.active[1]

    def step(self, event: str) -> None:
        who, _, what = event.partition(": ")
        if who == "owner":
            self._grant(int(what.removeprefix("grant ")))
        elif who.startswith("vcpu"):
            self._fault(int(who.removeprefix("vcpu ")), what)
        else:
            change, at = self.at
            last = at + 1 == len(self.script())
            self._change(who, what)
            self.at = (change + 1, 0) if last else (change, at + 1)

    def _grant(self, index: int) -> None:
        need = self.needs[index]
        assert isinstance(need, NeedPage)
        generation = self.generation[need.page]
        start, end = need.page, need.page + 1
        for page in range(need.start, need.end):  # around it: only what is not being punched
            inside = self.active is not None and self.active[0] <= page < self.active[1]
            if not inside and self.generation[page] == generation:
                start, end = min(start, page), max(end, page + 1)
        self.grants[index] = PageGrant(FILE.id, start, end, self.seq, generation)

    def _fault(self, index: int, what: str) -> None:
        fault, mmu = self.faults[index], self.vm.mmu
        if what == "snapshot":
            fault.snapshot(mmu)
            return
        if what == "look up":
            effect = fault.look_up(mmu)
        elif (grant := self.grants[index]) is not None:
            effect = self.vm.page_arrived(fault, grant)
        else:
            page = self.vm.mmu.slots.find(fault.gfn)
            effect = fault.shared_arrived(mmu, fault.gfn * P if page else None)
        self.grants[index] = None
        self.needs[index] = effect if isinstance(effect, NeedPage) else None
        assert not isinstance(effect, Installed | LeaveGuest) or fault.state is State.DONE
        assert not isinstance(effect, Retry) or fault.state is State.NEW

    def _change(self, change: str, what: str) -> None:
        name, _, number = change.partition(" ")
        if name == "punch":
            self._punch(int(number), what)
        elif what == "end":
            assert self.open is not None
            self.vm.end(self.open)
            self.open = None
        elif name in ("share", "unshare"):
            value = 0 if name == "share" else PRIVATE
            self.open = self.vm.begin_set_memory_attributes(int(number) * P, P, value)
        else:
            region = {"delete": replace(SLOT, memory_size=0), "rebind": MOVED}[name]
            self.open = self.vm.begin_set_user_memory_region2(region, shared=RAM_SIDE, file=FILE)

    def _punch(self, page: int, what: str) -> None:
        if what == "send":
            self.active = (page, page + 1)
            self.seq += 1
            self.queued = (self.seq, page, page + 1)
        elif what == "zap":  # the lane: ring and zap in one section
            assert self.queued is not None
            self.pages.ring = (*self.pages.ring, self.queued)
            self.queued = None
            self.open = self.vm.begin_invalidate_file(FILE.id, page, page + 1)
        elif what == "end":
            assert self.open is not None
            self.vm.end(self.open)
            self.open = None
        else:  # all have acknowledged
            self.generation[page] += 1
            self.active = None

    def wrong(self) -> str | None:
        slot = self.vm.mmu.slots.find(0)
        for leaf, hpa in self.table.leaves.items():
            gfn, private = leaf % HALF, leaf < HALF
            if slot is None:
                return f"gfn {gfn} is mapped without a slot"
            if private != bool(self.vm.mmu.attributes.get(gfn)):
                return f"gfn {gfn} is mapped on the side of the other attribute"
            page = slot.private_page(gfn)
            if private and hpa != hpa_of(page, self.generation[page]):
                return f"gfn {gfn} maps a freed page or another one"
        return None

    def finished(self) -> bool:
        return (
            self.vm.mmu.invalidate.in_progress == 0
            and self.at[0] == len(self.changes)
            and all(fault.state is State.DONE for fault in self.faults)
        )


ZERO, ONE, ZERO_SHARED = 0, P, SHARED_BIT

SCRIPTS = {
    "punch": (("punch 0",), (ZERO, ZERO)),
    "punch of a neighbour": (("punch 1",), (ZERO, ONE)),
    "two punches": (("punch 0", "punch 0"), (ZERO, ONE)),
    "conversion": (("share 0",), (ZERO, ZERO_SHARED)),
    "there and back": (("share 0", "unshare 0"), (ZERO, ZERO_SHARED)),
    "conversion with discard": (("share 0", "punch 0", "unshare 0"), (ZERO, ZERO_SHARED)),
    "delete": (("delete",), (ZERO, ONE)),
    "rebind": (("delete", "rebind"), (ZERO, ONE)),
    "rebind and punch": (("delete", "rebind", "punch 2", "punch 0"), (ZERO,)),
    "three vcpus": (("share 0", "punch 1"), (ZERO, ONE, ZERO_SHARED)),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_interleaving_breaks_the_vm(name: str) -> None:
    found = explore(Shipping(*SCRIPTS[name]))
    assert found.problem is None, found
    assert found.states > 20


VM_MUTATIONS: dict[str, tuple[Callable[[], Shipping], str]] = {
    "grants are trusted": (
        lambda: Shipping(("punch 0",), (ZERO,), pages=Trusting),
        "freed",
    ),
    "snapshot at the store, conversion": (
        lambda: Shipping(("share 0",), (ZERO,), fault=LateSnapshot),
        "other attribute",
    ),
    "snapshot at the store, slot": (
        lambda: Shipping(("delete",), (ZERO,), fault=LateSnapshot),
        "without a slot",
    ),
    "conversion without a bracket": (
        lambda: Shipping(("share 0",), (ZERO,), vm=BlindVm),
        "other attribute",
    ),
    "delete without a bracket": (
        lambda: Shipping(("delete",), (ZERO,), vm=BlindVm),
        "without a slot",
    ),
    "rebind without a bracket": (
        lambda: Shipping(("delete", "rebind"), (ZERO,), vm=BlindVm),
        "without a slot",
    ),
    "the end does not count": (
        lambda: Shipping(("share 0",), (ZERO,), invalidate=NoSeq),
        "other attribute",
    ),
    "the retry test ignores what is in progress": (
        lambda: Shipping(("share 0",), (ZERO,), invalidate=SeqOnly),
        "other attribute",
    ),
    "an invalidation that never ends": (
        lambda: Shipping(("punch 0",), (ZERO,), invalidate=NeverEnds),
        "stuck",
    ),
    "freed before it is zapped": (
        lambda: Shipping(("punch 0",), (ZERO,), steps=("send", "free", "zap", "end")),
        "freed",
    ),
}


@pytest.mark.parametrize("name", VM_MUTATIONS)
def test_a_vm_rule_switched_off_is_found(name: str) -> None:
    make, expected = VM_MUTATIONS[name]
    found = explore(make())
    assert found.problem is not None
    assert expected in found.problem, found
