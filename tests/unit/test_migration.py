# SPDX-License-Identifier: GPL-2.0-or-later
"""Extents that move: at the file, at the owner with its users, in memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
from pyroaring import BitMap

from privfs.backing import Backing, BackingError
from privfs.backing.moving import copy_extent, runs
from privfs.backing.shmem import Shmem
from privfs.budget import Budget
from privfs.extents import SMALL_EXTENT_PAGES
from privfs.memfile import Look, MemFile
from privfs.notifier.effects import Answer, Effect, Migrated, Send, Work
from privfs.notifier.owner import Owner
from privfs.notifier.user import Granted, User, Zap
from privfs.notifier.wire import Flag, Op, Reason, Record
from privfs.operation import (
    Done,
    Fallocate,
    FaultIn,
    Kind,
    Migrate,
    Moved,
    Perform,
    Resize,
    Settled,
    Step,
)
from privfs.operation import Effect as FileEffect
from privfs.personality import PAGE_SIZE, PERSONALITIES, RESIZABLE, Personality
from privfs.seals import ALL_PURPOSES, Purpose

INO = 5
KEEP, PUNCH = 0x01, 0x03
MOVABLE = ALL_PURPOSES & ~Purpose.UNMOVABLE
WHOLE = (0, SMALL_EXTENT_PAGES)


def file_with(*pages: int, budget: Budget, quota: int = 0) -> MemFile:
    file = MemFile(RESIZABLE, budget, quota)
    file.submit("size", Resize(2 * SMALL_EXTENT_PAGES * PAGE_SIZE))
    for page in pages:
        file.submit("fill", FaultIn(page))
        file.step_done("fill")
    return file


def punch(start: int, end: int) -> Fallocate:
    return Fallocate(PUNCH, start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def dones(effects: list[FileEffect]) -> list[tuple[object, int]]:
    return [(e.op, e.errno) for e in effects if isinstance(e, Done)]


# --- the file ------------------------------------------------------------------------------------


def test_an_extent_is_taken_away_copied_found_and_freed_in_this_order() -> None:
    budget = Budget(10)
    file = file_with(0, 7, budget=budget)
    assert file.submit("m", Migrate(0)) == [
        Perform("m", Step.INVALIDATE, Kind.MIGRATE, *WHOLE)
    ]  # fmt: skip
    assert budget.used == 4, "there is room for both"
    assert file.step_done("m") == [Perform("m", Step.COPY, Kind.MIGRATE, *WHOLE)]
    assert file.instances == {0: 1}, "what is not copied is not found"
    assert file.step_done("m") == [
        Moved("m", 0, *WHOLE, old=1, new=2, pages=2),
        Perform("m", Step.FREE, Kind.MIGRATE, *WHOLE, dead=((0, 1),)),
    ]
    assert file.step_done("m") == [Done("m", 0), Settled()]
    assert (file.instances, list(file.pages), budget.used) == ({0: 2}, [0, 7], 2)


@pytest.mark.parametrize("request_", [punch(0, 1), FaultIn(3), Resize(0), Migrate(0)])
def test_what_overlaps_waits_for_the_move_and_runs_after_it(request_: object) -> None:
    file = file_with(0, budget=Budget(10))
    file.submit("m", Migrate(0))
    assert file.submit("next", request_) == []  # type: ignore[arg-type]
    assert file.look(0) is Look.PARK
    file.step_done("m")
    file.step_done("m")
    after = file.step_done("m")
    assert after[0] == Done("m", 0)
    assert [e.op for e in after if isinstance(e, Perform)] == ["next"]


def test_another_extent_is_used_while_one_moves() -> None:
    file = file_with(0, SMALL_EXTENT_PAGES, budget=Budget(10))
    file.submit("m", Migrate(0))
    assert file.look(SMALL_EXTENT_PAGES) is Look.PRESENT
    assert file.submit("a", FaultIn(SMALL_EXTENT_PAGES + 1)) != []


def test_an_empty_extent_ends_and_nothing_is_copied() -> None:
    budget = Budget(10)
    file = file_with(0, budget=budget)
    file.submit("p", punch(0, 1))
    file.step_done("p")
    file.step_done("p")
    assert file.instances == {0: 1}
    file.submit("m", Migrate(0))
    (free,) = file.step_done("m")
    assert free == Perform("m", Step.FREE, Kind.MIGRATE, *WHOLE, dead=((0, 1),))
    assert file.step_done("m") == [Done("m", 0), Settled()]
    assert (file.instances, budget.used) == ({}, 0)
    file.submit("fill", FaultIn(0))
    file.step_done("fill")
    assert file.instances == {0: 2}, "an instance is never used again"


def test_an_extent_that_is_not_there_is_nothing_to_do() -> None:
    assert dones(file_with(0, budget=Budget(10)).submit("m", Migrate(1))) == [("m", 0)]


@pytest.mark.parametrize("how", ["proof", "copy", "cancel"])
def test_whatever_fails_before_the_swap_leaves_the_old_one(how: str) -> None:
    budget = Budget(10)
    file = file_with(0, 1, budget=budget)
    before = file.key()
    file.submit("m", Migrate(0))
    if how == "proof":
        assert dones(file.abandon("m", errno.EIO, "")) == [("m", errno.EIO)]
    elif how == "cancel":
        assert dones(file.cancel("m", errno.EINTR)) == [("m", errno.EINTR)]
        assert file.look(0) is Look.PARK, "acknowledgements are still collected"
        assert file.step_done("m") == [Settled()]
    else:
        file.step_done("m")
        assert file.cancel("m", errno.EINTR) == [], "the copy ends by itself"
        assert dones(file.step_done("m", errno.ENOSPC)) == [("m", errno.ENOSPC)]
    assert (file.key(), budget.used, file.look(0)) == (before, 2, Look.PRESENT)


def test_room_for_a_second_copy_is_asked_for_before_anybody_is_disturbed() -> None:
    file = file_with(0, 1, 2, budget=Budget(5))
    (done,) = file.submit("m", Migrate(0))
    assert isinstance(done, Done)
    assert done.errno == errno.ENOSPC
    assert "3 pages wanted, 2 of 5 left" in done.why
    assert "holds it twice" in done.why
    assert file.idle


def test_no_quota_stands_in_the_way_of_a_move_nor_grows_by_it() -> None:
    file = file_with(0, 1, budget=Budget(10), quota=2)
    assert file.submit("m", Migrate(0)) != []
    second = SMALL_EXTENT_PAGES
    assert dones(file.submit("a", FaultIn(second))) == [("a", errno.ENOSPC)]
    file = file_with(0, 1, budget=Budget(10), quota=3)
    file.submit("m", Migrate(0))
    assert dones(file.submit("a", FaultIn(second))) == []


def test_the_host_keeps_what_it_may_have_mapped() -> None:
    file = MemFile(PERSONALITIES["guest_memfd"], Budget(10))
    file.submit("size", Resize(4 * PAGE_SIZE))
    file.map_by_host(shared=True)
    (done,) = file.submit("m", Migrate(0))
    assert isinstance(done, Done)
    assert (done.errno, "mapped" in done.why) == (errno.EOPNOTSUPP, True)


# --- the owner -----------------------------------------------------------------------------------


class Bench:
    """An owner of one file with page 0, and users of it without a wire."""

    def __init__(self, personality: Personality = RESIZABLE) -> None:
        self.owner = Owner(personality, 100)
        self.owner.create(INO)
        self.owner.request(INO, "size", Resize(16 * PAGE_SIZE))
        self.perform(self.owner.request(INO, "fill", Fallocate(KEEP, 0, PAGE_SIZE)))
        self.users: dict[int, User] = {}
        self.said: dict[int, list[object]] = {}

    def perform(self, effects: list[Effect], failed: int = 0) -> list[Effect]:
        out = list(effects)
        todo = [e for e in effects if isinstance(e, Work)]
        while todo:
            more = self.owner.performed(INO, todo.pop(0).perform.op, failed)
            self.hear(more)
            out += more
            todo += [e for e in more if isinstance(e, Work)]
        return out

    def hear(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.said[effect.sid].append(self.users[effect.sid].received(effect.record))

    def say(self, sid: int, record: Record, found: tuple[int, bool] | None = None) -> list[Effect]:
        effects = self.owner.received(sid, record, found)
        self.hear(effects)
        return effects

    def join(self, sid: int, purpose: int = MOVABLE) -> User:
        self.owner.connect(sid, 1000 + sid)
        user = self.users[sid] = User()
        self.said[sid] = []
        self.say(sid, user.hello(f"u{sid}"))
        self.say(sid, user.register(purpose), (INO, True))
        return user

    def get(self, sid: int, *, again: bool = False) -> Granted:
        self.say(sid, self.users[sid].get(INO, 0, 0, 1, write=True, again=again))
        granted = self.said[sid][-1]
        assert isinstance(granted, Granted)
        return granted

    def zap(self, sid: int) -> Zap:
        zap = self.said[sid][-1]
        assert isinstance(zap, Zap)
        return zap

    def move(self) -> list[Effect]:
        effects = self.owner.request(INO, "m", Migrate(0))
        self.hear(effects)
        return effects


def steps(effects: list[Effect]) -> list[Step]:
    return [e.perform.step for e in effects if isinstance(e, Work)]


def answers(effects: list[Effect]) -> list[tuple[object, int]]:
    return [(e.op, e.errno) for e in effects if isinstance(e, Answer)]


@pytest.mark.parametrize("personality", PERSONALITIES.values(), ids=lambda p: p.name)
def test_every_user_lets_go_of_the_extent_before_it_is_copied(personality: Personality) -> None:
    bench = Bench(personality)
    bench.join(1)
    bench.join(2)
    first = bench.get(1)
    assert steps(bench.move()) == []
    zaps = [bench.zap(1), bench.zap(2)]
    assert [(z.reason, z.start, z.end) for z in zaps] == [(Reason.MOVE, *WHOLE)] * 2
    assert [z.dead for z in zaps] == [(first.instance,), ()], "only one of them had it"
    assert steps(bench.say(1, bench.users[1].ack(zaps[0].seq))) == []
    proven = bench.say(2, bench.users[2].ack(zaps[1].seq))
    assert steps(proven) == [Step.COPY]
    ended = bench.perform(proven)
    assert [type(e) for e in ended if not isinstance(e, Send)] == [Work, Migrated, Work, Answer]
    assert answers(ended) == [("m", 0)]
    second = bench.get(1)
    assert second.instance != first.instance
    assert bench.users[1].extent(INO, second.instance) == WHOLE, "its memfd came along"
    assert bench.users[1].installable(INO, 0, 0, 1, first.seq) == (0, 0)
    assert bench.users[1].installable(INO, 0, 0, 1, second.seq) == (0, 1)


def test_a_fault_during_the_move_is_answered_with_the_new_extent() -> None:
    bench = Bench()
    user = bench.join(1)
    old = bench.get(1).instance
    bench.move()
    zap = bench.zap(1)
    assert bench.say(1, user.get(INO, 0, 0, 1, write=True)) == []
    bench.perform(bench.say(1, user.ack(zap.seq)))
    granted = bench.said[1][-1]
    assert isinstance(granted, Granted)
    assert granted.instance > old


def test_after_a_move_that_failed_the_old_extent_is_asked_for_again() -> None:
    bench = Bench()
    user = bench.join(1)
    old = bench.get(1).instance
    bench.move()
    ended = bench.perform(bench.say(1, user.ack(bench.zap(1).seq)), errno.ENOSPC)
    assert answers(ended) == [("m", errno.ENOSPC)]
    assert bench.get(1).instance == old
    assert user.extent(INO, old) is None, "it let go of it"
    assert bench.get(1, again=True).instance == old
    assert user.extent(INO, old) == WHOLE


def test_the_records_are_those_that_any_user_knows() -> None:
    bench = Bench()
    bench.join(1)
    (record,) = [e.record for e in bench.move() if isinstance(e, Send)]
    assert (record.op, record.flags, record.status) == (Op.INVALIDATE, Flag.EXTENT, Reason.MOVE)


def test_what_was_promised_to_stay_stays_while_there_are_users() -> None:
    bench = Bench()
    user = bench.join(1, ALL_PURPOSES)
    assert answers(bench.move()) == [("m", errno.EOPNOTSUPP)]
    bench.say(1, user.unregister(INO))
    assert answers(bench.perform(bench.move())) == [("m", 0)]


def test_a_promise_that_is_made_while_a_move_waits_is_kept() -> None:
    bench = Bench()
    bench.join(1)
    bench.get(1)
    bench.owner.request(INO, "p", punch(0, 1))
    assert bench.move() == []
    bench.owner.gone(1)
    bench.owner.files[INO].purpose = ALL_PURPOSES
    bench.join(2, ALL_PURPOSES)
    ended = bench.perform([Work(INO, Perform("p", Step.FREE, Kind.PUNCH, 0, 1))])
    assert answers(ended) == [("p", 0), ("m", errno.EOPNOTSUPP)]


# --- memory --------------------------------------------------------------------------------------


@pytest.fixture
def backing() -> Iterator[Backing]:
    made = Backing(extent_limit=3)
    yield made
    made.close()
    assert made.alive == 0


def always(pages: int) -> bool:
    return True


def fill(backing: Backing, *pages: int) -> BitMap:
    for page in pages:
        backing.allocate(INO, page, page + 1)
        extent = backing.extent(INO, page // SMALL_EXTENT_PAGES)
        os.pwrite(extent.fd, bytes([page % 255 + 1]) * PAGE_SIZE, (page - extent.start) * PAGE_SIZE)
    return BitMap(pages)


def at(backing: Backing, page: int) -> bytes:
    return os.pread(backing.fd(INO, 0), PAGE_SIZE, page * PAGE_SIZE)


def test_bytes_are_the_same_and_what_is_sparse_stays_so(backing: Backing) -> None:
    pages = fill(backing, 0, 1, 5, 16_000)
    backing.allocate(INO, 100, 200)  # never touched
    pages.add_range(100, 200)
    old = os.dup(backing.fd(INO, 0))
    copy_extent(backing, INO, 0, pages, always)
    assert backing.fd(INO, 0) != -1
    assert os.fstat(backing.fd(INO, 0)).st_ino == os.fstat(old).st_ino, "not found before the swap"
    backing.swap(INO, 0)
    assert os.fstat(backing.fd(INO, 0)).st_ino != os.fstat(old).st_ino
    assert [at(backing, p)[:1] for p in (0, 1, 5, 16_000)] == [b"\1", b"\2", b"\6", b"\xbf"]
    assert backing.audit(INO, len(pages), lambda s, e: pages.range_cardinality(s, e) == e - s) == []
    assert list(backing.resident(INO)) == [(0, 2), (5, 6), (16_000, 16_001)]
    assert os.fstat(old).st_size == 0, "whoever has the old one has nothing"
    os.close(old)


def test_what_was_touched_without_a_grant_stays_behind(backing: Backing) -> None:
    pages = fill(backing, 0, 1)
    os.pwrite(backing.fd(INO, 0), b"stray", 9 * PAGE_SIZE)
    assert backing.blocks(INO) * 512 == 3 * PAGE_SIZE
    copy_extent(backing, INO, 0, pages, always)
    backing.swap(INO, 0)
    assert backing.blocks(INO) * 512 == 2 * PAGE_SIZE
    assert at(backing, 9) == bytes(PAGE_SIZE)


def test_an_interrupt_leaves_the_old_extent_alone(backing: Backing) -> None:
    pages = fill(backing, 0, 5)
    told: list[int] = []
    with pytest.raises(BackingError) as caught:
        copy_extent(backing, INO, 0, pages, lambda count: bool(told.append(count)))
    assert (caught.value.errno, told, backing.alive) == (errno.EINTR, [1], 1)
    assert at(backing, 5)[:1] == b"\6"


def test_without_a_descriptor_nothing_moves_and_the_remedy_is_named(backing: Backing) -> None:
    pages = fill(backing, 0, SMALL_EXTENT_PAGES, 2 * SMALL_EXTENT_PAGES)
    with pytest.raises(BackingError, match="ulimit -n") as caught:
        copy_extent(backing, INO, 0, pages, always)
    assert (caught.value.errno, backing.alive) == (errno.ENOSPC, 3)


def test_an_extent_that_a_user_has_cut_short_is_not_taken_for_zeros(backing: Backing) -> None:
    """A user's descriptor lets it truncate; our own must not hand out less than there was."""
    pages = fill(backing, 0, 5)

    class Late(Shmem):
        def allocate(self, fd: int, offset: int, length: int) -> None:
            os.ftruncate(backing.fd(INO, 0), PAGE_SIZE)
            super().allocate(fd, offset, length)

    backing.store = Late()
    with pytest.raises(BackingError, match="cut the extent short") as caught:
        copy_extent(backing, INO, 0, pages, always)
    assert (caught.value.errno, backing.alive) == (errno.EIO, 1)


@pytest.mark.parametrize(
    "pages", [[], [0], [5, 6, 7, 9], [(1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20]]
)
def test_runs(pages: list[int]) -> None:
    found = list(runs(BitMap(pages), 0, 4 << 20))
    assert [page for low, high in found for page in range(low, high)] == pages
    assert all(low < high for low, high in found)
