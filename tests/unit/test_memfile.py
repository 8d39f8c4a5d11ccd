# SPDX-License-Identifier: GPL-2.0-or-later
"""Transcripts: requests in, effects out, one file at a time."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest

from privfs.budget import Budget
from privfs.extents import GROWING
from privfs.memfile import Look, MemFile
from privfs.operation import (
    COMPATIBLE,
    MAX_PAGES,
    STEPS,
    Destroy,
    Done,
    Effect,
    Fallocate,
    FaultIn,
    Kind,
    Perform,
    Request,
    Resize,
    Settled,
    Step,
)
from privfs.personality import GUEST_MEMFD, PAGE_SIZE, RESIZABLE, SHIM, V7, Personality, Refused

KEEP, PUNCH, ZERO = 0x01, 0x03, 0x10


def allocate(start: int, end: int) -> Fallocate:
    return Fallocate(KEEP, start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def grow(start: int, end: int) -> Fallocate:
    return Fallocate(0, start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def punch(start: int, end: int) -> Fallocate:
    return Fallocate(PUNCH, start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def zero(start: int, end: int, mode: int = ZERO) -> Fallocate:
    return Fallocate(mode, start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def resize(pages: int) -> Resize:
    return Resize(pages * PAGE_SIZE)


@dataclass
class Bench:
    """A file, its budget, and a shell that performs steps only when told."""

    personality: Personality = RESIZABLE
    pages: int = 1000
    budget: Budget = field(init=False)
    file: MemFile = field(init=False)

    def __post_init__(self) -> None:
        self.budget = Budget(self.pages)
        self.file = MemFile(self.personality, self.budget)

    def finish(self, effects: list[Effect]) -> list[Effect]:
        """Perform every step at once and return everything that came out."""
        out = list(effects)
        todo = [e for e in effects if isinstance(e, Perform)]
        while todo:
            more = self.file.step_done(todo.pop(0).op)
            out += more
            todo += [e for e in more if isinstance(e, Perform)]
        return out

    def run(self, request: Request, op: str = "setup") -> int:
        """Perform ``request`` to its end; return the errno."""
        done = [e for e in self.finish(self.file.submit(op, request)) if isinstance(e, Done)]
        assert [d.op for d in done] == [op]
        return done[0].errno

    def with_pages(self, *pages: int, size: int = 16) -> Bench:
        assert self.run(resize(size)) == 0
        for page in pages:
            assert self.run(FaultIn(page)) == 0
        return self


def steps(effects: list[Effect]) -> list[Step]:
    return [e.step for e in effects if isinstance(e, Perform)]


def dones(effects: list[Effect]) -> list[tuple[object, int]]:
    return [(e.op, e.errno) for e in effects if isinstance(e, Done)]


# --- the order of steps -------------------------------------------------------------------------


def test_nothing_is_freed_before_it_is_invalidated() -> None:
    assert set(STEPS) == set(Kind)
    for kind, order in STEPS.items():
        assert (Step.FREE in order) == (Step.INVALIDATE in order) == (kind not in COMPATIBLE)
        if Step.FREE in order:
            assert order.index(Step.INVALIDATE) < order.index(Step.FREE)


@pytest.mark.parametrize(
    ("request_", "kind", "start", "end"),
    [
        (allocate(1, 3), Kind.ALLOCATE, 1, 3),
        (FaultIn(2), Kind.FAULT, 2, 3),
        (punch(0, 2), Kind.PUNCH, 0, 2),
        (zero(0, 2), Kind.ZERO, 0, 2),
        (resize(0), Kind.RESIZE, 0, MAX_PAGES),
        (Destroy(), Kind.DESTROY, 0, MAX_PAGES),
    ],
)
def test_every_kind_walks_its_steps(request_: Request, kind: Kind, start: int, end: int) -> None:
    file = Bench().with_pages(0, 1).file
    effects = file.submit("op", request_)
    for step in STEPS[kind]:
        (perform,) = effects
        assert isinstance(perform, Perform)
        assert perform[:5] == ("op", step, kind, start, end)
        assert file.operations() == [("op", step.value, start, end)]
        effects = file.step_done("op")
    assert effects == [Done("op", 0), Settled()]
    assert file.idle


def test_what_is_not_allocated_needs_no_invalidation() -> None:
    bench = Bench().with_pages(9)
    assert bench.file.submit("p", punch(0, 8)) == [Done("p", 0), Settled()]
    assert bench.file.submit("r", resize(12)) == [Done("r", 0), Settled()]
    assert bench.file.submit("a", allocate(9, 10)) == [Done("a", 0), Settled()]
    assert steps(bench.file.submit("z", zero(0, 8))) == [Step.ALLOCATE]


def test_a_destroyed_file_is_told_to_its_users_even_when_empty() -> None:
    assert steps(Bench().file.submit("d", Destroy())) == [Step.INVALIDATE]


def test_a_hole_beyond_the_last_page_number_can_be_punched() -> None:
    file = Bench().with_pages(0).file
    for offset in (MAX_PAGES * PAGE_SIZE, 1 << 50, 2**63 - 2 * PAGE_SIZE):
        assert dones(file.submit("p", Fallocate(PUNCH, offset, PAGE_SIZE))) == [("p", 0)]
    assert steps(file.submit("all", Fallocate(PUNCH, 0, 2**63 - PAGE_SIZE))) == [Step.INVALIDATE]


def test_shrinking_frees_what_lies_beyond_and_sets_the_size_last() -> None:
    bench = Bench().with_pages(0, 5, 15)
    file = bench.file
    file.submit("r", resize(5))
    file.step_done("r")
    assert file.size == 16 * PAGE_SIZE
    assert file.step_done("r") == [Done("r", 0), Settled()]
    assert (file.size, list(file.pages), bench.budget.used) == (5 * PAGE_SIZE, [0], 1)


# --- queueing -----------------------------------------------------------------------------------


def test_overlapping_operations_are_served_first_come_first_served() -> None:
    file = Bench().with_pages(0, 1, 2).file
    file.submit("p1", punch(0, 2))
    assert file.submit("z", zero(1, 3)) == []
    assert file.submit("p2", punch(2, 4)) == []  # meets only z, which came before it
    assert file.submit("a", allocate(8, 9)) != []  # meets nothing
    file.step_done("p1")
    effects = file.step_done("p1")
    assert dones(effects) == [("p1", 0)]
    assert [(e.op, e.step) for e in effects if isinstance(e, Perform)] == [("z", Step.INVALIDATE)]
    assert effects[-1] == Settled()
    file.step_done("z")
    file.step_done("z")
    effects = file.step_done("z")
    assert effects[0] == Done("z", 0)
    assert [e.op for e in effects if isinstance(e, Perform)] == ["p2"]


def test_allocations_and_faults_do_not_wait_for_each_other() -> None:
    bench = Bench().with_pages()
    file = bench.file
    assert steps(file.submit("a", allocate(0, 4))) == [Step.ALLOCATE]
    assert steps(file.submit("f", FaultIn(2))) == [Step.ALLOCATE]
    assert steps(file.submit("b", allocate(2, 6))) == [Step.ALLOCATE]
    assert bench.budget.used == 9  # reservations may overlap
    for op in ("f", "b", "a"):
        file.step_done(op)
    assert (list(file.pages), bench.budget.used) == (list(range(6)), 6)


def test_a_queued_operation_is_judged_again_when_its_turn_comes() -> None:
    file = Bench().with_pages(0, 9).file
    file.submit("r", resize(4))
    assert file.submit("a", allocate(8, 10)) == []  # inside the file, today
    file.step_done("r")
    assert dones(file.step_done("r")) == [("r", 0), ("a", errno.EINVAL)]
    assert file.idle


def test_the_second_size_of_a_guest_memfd_is_refused_in_its_turn() -> None:
    bench = Bench(GUEST_MEMFD)
    assert bench.run(resize(4)) == 0
    assert bench.run(resize(8)) == errno.EINVAL
    assert bench.file.size == 4 * PAGE_SIZE


def test_growths_wait_for_each_other_and_never_shrink_the_file() -> None:
    file = Bench().file
    file.submit("far", grow(30, 40))
    assert file.submit("near", grow(10, 20)) == []
    effects = file.step_done("far")
    assert [(e.op, e.start, e.end) for e in effects if isinstance(e, Perform)] == [("near", 10, 20)]
    file.step_done("near")
    assert file.size == 40 * PAGE_SIZE


def test_a_growth_that_is_undone_excludes_other_growths_until_it_has_ended() -> None:
    file = Bench().file
    file.submit("a", grow(0, 20))
    file.submit("b", grow(30, 40))
    (undo,) = file.step_done("a", failed=errno.ENOSPC, upto=5)
    assert isinstance(undo, Perform)
    assert (undo.step, undo.start, undo.end) == (Step.FREE, 0, 5)
    # b must not move the end of the file over pages that are being freed.
    assert [op for op, *_ in file.operations()] == ["a"]
    effects = file.step_done("a")
    assert effects[0] == Done("a", errno.ENOSPC)
    assert [e.op for e in effects if isinstance(e, Perform)] == ["b"]
    file.step_done("b")
    assert (file.size, list(file.pages)) == (40 * PAGE_SIZE, list(range(30, 40)))


def test_an_allocation_inside_the_file_passes_a_growth() -> None:
    file = Bench().with_pages(size=4).file
    file.submit("g", grow(0, 8))
    assert steps(file.submit("a", allocate(0, 4))) == [Step.ALLOCATE]
    assert steps(file.submit("f", FaultIn(1))) == [Step.ALLOCATE]


def test_a_long_queue_drains_without_recursion() -> None:
    file = Bench().with_pages(0, 1).file
    file.submit("p", punch(0, 2))
    for number in range(600):
        assert file.submit(number, punch(0, 1)) == []
    file.step_done("p")
    assert dones(file.step_done("p")) == [("p", 0)] + [(n, 0) for n in range(600)]
    assert file.idle


# --- faults -------------------------------------------------------------------------------------


def test_what_a_fault_finds() -> None:
    file = Bench().with_pages(1).file
    assert file.look(1) is Look.PRESENT
    assert file.look(0) is Look.HOLE
    with pytest.raises(Refused) as beyond:
        file.look(16)
    assert beyond.value.errno == errno.EFBIG


@pytest.mark.parametrize("request_", [punch(0, 4), zero(0, 4), resize(0), Destroy()])
def test_faults_park_on_destructive_operations_active_or_queued(request_: Request) -> None:
    file = Bench().with_pages(1, 9).file
    file.submit("op", request_)
    assert file.look(1) is Look.PARK
    file = Bench().with_pages(1, 9).file
    file.submit("a", allocate(2, 3))
    assert file.submit("op", request_) == []
    assert file.look(1) is Look.PARK
    assert file.look(9) is (Look.PARK if isinstance(request_, Resize | Destroy) else Look.PRESENT)


def test_faults_do_not_park_on_allocations() -> None:
    file = Bench().with_pages(1).file
    file.submit("a", allocate(0, 4))
    assert file.look(1) is Look.PRESENT
    assert file.look(2) is Look.HOLE


def test_cancelling_a_queued_operation_wakes_the_faults_that_it_parked() -> None:
    file = Bench().with_pages(0, 5).file
    file.submit("hung", punch(0, 1))
    file.submit("wide", punch(0, 8))
    assert file.look(5) is Look.PARK
    effects = file.cancel("wide", errno.EINTR)
    assert dones(effects) == [("wide", errno.EINTR)]
    assert effects[-1] == Settled()
    assert file.look(5) is Look.PRESENT


def test_a_fault_on_a_dead_file_finds_nothing() -> None:
    bench = Bench().with_pages(0)
    assert bench.run(Destroy()) == 0
    with pytest.raises(Refused) as gone:
        bench.file.look(0)
    assert gone.value.errno == errno.ENOENT
    assert dones(bench.file.submit("x", punch(0, 1))) == [("x", errno.ENOENT)]


def test_the_window_is_what_is_allocated_around_a_page() -> None:
    file = Bench().with_pages(2, 3, 4, 6, 7).file
    assert file.window(3, 0, 16) == (2, 5)
    assert file.window(3, 3, 4) == (3, 4)
    assert file.window(7, 0, 16) == (6, 8)
    file.submit("p", punch(4, 6))
    assert file.window(3, 0, 16) == (2, 4)
    assert file.window(7, 0, 16) == (6, 8)
    file.submit("a", allocate(8, 9))
    file.submit("q", punch(7, 12))  # queued behind a, and yet no grant reaches into it
    assert file.window(6, 0, 16) == (6, 7)


def test_the_window_ends_with_its_extent_and_with_the_file() -> None:
    edge = GROWING.extent_range(0)[1]
    bench = Bench(pages=100).with_pages(size=edge + 2)
    assert bench.run(allocate(edge - 2, edge + 2)) == 0
    assert bench.file.window(edge - 1, 0, MAX_PAGES) == (edge - 2, edge)
    assert bench.file.window(edge, 0, MAX_PAGES) == (edge, edge + 2)


# --- budget -------------------------------------------------------------------------------------


def test_an_allocation_reserves_first_and_is_refused_whole() -> None:
    bench = Bench(pages=4).with_pages(0, 1)
    assert bench.run(allocate(0, 8)) == errno.ENOSPC
    assert (bench.budget.used, list(bench.file.pages)) == (2, [0, 1])
    bench.file.submit("a", allocate(0, 4))
    assert bench.budget.used == 4
    assert bench.run(FaultIn(9), "f") == errno.ENOSPC
    bench.file.step_done("a")
    assert bench.budget.used == 4


def test_a_failed_allocation_keeps_what_it_got_and_gives_back_the_rest() -> None:
    bench = Bench().with_pages(1)
    bench.file.submit("a", allocate(0, 8))
    assert bench.budget.used == 8
    effects = bench.file.step_done("a", failed=errno.EINTR, upto=3)
    assert dones(effects) == [("a", errno.EINTR)]
    assert (list(bench.file.pages), bench.budget.used) == ([0, 1, 2], 3)
    assert bench.run(allocate(0, 8)) == 0
    assert bench.budget.used == 8


def test_a_failed_growth_gives_back_what_lies_past_the_end() -> None:
    bench = Bench().with_pages(0, size=2)
    bench.file.submit("g", grow(0, 8))
    (undo,) = bench.file.step_done("g", failed=errno.ENOSPC, upto=6)
    assert isinstance(undo, Perform)
    assert (undo.step, undo.start, undo.end) == (Step.FREE, 2, 6)
    assert dones(bench.file.step_done("g")) == [("g", errno.ENOSPC)]
    assert (bench.file.size, list(bench.file.pages)) == (2 * PAGE_SIZE, [0, 1])
    assert bench.budget.used == 2


@pytest.mark.parametrize("personality", [V7, SHIM])
@pytest.mark.parametrize("code", [errno.EINTR, errno.ENOSPC])
def test_a_failed_growth_leaves_what_lay_past_the_end_before(
    personality: Personality, code: int
) -> None:
    """KEEP_SIZE allocates past the end of v7's files; undoing is for what a call itself added."""
    bench = Bench(personality)
    assert bench.run(allocate(2, 4)) == 0
    assert bench.run(allocate(6, 7)) == 0
    bench.file.submit("g", grow(0, 12))
    effects = bench.file.step_done("g", failed=code, upto=9)
    freed = []
    while dones(effects) == []:
        (undo,) = effects
        assert isinstance(undo, Perform)
        assert undo.step is Step.FREE
        freed.append((undo.start, undo.end))
        effects = bench.file.step_done("g")
    assert dones(effects) == [("g", code)]
    assert freed == [(0, 2), (4, 6), (7, 9)]
    assert (bench.file.size, list(bench.file.pages), bench.budget.used) == (0, [2, 3, 6], 3)


def test_a_growth_that_failed_at_once_frees_nothing() -> None:
    bench = Bench(V7)
    assert bench.run(allocate(0, 2)) == 0
    bench.file.submit("g", grow(0, 12))
    assert dones(bench.file.step_done("g", failed=errno.EINTR, upto=0)) == [("g", errno.EINTR)]
    assert (list(bench.file.pages), bench.budget.used) == ([0, 1], 2)


def test_an_undo_that_fails_leaves_the_rest_and_ends() -> None:
    bench = Bench(V7)
    assert bench.run(allocate(2, 4)) == 0
    bench.file.submit("g", grow(0, 12))
    bench.file.step_done("g", failed=errno.ENOSPC, upto=9)
    assert dones(bench.file.step_done("g", failed=errno.EIO)) == [("g", errno.EIO)]
    assert (bench.file.size, list(bench.file.pages), bench.budget.used) == (0, [*range(9)], 9)


@pytest.mark.parametrize("personality", [V7, SHIM])
def test_what_allocates_past_the_end_waits_for_a_growth_and_its_undo(
    personality: Personality,
) -> None:
    """Else nobody could say whose the pages are that an undo must free."""
    file = Bench(personality).file
    file.submit("g", grow(0, 12))
    assert file.submit("k", allocate(4, 6)) == []
    (undo,) = file.step_done("g", failed=errno.EINTR, upto=9)
    assert isinstance(undo, Perform)
    assert (undo.op, undo.start, undo.end) == ("g", 0, 9)
    effects = file.step_done("g")
    assert [(e.op, e.start, e.end) for e in effects if isinstance(e, Perform)] == [("k", 4, 6)]
    assert file.submit("again", grow(0, 12)) == []
    effects = file.step_done("k")
    assert [e.op for e in effects if isinstance(e, Perform)] == ["again"]
    file.step_done("again")
    assert (file.size, file.allocated) == (12 * PAGE_SIZE, 12)


def test_a_punch_waits_for_all_that_is_still_to_be_undone() -> None:
    bench = Bench(V7)
    assert bench.run(allocate(4, 6)) == 0
    bench.file.submit("g", grow(0, 12))
    bench.file.step_done("g", failed=errno.EINTR, upto=9)
    assert bench.file.submit("p", punch(7, 8)) == []
    bench.file.step_done("g")
    effects = bench.file.step_done("g")
    assert effects[0] == Done("g", errno.EINTR)
    assert dones(effects) == [("g", errno.EINTR), ("p", 0)]
    assert (list(bench.file.pages), bench.budget.used) == ([4, 5], 2)


def test_the_holes_of_a_range() -> None:
    file = Bench().with_pages(2, 3, 6).file
    assert list(file.holes(0, 9)) == [(0, 2), (4, 6), (7, 9)]
    assert list(file.holes(2, 4)) == []
    assert list(file.holes(3, 7)) == [(4, 6)]
    assert list(file.holes(5, 5)) == []


def test_zeroing_uses_again_what_it_frees() -> None:
    bench = Bench(pages=4).with_pages(0, 1, 2, 3)
    assert bench.run(zero(0, 4)) == 0
    assert (bench.budget.used, len(bench.file.pages)) == (4, 4)
    bench.file.submit("z", zero(0, 4))
    bench.file.step_done("z")
    bench.file.step_done("z")
    assert bench.budget.used == 4  # nobody else may take them in between
    bench.file.step_done("z", failed=errno.ENOMEM, upto=1)
    assert (bench.budget.used, list(bench.file.pages)) == (1, [0])


def test_a_failed_growing_zero_gives_everything_back() -> None:
    bench = Bench().with_pages(0, size=2)
    bench.file.submit("z", zero(0, 6))
    bench.file.step_done("z")
    bench.file.step_done("z")
    (undo,) = bench.file.step_done("z", failed=errno.ENOSPC, upto=5)
    assert isinstance(undo, Perform)
    assert (undo.start, undo.end) == (2, 5)
    bench.file.step_done("z")
    assert (list(bench.file.pages), bench.budget.used) == ([0, 1], 2)


@pytest.mark.parametrize("request_", [punch(0, 4), zero(0, 4), resize(1), Destroy()])
def test_a_failed_free_frees_nothing(request_: Request) -> None:
    bench = Bench().with_pages(0, 1, 2)
    bench.file.submit("op", request_)
    bench.file.step_done("op")
    assert dones(bench.file.step_done("op", failed=errno.EIO)) == [("op", errno.EIO)]
    assert (list(bench.file.pages), bench.budget.used) == ([0, 1, 2], 3)
    assert (bench.file.size, bench.file.dead) == (16 * PAGE_SIZE, False)


def test_two_files_draw_on_one_budget() -> None:
    bench = Bench(pages=3).with_pages(0, 1)
    other = MemFile(RESIZABLE, bench.budget)
    other.submit("r", resize(4))
    assert dones(other.submit("a", allocate(0, 2))) == [("a", errno.ENOSPC)]
    assert steps(other.submit("a", allocate(0, 1))) == [Step.ALLOCATE]
    other.step_done("a")
    assert bench.run(Destroy()) == 0
    assert bench.budget.used == 1


# --- leaving early ------------------------------------------------------------------------------


def test_a_queued_operation_is_dropped_when_cancelled() -> None:
    file = Bench().with_pages(0, 1).file
    file.submit("p", punch(0, 1))
    file.submit("q", punch(0, 2))
    file.submit("s", punch(1, 2))
    effects = file.cancel("q", errno.EINTR)
    assert dones(effects) == [("q", errno.EINTR)]
    assert [e.op for e in effects if isinstance(e, Perform)] == ["s"]  # no longer blocked by q


@pytest.mark.parametrize("request_", [punch(0, 4), zero(0, 4), resize(1), Destroy()])
def test_a_cancelled_invalidation_zaps_and_frees_nothing(request_: Request) -> None:
    bench = Bench().with_pages(0, 1)
    file = bench.file
    file.submit("op", request_)
    assert dones(file.cancel("op", errno.EINTR)) == [("op", errno.EINTR)]
    assert file.cancel("op", errno.EINTR) == []
    assert file.look(1) is Look.PARK  # acknowledgements are still collected
    assert file.step_done("op") == [Settled()]
    assert (list(file.pages), file.size, bench.budget.used) == ([0, 1], 16 * PAGE_SIZE, 2)
    assert not file.dead


def test_what_has_begun_to_free_or_allocate_ends_by_itself() -> None:
    file = Bench().with_pages(0).file
    file.submit("p", punch(0, 1))
    file.step_done("p")
    assert file.cancel("p", errno.EINTR) == []
    assert dones(file.step_done("p")) == [("p", 0)]
    file.submit("a", allocate(0, 1))
    assert file.cancel("a", errno.EINTR) == []
    assert dones(file.step_done("a")) == [("a", 0)]
    assert file.cancel("a", errno.EINTR) == []
    assert file.cancel("never heard of", errno.EINTR) == []


def test_an_abandoned_invalidation_frees_nothing_and_lets_the_queue_go_on() -> None:
    file = Bench().with_pages(0, 1).file
    file.submit("p", punch(0, 1))
    file.submit("q", punch(0, 2))
    effects = file.abandon("p", errno.EIO, "no proof")
    assert effects[0] == Done("p", errno.EIO, "no proof")
    assert [e.op for e in effects if isinstance(e, Perform)] == ["q"]
    assert effects[-1] == Settled()
    assert list(file.pages) == [0, 1]


def test_an_abandoned_zap_has_no_caller_left() -> None:
    file = Bench().with_pages(0).file
    file.submit("p", punch(0, 1))
    file.cancel("p", errno.EINTR)
    assert file.abandon("p", errno.EIO, "no proof") == [Settled()]


def test_freeing_cannot_be_abandoned() -> None:
    file = Bench().with_pages(0).file
    file.submit("p", punch(0, 1))
    file.step_done("p")
    before = file.key()
    with pytest.raises(ValueError, match="too late"):
        file.abandon("p", errno.EIO, "")
    assert file.key() == before
    with pytest.raises(KeyError, match="no operation 'nobody'"):
        file.step_done("nobody")
    assert file.key() == before


# --- extents ------------------------------------------------------------------------------------


def test_extents_die_only_when_they_leave_the_file_and_never_come_back() -> None:
    first, second = GROWING.extent_range(1)[0], GROWING.extent_range(2)[0]
    bench = Bench().with_pages(0, first, second, size=second + 4)
    file = bench.file
    assert file.instances == {0: 1, 1: 2, 2: 3}
    (effect,) = file.submit("p", punch(first, second + 4))
    assert isinstance(effect, Perform)
    assert effect.dead == ()
    (effect,) = file.step_done("p")
    assert isinstance(effect, Perform)
    assert effect.dead == ()  # a punched extent is used again
    file.step_done("p")
    assert file.instances == {0: 1, 1: 2, 2: 3}

    file.submit("r", resize(first + 1))
    (effect,) = file.step_done("r")
    assert isinstance(effect, Perform)
    assert effect.dead == ((2, 3),)  # extent 1 still has a page in the file
    file.step_done("r")
    assert file.instances == {0: 1, 1: 2}
    assert bench.run(resize(second + 4)) == 0
    assert bench.run(FaultIn(second)) == 0
    assert file.instances == {0: 1, 1: 2, 2: 4}

    file.submit("d", Destroy())
    (effect,) = file.step_done("d")
    assert isinstance(effect, Perform)
    assert effect.dead == ((0, 1), (1, 2), (2, 4))


def test_shrinking_to_zero_ends_every_extent() -> None:
    bench = Bench().with_pages(0)
    bench.file.submit("r", resize(0))
    (free,) = bench.file.step_done("r")
    assert isinstance(free, Perform)
    assert free.dead == ((0, 1),)
    bench.file.step_done("r")
    assert (bench.file.instances, bench.budget.used) == ({}, 0)


# --- values -------------------------------------------------------------------------------------


def test_a_copy_goes_its_own_way() -> None:
    bench = Bench().with_pages(0, 1)
    bench.file.submit("p", punch(0, 1))
    bench.file.submit("q", punch(0, 1))
    budget = bench.budget.copy()
    twin = bench.file.copy(budget)
    before = bench.file.key()
    assert twin.key() == before
    twin.cancel("p", errno.EINTR)
    assert bench.file.key() == before
    twin.step_done("p")
    assert bench.file.key() == before
    twin.step_done("q")
    twin.step_done("q")
    assert (list(twin.pages), budget.used) == ([1], 1)
    assert (bench.file.key(), bench.budget.used) == (before, 2)
    assert twin.idle
    assert not bench.file.idle


# --- what the host may map -----------------------------------------------------------------------


def mapped(*, shared: bool) -> Bench:
    bench = Bench(GUEST_MEMFD)
    bench.finish(bench.file.submit("size", resize(8)))
    bench.file.map_by_host(shared=shared)
    return bench


def test_host_mapped_files_lie_in_one_extent_from_the_start() -> None:
    bench = mapped(shared=True)
    assert bench.file.instances == {0: 1}
    assert bench.file.personality.layout.count == 1
    assert mapped(shared=False).file.instances == {}
    assert bench.file.key() != mapped(shared=False).file.key()
    assert bench.file.copy(bench.budget).key() == bench.file.key()


def test_what_the_host_touches_is_the_files_and_counts() -> None:
    bench = mapped(shared=True)
    bench.file.adopt([(1, 3), (6, 99)])
    assert list(bench.file.pages) == [1, 2, 6, 7]
    assert bench.budget.used == 4
    assert bench.file.look(1) is Look.PRESENT
    assert bench.file.look(0) is Look.HOLE
    bench.finish(bench.file.submit("punch", punch(0, 8)))
    assert (bench.file.allocated, bench.budget.used) == (0, 0)


def test_a_punch_of_a_host_mapped_file_is_never_needless() -> None:
    bench = mapped(shared=True)
    steps = [e.step for e in bench.finish(bench.file.submit("punch", punch(2, 4)))
             if isinstance(e, Perform)]  # fmt: skip
    assert steps == [Step.INVALIDATE, Step.FREE]
    assert [type(e) for e in mapped(shared=False).file.submit("punch", punch(2, 4))] == [
        Done, Settled,
    ]  # fmt: skip


def test_the_end_of_a_host_mapped_file_takes_its_extent() -> None:
    bench = mapped(shared=True)
    performed = [e for e in bench.finish(bench.file.submit("end", Destroy()))
                 if isinstance(e, Perform)]  # fmt: skip
    assert performed[-1].step is Step.FREE
    assert performed[-1].dead == ((0, 1),)
    bench.file.adopt([(0, 1)])
    assert bench.budget.used == 0


@pytest.mark.parametrize(
    ("personality", "before", "code"),
    [
        (RESIZABLE, [resize(4)], errno.EOPNOTSUPP),
        (GUEST_MEMFD, [], errno.EINVAL),
        (GUEST_MEMFD, [resize(4), allocate(0, 1)], errno.EBUSY),
    ],
)
def test_who_cannot_be_mapped_by_the_host(
    personality: Personality, before: list[Request], code: int
) -> None:
    bench = Bench(personality)
    for number, request in enumerate(before):
        bench.finish(bench.file.submit(number, request))
    state = bench.file.key()
    with pytest.raises(Refused) as refused:
        bench.file.map_by_host(shared=True)
    assert refused.value.errno == code
    assert bench.file.key() == state
