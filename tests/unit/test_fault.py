# SPDX-License-Identifier: GPL-2.0-or-later
"""The fault machine, row by row: what was found × what arrived → leaf, retry or exit."""

from __future__ import annotations

from collections.abc import Callable
from errno import EACCES, EFAULT, EFBIG, EIO, ENOENT, ENOMEM, EPERM

import pytest

from kvmsim.attributes import Attributes
from kvmsim.exits import BadHvaExit, InternalErrorExit, MemoryFaultExit, MmioExit
from kvmsim.fault import (
    Access,
    Effect,
    Fault,
    FaultStateError,
    Installed,
    LeaveGuest,
    NeedPage,
    NeedShared,
    PageGrant,
    Retry,
    RetryReason,
    State,
)
from kvmsim.invalidate import MmuInvalidate
from kvmsim.kind import SHARED_BIT
from kvmsim.memslot import Memslots
from kvmsim.mmu import Mmu
from kvmsim.region import PrivateFile, Region
from kvmsim.uapi import (
    ABIS,
    EHWPOISON,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_READONLY,
    PAGE_SIZE,
    Abi,
)

P = PAGE_SIZE
FILE, INSTANCE = 7, 3
FILE_PAGE = 32  # of the private slot's first gfn
BASE = 0x100  # first gfn of the slot, 64 pages
GFN = BASE + 21
PAGE = FILE_PAGE + 21
ARENA = 1 << 39
RAM = 1 << 38
HVA_PAGE = 0x1000


class Table:
    """A second stage as a dict: page of the gpa → (hpa, writable)."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.leaves: dict[int, tuple[int, bool]] = {}
        self.room = room

    def map(self, gpa: int, hpa: int, npages: int, *, writable: bool, executable: bool) -> None:
        assert gpa % P == hpa % P == 0
        assert npages > 0
        assert executable
        if len(self.leaves) + npages > self.room:
            raise MemoryError
        for index in range(npages):
            self.leaves[gpa // P + index] = (hpa + index * P, writable)

    def zap(self, gpa: int, npages: int) -> int:
        gone = [page for page in self.leaves if gpa // P <= page < gpa // P + npages]
        for page in gone:
            del self.leaves[page]
        return len(gone)


class Pages:
    """Instance 3 holds file pages ``here`` from ARENA; invalidations are (seq, start, end)."""

    def __init__(self) -> None:
        self.here = range(1024)
        self.ring: list[tuple[int, int, int]] = []

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        assert file == FILE
        for newer, first, last in self.ring:
            if newer > seq:
                if first <= page < last:
                    return page, page
                if last <= page:
                    start = max(start, last)
                else:
                    end = min(end, first)
        return start, end

    def hpa(self, instance: int, page: int) -> int | None:
        return ARENA + page * P if instance == INSTANCE and page in self.here else None


class Ram:
    """The shared side: linear but for the pages in ``holes`` and ``elsewhere``."""

    def __init__(self) -> None:
        self.holes: set[int] = set()
        self.elsewhere: set[int] = set()

    def hpa(self, page: int) -> int | None:
        if page in self.holes:
            return None
        return RAM + page * P + (1 << 30 if page in self.elsewhere else 0)


def mmu_of(abi: Abi = "upstream", slot: str = "file", *, private: bool = True) -> Mmu:
    mmu = Mmu(Memslots(abi), Attributes(), MmuInvalidate(), Table(), Pages(), abi, 16, 32)
    if slot != "none":
        flags = {"file": KVM_MEM_GUEST_MEMFD, "plain": 0, "readonly": KVM_MEM_READONLY}[slot]
        region = Region(0, flags, BASE * P, 64 * P, HVA_PAGE * P, FILE_PAGE * P)
        mmu.slots.set(region, shared=Ram(), file=PrivateFile(FILE, 1024))
    if private:
        mmu.attributes.set(0, 1 << 20, ABIS[abi].attribute_private)
    return mmu


def fault_of(*, private: bool = True, gfn: int = GFN, **access: object) -> Fault:
    gpa = gfn * P + 0x123 | (0 if private else SHARED_BIT)
    return Fault(0, gpa, Access(**access))  # type: ignore[arg-type]


def look(mmu: Mmu, fault: Fault) -> Effect:
    fault.snapshot(mmu)
    return fault.look_up(mmu)


def grant(start: int = PAGE, end: int = PAGE + 1, **other: object) -> PageGrant:
    fields = {"file": FILE, "seq": 0, "instance": INSTANCE} | other
    return PageGrant(start=start, end=end, **fields)  # type: ignore[arg-type]


def leaves(mmu: Mmu) -> dict[int, tuple[int, bool]]:
    assert isinstance(mmu.stage2, Table)
    return mmu.stage2.leaves


def memory_fault(private: bool, number: int | None) -> Callable[[Effect], bool]:
    def told(effect: Effect) -> bool:
        return (
            isinstance(effect, LeaveGuest)
            and isinstance(effect.exit, MemoryFaultExit)
            and (effect.exit.gpa, effect.exit.size) == (GFN * P, P)
            and (effect.exit.private, effect.exit.errno) == (private, number)
            and effect.exit.reason != ""
        )

    return told


def mmio(effect: Effect) -> bool:
    return effect == LeaveGuest(MmioExit(GFN * P + 0x123, 1, False))


def page(effect: Effect) -> bool:
    return isinstance(effect, NeedPage) and (effect.file, effect.page) == (FILE, PAGE)


def shared(effect: Effect) -> bool:
    return isinstance(effect, NeedShared) and effect.page == HVA_PAGE + 21


to_private = memory_fault(True, EFAULT)
to_shared = memory_fault(False, EFAULT)
no_file = memory_fault(True, EFAULT)

# interface, slot, attribute, access → effect
LOOK_UP = [
    ("upstream", "none", "shared", "shared", mmio),
    ("upstream", "none", "shared", "private", to_private),
    ("upstream", "none", "private", "shared", to_shared),
    ("upstream", "none", "private", "private", no_file),
    ("upstream", "plain", "shared", "shared", shared),
    ("upstream", "plain", "shared", "private", to_private),
    ("upstream", "plain", "private", "shared", to_shared),
    ("upstream", "plain", "private", "private", no_file),
    ("upstream", "file", "shared", "shared", shared),
    ("upstream", "file", "shared", "private", to_private),
    ("upstream", "file", "private", "shared", to_shared),
    ("upstream", "file", "private", "private", page),
    ("v7", "none", "shared", "shared", mmio),
    ("v7", "none", "shared", "private", mmio),
    ("v7", "none", "private", "shared", mmio),
    ("v7", "none", "private", "private", mmio),
    ("v7", "plain", "shared", "shared", shared),
    ("v7", "plain", "shared", "private", shared),
    ("v7", "plain", "private", "shared", shared),
    ("v7", "plain", "private", "private", shared),
    ("v7", "file", "shared", "shared", shared),
    ("v7", "file", "shared", "private", memory_fault(True, None)),
    ("v7", "file", "private", "shared", memory_fault(False, None)),
    ("v7", "file", "private", "private", page),
]


@pytest.mark.parametrize(
    ("abi", "slot", "attribute", "access", "expected"),
    LOOK_UP,
    ids=["-".join(row[:4]) for row in LOOK_UP],
)
def test_look_up(
    abi: Abi, slot: str, attribute: str, access: str, expected: Callable[[Effect], bool]
) -> None:
    mmu = mmu_of(abi, slot, private=attribute == "private")
    effect = look(mmu, fault_of(private=access == "private"))
    assert expected(effect), effect
    assert leaves(mmu) == {}


def test_look_up_is_complete() -> None:
    assert len({row[:4] for row in LOOK_UP}) == 2 * 3 * 2 * 2


@pytest.mark.parametrize(("slot", "write"), [("none", True), ("readonly", True)])
def test_mmio_write_carries_its_data(slot: str, write: bool) -> None:
    fault = fault_of(private=False, write=write, length=4, data=b"abcd")
    effect = look(mmu_of(slot=slot, private=False), fault)
    assert effect == LeaveGuest(MmioExit(GFN * P + 0x123, 4, True, b"abcd"))


def test_fetch_from_a_device_is_an_internal_error() -> None:
    effect = look(mmu_of(slot="none", private=False), fault_of(private=False, fetch=True))
    assert effect == LeaveGuest(InternalErrorExit(KVM_INTERNAL_ERROR_EMULATION))


def test_read_only_slot_is_read_by_leaf_and_written_by_exit() -> None:
    mmu = mmu_of(slot="readonly", private=False)
    fault = fault_of(private=False)
    needed = look(mmu, fault)
    assert isinstance(needed, NeedShared)
    assert isinstance(fault.shared_arrived(mmu, RAM + needed.page * P), Installed)
    assert {writable for _, writable in leaves(mmu).values()} == {False}


@pytest.mark.parametrize("write", [False, True])
def test_request_names_the_page_and_the_block_around_it(write: bool) -> None:
    # Blocks are aligned in gfns: GFN is 0x115, its block of 32 is 0x100-0x11f.
    effect = look(mmu_of(), fault_of(write=write))
    assert effect == NeedPage(FILE, PAGE, FILE_PAGE, FILE_PAGE + 32, write)


def test_request_ends_where_slot_or_attribute_ends() -> None:
    mmu = mmu_of()
    mmu.attributes.set(GFN + 2, GFN + 3, 0)
    mmu.attributes.set(GFN - 4, GFN - 3, 0)
    assert look(mmu, fault_of()) == NeedPage(FILE, PAGE, PAGE - 3, PAGE + 2, False)
    last = BASE + 63
    mmu = mmu_of()
    mmu.window = 512
    assert look(mmu, fault_of(gfn=last)) == NeedPage(
        FILE, FILE_PAGE + 63, FILE_PAGE, FILE_PAGE + 64, False
    )


# --- a page arrives ---------------------------------------------------------------------------

STATUSES = [
    (ENOENT, EFAULT),
    (EFBIG, EFAULT),
    (EACCES, EFAULT),
    (EIO, EIO),
    (ENOMEM, ENOMEM),
    (EHWPOISON, EHWPOISON),
    (EPERM, EIO),  # nothing an owner says: still an exit, not a retry
]


@pytest.mark.parametrize("abi", ["upstream", "v7"])
@pytest.mark.parametrize(("status", "number"), STATUSES)
@pytest.mark.parametrize("stale", [False, True])
def test_an_error_is_an_exit_and_never_a_retry(
    abi: Abi, status: int, number: int, stale: bool
) -> None:
    mmu = mmu_of(abi)
    fault = fault_of()
    look(mmu, fault)
    if stale:
        bump(mmu, GFN)
    effect = fault.page_arrived(mmu, grant(0, 0, status=status))
    assert memory_fault(True, number)(effect), effect
    assert fault.state is State.DONE
    assert leaves(mmu) == {}


def test_write_by_a_read_only_user_is_an_exit() -> None:
    mmu = mmu_of()
    fault = fault_of(write=True)
    look(mmu, fault)
    effect = fault.page_arrived(mmu, grant(writable=False))
    assert memory_fault(True, EFAULT)(effect), effect


def test_read_grant_is_mapped_read_only() -> None:
    mmu = mmu_of()
    fault = fault_of()
    look(mmu, fault)
    assert fault.page_arrived(mmu, grant(writable=False)) == Installed(GFN * P, 1)
    assert leaves(mmu) == {GFN: (ARENA + PAGE * P, False)}


@pytest.mark.parametrize(
    "answer",
    [grant(file=8), grant(PAGE + 1, PAGE + 2), grant(PAGE - 1, PAGE), grant(0, 0)],
)
def test_an_answer_to_another_question_is_an_exit(answer: PageGrant) -> None:
    mmu = mmu_of()
    fault = fault_of()
    look(mmu, fault)
    assert memory_fault(True, EIO)(fault.page_arrived(mmu, answer))
    assert leaves(mmu) == {}


def test_no_room_for_tables_is_an_exit() -> None:
    mmu = mmu_of()
    assert isinstance(mmu.stage2, Table)
    mmu.stage2.room = 0
    fault = fault_of()
    look(mmu, fault)
    assert memory_fault(True, ENOMEM)(fault.page_arrived(mmu, grant()))


def bump(mmu: Mmu, gfn: int) -> None:
    mmu.invalidate.begin()
    mmu.invalidate.range_add(gfn, gfn + 1)
    mmu.invalidate.end()


def in_progress(mmu: Mmu) -> None:
    mmu.invalidate.begin()
    mmu.invalidate.range_add(GFN, GFN + 1)


def begun_without_range(mmu: Mmu) -> None:
    mmu.invalidate.begin()


def newer(mmu: Mmu) -> None:
    assert isinstance(mmu.backing, Pages)
    mmu.backing.ring.append((5, PAGE, PAGE + 1))


def retired(mmu: Mmu) -> None:
    assert isinstance(mmu.backing, Pages)
    mmu.backing.here = range(0)


RETRIES = [
    (in_progress, RetryReason.IN_PROGRESS),
    (begun_without_range, RetryReason.IN_PROGRESS),
    (lambda mmu: bump(mmu, GFN), RetryReason.INVALIDATED),
    (lambda mmu: bump(mmu, 0), RetryReason.INVALIDATED),
    (newer, RetryReason.NEWER),
    (retired, RetryReason.INSTANCE),
]


@pytest.mark.parametrize(("event", "reason"), RETRIES)
def test_what_happened_since_the_snapshot_means_retry(
    event: Callable[[Mmu], None], reason: RetryReason
) -> None:
    mmu = mmu_of()
    fault = fault_of()
    look(mmu, fault)
    event(mmu)
    assert fault.page_arrived(mmu, grant(seq=4)) == Retry(reason)
    assert fault.state is State.NEW
    assert leaves(mmu) == {}


@pytest.mark.parametrize(("event", "reason"), RETRIES[:4])
def test_the_shared_side_retries_as_well(event: Callable[[Mmu], None], reason: RetryReason) -> None:
    mmu = mmu_of(private=False)
    fault = fault_of(private=False)
    assert isinstance(look(mmu, fault), NeedShared)
    event(mmu)
    assert fault.shared_arrived(mmu, RAM) == Retry(reason)
    assert leaves(mmu) == {}


def test_after_a_retry_the_same_fault_succeeds() -> None:
    mmu = mmu_of()
    fault = fault_of()
    look(mmu, fault)
    bump(mmu, GFN)
    assert isinstance(fault.page_arrived(mmu, grant()), Retry)
    assert isinstance(look(mmu, fault), NeedPage)
    assert isinstance(fault.page_arrived(mmu, grant()), Installed)


def test_a_fault_that_begins_inside_an_invalidation_of_its_gfn_retries_at_once() -> None:
    mmu = mmu_of()
    in_progress(mmu)
    assert look(mmu, fault_of()) == Retry(RetryReason.IN_PROGRESS)
    assert isinstance(look(mmu, fault_of(gfn=GFN + 1)), NeedPage)


# --- around the page --------------------------------------------------------------------------


def installed(mmu: Mmu, answer: PageGrant) -> tuple[int, int]:
    """The gfns that ``answer`` mapped, after checking where every one of them points."""
    fault = fault_of()
    look(mmu, fault)
    effect = fault.page_arrived(mmu, answer)
    assert isinstance(effect, Installed)
    first = effect.gpa // P
    last = first + effect.npages
    assert first <= GFN < last
    assert leaves(mmu) == {
        gfn: (ARENA + (FILE_PAGE + gfn - BASE) * P, True) for gfn in range(first, last)
    }
    return first, last


def test_a_whole_grant_is_mapped_at_its_gfns() -> None:
    assert installed(mmu_of(), grant(PAGE - 3, PAGE + 5)) == (GFN - 3, GFN + 5)


def test_a_grant_is_clipped_to_the_slot() -> None:
    mmu = mmu_of()
    mmu.window = 512
    assert installed(mmu, grant(0, 1024)) == (BASE, BASE + 64)


def test_a_grant_is_clipped_to_what_is_private() -> None:
    mmu = mmu_of()
    mmu.attributes.set(GFN + 2, GFN + 3, 0)
    mmu.attributes.set(GFN - 1, GFN, 0)
    assert installed(mmu, grant(PAGE - 8, PAGE + 8)) == (GFN, GFN + 2)


def test_a_grant_is_clipped_to_what_no_newer_invalidation_met() -> None:
    mmu = mmu_of()
    assert isinstance(mmu.backing, Pages)
    mmu.backing.ring += [(5, PAGE + 1, PAGE + 3), (6, PAGE - 5, PAGE - 2), (2, PAGE, PAGE + 1)]
    assert installed(mmu, grant(PAGE - 8, PAGE + 8, seq=4)) == (GFN - 2, GFN + 1)


def test_only_the_page_itself_if_the_instance_is_not_all_here() -> None:
    mmu = mmu_of()
    assert isinstance(mmu.backing, Pages)
    mmu.backing.here = range(PAGE - 1, PAGE + 2)
    assert installed(mmu, grant(PAGE - 8, PAGE + 8)) == (GFN, GFN + 1)


def test_only_the_page_itself_while_its_neighbours_are_invalidated() -> None:
    mmu = mmu_of()
    fault = fault_of()
    look(mmu, fault)
    mmu.invalidate.begin()
    mmu.invalidate.range_add(GFN + 1, GFN + 2)
    assert fault.page_arrived(mmu, grant(PAGE - 8, PAGE + 8)) == Installed(GFN * P, 1)
    assert list(leaves(mmu)) == [GFN]


def test_shared_side_lands_in_the_shared_half_with_its_block() -> None:
    mmu = mmu_of(private=False)
    fault = fault_of(private=False, write=True)
    needed = look(mmu, fault)
    assert isinstance(needed, NeedShared)
    effect = fault.shared_arrived(mmu, RAM + needed.page * P)
    assert effect == Installed(0x110 * P | SHARED_BIT, 16)
    half = SHARED_BIT // P
    assert leaves(mmu) == {
        half + gfn: (RAM + (HVA_PAGE + gfn - BASE) * P, True) for gfn in range(0x110, 0x120)
    }


def test_shared_block_stops_at_holes_and_breaks() -> None:
    mmu = mmu_of(private=False)
    fault = fault_of(private=False)
    needed = look(mmu, fault)
    assert isinstance(needed, NeedShared)
    side = needed.slot.shared
    assert isinstance(side, Ram)
    side.holes.add(needed.page + 2)
    side.elsewhere.add(needed.page - 2)
    effect = fault.shared_arrived(mmu, RAM + needed.page * P)
    assert effect == Installed((GFN - 1) * P | SHARED_BIT, 3)


def test_plain_slot_of_v7_is_mapped_in_the_half_that_was_touched() -> None:
    mmu = mmu_of("v7", "plain")
    fault = fault_of(private=True)
    needed = look(mmu, fault)
    assert isinstance(needed, NeedShared)
    effect = fault.shared_arrived(mmu, RAM + needed.page * P)
    assert isinstance(effect, Installed)
    assert not effect.gpa & SHARED_BIT


def test_nothing_behind_the_hva() -> None:
    mmu = mmu_of(private=False)
    fault = fault_of(private=False)
    look(mmu, fault)
    assert fault.shared_arrived(mmu, None) == LeaveGuest(BadHvaExit(GFN * P))


# --- the machine ------------------------------------------------------------------------------

STEPS: dict[str, Callable[[Fault, Mmu], object]] = {
    "snapshot": lambda fault, mmu: fault.snapshot(mmu),
    "look_up": lambda fault, mmu: fault.look_up(mmu),
    "page_arrived": lambda fault, mmu: fault.page_arrived(mmu, grant()),
    "shared_arrived": lambda fault, mmu: fault.shared_arrived(mmu, RAM),
}
ALLOWED = {
    State.NEW: "snapshot",
    State.SNAPPED: "look_up",
    State.WAIT_PAGE: "page_arrived",
    State.WAIT_SHARED: "shared_arrived",
    State.DONE: None,
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_legal_in_one_state_only(state: State, step: str) -> None:
    mmu = mmu_of()
    fault = fault_of()
    fault.slot, fault.state, fault.snap = mmu.slots.find(GFN), state, 0
    before = fault.key()
    if ALLOWED[state] == step:
        STEPS[step](fault, mmu)
        assert fault.key() != before
        return
    with pytest.raises(FaultStateError, match=step):
        STEPS[step](fault, mmu)
    assert fault.key() == before
    assert leaves(mmu) == {}


def test_copy_is_apart() -> None:
    mmu = mmu_of()
    fault = fault_of()
    look(mmu, fault)
    twin = fault.copy()
    assert twin.key() == fault.key()
    twin.page_arrived(mmu, grant())
    assert fault.state is State.WAIT_PAGE
    assert twin.key() != fault.key()
