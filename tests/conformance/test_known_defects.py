# SPDX-License-Identifier: GPL-2.0-or-later
"""What the v7 series and the shim that followed got wrong is not repeated.

Each test is named after a defect: of v7 (July 2022: shmem_fallocate, kvm_private_mem_get_pfn) or
of the shim (September 2022: mm/inaccessible.c).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from conformance.runs import outcome

from privfs.budget import Budget
from privfs.memfile import Look, MemFile
from privfs.operation import (
    Destroy,
    Done,
    Effect,
    Fallocate,
    FaultIn,
    Perform,
    Request,
    Resize,
    Step,
)
from privfs.personality import PERSONALITIES, Refused
from privfs.testing.conformance import REFERENCE

PAGE = 4096
PAGES = 16
KEEP, PUNCH = 1, 3
EVERY = list(PERSONALITIES)
ONCE = ["v7", "shim"]
EIO_PATIENCE = "a user could not be proven to have let go"


def made(who: str, filled: bool = True, pages: int = PAGES) -> MemFile:
    """Return a file of some pages, all allocated or none."""
    file = MemFile(PERSONALITIES[who], Budget(1 << 16))
    finish(file, file.submit("size", Resize(pages * PAGE)))
    if filled:
        finish(file, file.submit("fill", Fallocate(KEEP, 0, pages * PAGE)))
        assert file.allocated == pages
    return file


def finish(file: MemFile, effects: list[Effect]) -> list[Effect]:
    """Perform every step at once; return all effects."""
    seen: list[Effect] = []
    while effects:
        effect = effects.pop(0)
        seen.append(effect)
        if isinstance(effect, Perform):
            effects += file.step_done(effect.op)
    return seen


def answer(effects: list[Effect], op: str) -> int:
    """Return the errno that the caller of ``op`` got."""
    (done,) = [effect for effect in effects if isinstance(effect, Done) and effect.op == op]
    return done.errno


def performed(effects: list[Effect]) -> list[Perform]:
    return [effect for effect in effects if isinstance(effect, Perform)]


# --- size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ONCE)
@pytest.mark.parametrize("offset", [(PAGES - 1) * PAGE, PAGES * PAGE, (PAGES + 9) * PAGE])
def test_a_plain_fallocate_past_the_end_grew_a_fixed_size(who: str, offset: int) -> None:
    file = made(who, filled=False)
    assert answer(finish(file, file.submit("grow", Fallocate(0, offset, 2 * PAGE))), "grow") == (
        errno.EPERM
    )
    assert (file.size, file.allocated) == (PAGES * PAGE, 0)


@pytest.mark.parametrize("who", ONCE)
def test_a_fallocate_left_a_size_that_is_no_whole_page(who: str) -> None:
    file = MemFile(PERSONALITIES[who], Budget(16))
    assert answer(finish(file, file.submit("first", Fallocate(0, 0, 100))), "first") == errno.EINVAL
    assert file.size == 0


@pytest.mark.parametrize("who", EVERY)
@pytest.mark.parametrize("page", [PAGES, PAGES + 1, 1 << 31])
def test_a_guest_fault_past_the_end_allocated(who: str, page: int) -> None:
    file = made(who)
    with pytest.raises(Refused) as refused:
        file.look(page)
    assert refused.value.errno == errno.EFBIG
    assert file.allocated == PAGES


@pytest.mark.fuse
@pytest.mark.parametrize("target", ["user:shim", "user:v7", "user:resizable"])
@pytest.mark.parametrize("row", ["two-gib", "beyond-32-bits", "largest"])
def test_a_size_of_2_gib_was_refused_without_o_largefile(ran: None, target: str, row: str) -> None:
    assert outcome(target, f"ftruncate.first.{row}").startswith("0 size=")
    assert "LARGEFILE" in outcome(target, "F_GETFL")


@pytest.mark.fuse
@pytest.mark.parametrize("target", [f"user:{who}" for who in REFERENCE])
def test_getattr_showed_another_inode_s_size(ran: None, target: str) -> None:
    size = str(PAGES * PAGE)
    assert outcome(target, "fstat.size") == size
    assert int(outcome(target, "statx.size"), 16) == int(size)
    assert outcome(target, "reopened.size") == f"size={size}"
    assert outcome(target, "blocks.filled") == f"{PAGES} pages"


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", EVERY)
@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENOSPC])
def test_a_failed_allocation_made_the_vcpu_spin(who: str, code: int) -> None:
    """The fault is answered with the errno: an exit, not a retry that nobody ends."""
    file = made(who, filled=False)
    (step,) = file.submit("fault", FaultIn(3))
    assert isinstance(step, Perform)
    assert step.step is Step.ALLOCATE
    assert answer(file.step_done("fault", failed=code), "fault") == code
    assert file.allocated == 0
    assert file.idle
    assert file.look(3) is Look.HOLE  # not parked: the next fault is a new attempt
    finish(file, file.submit("again", FaultIn(3)))
    assert file.look(3) is Look.PRESENT


@pytest.mark.parametrize("who", EVERY)
def test_an_exhausted_budget_made_the_vcpu_spin(who: str) -> None:
    file = MemFile(PERSONALITIES[who], Budget(1))
    finish(file, file.submit("size", Resize(2 * PAGE)))
    finish(file, file.submit("first", FaultIn(0)))
    assert answer(file.submit("second", FaultIn(1)), "second") == errno.ENOSPC
    assert file.idle


# --- invalidation -------------------------------------------------------------------------------

#: Everything that takes pages away: personality, request, first and last page + 1 that go.
TAKERS = [
    *((who, Fallocate(PUNCH, 3 * PAGE, 2 * PAGE), 3, 5) for who in EVERY),
    *((who, Destroy(), 0, PAGES) for who in EVERY),
    ("resizable", Resize(5 * PAGE), 5, PAGES),
    ("resizable", Fallocate(0x10, 3 * PAGE, 2 * PAGE), 3, 5),
]


def takers() -> Iterator[object]:
    for who, request, start, end in TAKERS:
        yield pytest.param(who, request, start, end, id=f"{who}-{type(request).__name__}")


@pytest.mark.parametrize(("who", "request_", "start", "end"), [*takers()])
def test_pages_were_freed_before_their_users_let_go(
    who: str, request_: Request, start: int, end: int
) -> None:
    file = made(who)
    (first,) = file.submit("take", request_)
    assert isinstance(first, Perform)
    assert first.step is Step.INVALIDATE
    assert file.allocated == PAGES  # until the proof
    (then,) = [e for e in file.step_done("take") if isinstance(e, Perform)]
    assert then.step is Step.FREE
    assert (max(then.start, 0), min(then.end, PAGES)) == (start, end)


@pytest.mark.parametrize(("who", "request_", "start", "end"), [*takers()])
def test_pages_were_freed_without_proof(who: str, request_: Request, start: int, end: int) -> None:
    file = made(who)
    file.submit("take", request_)
    assert answer(file.abandon("take", errno.EIO, EIO_PATIENCE), "take") == errno.EIO
    assert (file.allocated, file.size, file.dead) == (PAGES, PAGES * PAGE, False)


@pytest.mark.parametrize(("who", "request_", "start", "end"), [*takers()])
def test_invalidate_got_bytes_where_pages_were_declared(
    who: str, request_: Request, start: int, end: int
) -> None:
    file = made(who)
    for step in performed(finish(file, file.submit("take", request_))):
        assert (step.start, min(step.end, PAGES)) == (start, end), step.step


@pytest.mark.parametrize("who", EVERY)
@pytest.mark.parametrize("filled", [False, True])
def test_a_plain_allocation_invalidated(who: str, filled: bool) -> None:
    file = made(who, filled=filled)
    mode = KEEP if who == "guest_memfd" else 0
    effects = finish(file, file.submit("allocate", Fallocate(mode, 0, PAGES * PAGE)))
    assert answer(effects, "allocate") == 0
    assert [step.step for step in performed(effects)] == ([] if filled else [Step.ALLOCATE])


@pytest.mark.parametrize("who", EVERY)
def test_a_punch_of_a_hole_invalidated(who: str) -> None:
    file = made(who, filled=False)
    effects = finish(file, file.submit("punch", Fallocate(PUNCH, 0, PAGES * PAGE)))
    assert answer(effects, "punch") == 0
    assert performed(effects) == []
