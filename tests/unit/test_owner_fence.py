# SPDX-License-Identifier: GPL-2.0-or-later
"""A killed user that does not exit, behind a fence: what that proves, and what it does not."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest

from privfs.notifier.effects import Answer, Drop, Effect, Expire, Forget, Send, Work
from privfs.notifier.owner import Owner
from privfs.notifier.session import State
from privfs.notifier.user import User
from privfs.notifier.wire import Fence, Flag, Op, Record
from privfs.operation import Fallocate, Resize
from privfs.personality import PAGE_SIZE, RESIZABLE

INO, OTHER = 5, 6
KEEP, PUNCH = 1, 3
UFFD = Fence.UFFD


@dataclass
class Bench:
    """Two files of four allocated pages; session ``s`` belongs to process 1000 + s."""

    owner: Owner = field(default_factory=lambda: Owner(RESIZABLE, 100))

    def __post_init__(self) -> None:
        for ino in (INO, OTHER):
            self.owner.create(ino)
            self.owner.request(ino, "size", Resize(4 * PAGE_SIZE))
            self.owner.request(ino, "fill", Fallocate(KEEP, 0, 4 * PAGE_SIZE))
            self.owner.performed(ino, "fill")

    def user(self, sid: int, fence: Fence, files: dict[int, bool] | None = None) -> None:
        """Open a session; ``files`` says of which files, and which may be stored to."""
        self.owner.connect(sid, 1000 + sid)
        self.owner.received(sid, User().hello(f"u{sid}", fence=fence))
        for ino, writable in (files or {INO: True}).items():
            record = Record(Op.REGISTER, Flag.FD, req=2, start=7)
            self.owner.received(sid, record, (ino, writable))

    def punch(self, op: str, ino: int = INO, page: int = 0, *, climb: bool = True) -> list[Effect]:
        """Begin a punch; ``climb`` lets its users be killed."""
        request = Fallocate(PUNCH, page * PAGE_SIZE, PAGE_SIZE)
        effects = self.owner.request(ino, op, request)
        if climb:
            self.rung(op, ino)
            self.rung(op, ino)
        return effects

    def rung(self, op: str, ino: int = INO) -> list[Effect]:
        return self.owner.timer(ino, op)

    def state(self, sid: int) -> State:
        return self.owner.sessions[sid].state


def frees(effects: list[Effect]) -> list[tuple[int, int, int]]:
    works = [e for e in effects if isinstance(e, Work)]
    return [(work.ino, work.perform.start, work.perform.end) for work in works]


def answers(effects: list[Effect]) -> list[tuple[object, int]]:
    return [(e.op, e.errno) for e in effects if isinstance(e, Answer)]


def test_the_fence_of_a_killed_user_is_a_proof() -> None:
    bench = Bench()
    bench.user(1, UFFD)
    bench.punch("p")
    effects = bench.owner.fenced(1)
    assert frees(effects) == [(INO, 0, 1)]
    assert answers(bench.owner.performed(INO, "p")) == [("p", 0)]
    assert bench.state(1) is State.FENCED
    assert bench.rung("p") == []


def test_later_calls_do_not_wait_for_it_any_more() -> None:
    bench = Bench()
    bench.user(1, UFFD)
    bench.punch("p")
    bench.owner.fenced(1)
    bench.owner.performed(INO, "p")
    assert frees(bench.punch("q", page=2, climb=False)) == [(INO, 2, 3)]


def test_all_that_waits_for_it_goes_on_at_once() -> None:
    bench = Bench()
    bench.user(1, UFFD, {INO: True, OTHER: True})
    bench.punch("p")
    bench.punch("q", page=2, climb=False)
    bench.punch("r", OTHER, climb=False)
    assert frees(bench.owner.fenced(1)) == [(INO, 0, 1), (INO, 2, 3), (OTHER, 0, 1)]


@pytest.mark.parametrize("fence", [Fence.NONE, Fence.MPROTECT])
def test_no_other_fence_is(fence: Fence) -> None:
    """What the process has set up itself does not hold for what the kernel does for it."""
    bench = Bench()
    bench.user(1, fence)
    bench.punch("p")
    assert bench.owner.fenced(1) == []
    assert bench.state(1) is State.KILLED
    assert answers(bench.rung("p")) == [("p", errno.EIO)]


@pytest.mark.parametrize("rungs", [0, 1])
def test_nor_is_it_for_one_that_was_not_killed(rungs: int) -> None:
    """It may go on, and install what it was granted before."""
    bench = Bench()
    bench.user(1, UFFD)
    bench.punch("p", climb=False)
    for _ in range(rungs):
        bench.rung("p")
    assert bench.owner.fenced(1) == []
    assert bench.state(1) is State.OPEN


def test_nor_for_a_file_that_it_only_reads() -> None:
    """A userfaultfd takes no mapping that cannot be written; a read allocates as well."""
    bench = Bench()
    bench.user(1, UFFD, {INO: True, OTHER: False})
    bench.punch("p", OTHER)
    bench.punch("q", climb=False)
    effects = bench.owner.fenced(1)
    assert frees(effects) == [(INO, 0, 1)]
    assert answers(bench.rung("p", OTHER)) == [("p", errno.EIO)]
    assert bench.state(1) is State.FENCED


def test_a_user_without_anything_to_fence() -> None:
    bench = Bench()
    bench.user(1, UFFD, {INO: False})
    bench.punch("p")
    assert bench.owner.fenced(1) == []
    assert bench.state(1) is State.KILLED


def test_the_others_are_still_waited_for() -> None:
    bench = Bench()
    bench.user(1, UFFD)
    bench.user(2, Fence.NONE)
    bench.punch("p")
    assert frees(bench.owner.fenced(1)) == []
    assert bench.owner.waiting_for(INO, "p") == {2}
    assert frees(bench.owner.gone(2)) == [(INO, 0, 1)]


def test_a_fence_found_late_helps_the_next_call() -> None:
    bench = Bench()
    bench.user(1, UFFD)
    bench.punch("p")
    assert answers(bench.rung("p")) == [("p", errno.EIO)]
    assert bench.state(1) is State.UNPROVEN
    bench.punch("q", page=1, climb=False)
    assert frees(bench.owner.fenced(1)) == [(INO, 1, 2)]
    assert bench.state(1) is State.FENCED


def test_its_exit_is_still_watched_and_its_calls_refused() -> None:
    bench = Bench()
    bench.user(1, UFFD)
    bench.punch("p")
    bench.owner.fenced(1)
    assert bench.owner.condemning
    refused = bench.owner.request(INO, "own", Fallocate(PUNCH, 0, PAGE_SIZE), caller=1001)
    assert answers(refused) == [("own", errno.EIO)]
    assert bench.owner.gone(1) == [Forget(1)]
    assert not bench.owner.condemning


def test_the_memory_of_a_file_that_it_had_pinned_goes() -> None:
    bench = Bench()
    bench.user(1, UFFD)
    bench.punch("p")
    assert frees(bench.owner.release(INO)) == []
    bench.owner.fenced(1)
    effects = bench.owner.performed(INO, "p")
    assert frees(effects) != [], "the file goes as it has no user left"
    assert Expire(INO) in bench.owner.performed(INO, ("destroy", INO))


def test_nothing_is_proven_twice_or_of_nobody() -> None:
    bench = Bench()
    bench.user(1, UFFD)
    bench.punch("p")
    bench.owner.fenced(1)
    assert bench.owner.fenced(1) == []
    assert bench.owner.fenced(99) == []


def test_a_copy_knows_the_fence() -> None:
    bench = Bench()
    bench.user(1, UFFD)
    bench.punch("p")
    twin = bench.owner.copy()
    assert twin.key() == bench.owner.key()
    assert frees(twin.fenced(1)) == [(INO, 0, 1)]
    assert twin.key() != bench.owner.key()
    assert bench.state(1) is State.KILLED


def test_a_refused_fence_refuses_the_session() -> None:
    bench = Bench()
    bench.owner.connect(1, 1001)
    effects = bench.owner.received(1, User().hello("u", fence=UFFD), errno.EINVAL)
    assert [e.record.status for e in effects if isinstance(e, Send)] == [errno.EINVAL]
    assert [type(e) for e in effects] == [Send, Drop, Forget]
