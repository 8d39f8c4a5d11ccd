# SPDX-License-Identifier: GPL-2.0-or-later
"""A file that is one session's alone, from its registration to its end."""

from __future__ import annotations

import errno

import pytest

from privfs import views
from privfs.notifier.effects import Effect, Expire, Send, Work
from privfs.notifier.owner import Owner
from privfs.notifier.user import User
from privfs.notifier.wire import Fence, Flag, Op, Record
from privfs.operation import Fallocate, Resize
from privfs.personality import PAGE_SIZE, RESIZABLE

INO, OTHER = 5, 6
HELD, FREE = errno.EBUSY, 0


class Bench:
    """An owner of two files; session ``n`` is process 100 + n unless it says otherwise."""

    def __init__(self) -> None:
        self.owner = Owner(RESIZABLE, 100)
        for ino in (INO, OTHER):
            self.owner.create(ino)
            self.owner.request(ino, "size", Resize(8 * PAGE_SIZE))

    def hello(
        self, sid: int, replaces: int = 0, pid: int = 0, fence: Fence = Fence.NONE
    ) -> list[Effect]:
        self.owner.connect(sid, pid or 100 + sid)
        return self.owner.received(sid, User().hello("vm", replaces, fence))

    def register(self, sid: int, *, exclusive: bool = True, ino: int = INO) -> int:
        if sid not in self.owner.sessions:
            self.hello(sid)
        record = User().register(exclusive=exclusive)
        return self._status(self.owner.received(sid, record, (ino, True)))

    def unregister(self, sid: int) -> int:
        return self._status(self.owner.received(sid, User().unregister(INO)))

    def _status(self, effects: list[Effect]) -> int:
        (send,) = [effect for effect in effects if isinstance(effect, Send)]
        return send.record.status

    @property
    def holder(self) -> int | None:
        return self.owner.exclusive.holder(INO)


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(True, True, HELD), (True, False, HELD), (False, True, HELD), (False, False, FREE)],
)
def test_who_may_come_second(first: bool, second: bool, status: int) -> None:
    bench = Bench()
    assert bench.register(1, exclusive=first) == FREE
    before = bench.owner.key()
    bench.hello(2)
    after_hello = bench.owner.key()
    assert bench.register(2, exclusive=second) == status
    assert before != after_hello
    assert (bench.owner.key() == after_hello) == (status == HELD), "a refusal leaves no trace"
    assert bench.register(2, exclusive=second, ino=OTHER) == FREE


def test_a_refusal_binds_the_file_to_no_purpose() -> None:
    bench = Bench()
    bench.register(1)
    bench.unregister(1)
    bench.owner.files[INO].purpose = None
    bench.register(2)
    bench.owner.files[INO].purpose = None
    assert bench.register(3) == HELD
    assert bench.owner.files[INO].purpose is None


def test_the_session_itself_may_come_again() -> None:
    bench = Bench()
    bench.register(1)
    assert bench.register(1) == errno.EEXIST
    assert bench.register(1, exclusive=False) == errno.EEXIST
    assert bench.holder == 1
    bench.unregister(1)
    assert bench.register(1) == FREE
    bench.unregister(1)
    assert bench.register(1, exclusive=False) == FREE
    assert bench.register(2, exclusive=False) == FREE


def bye(bench: Bench) -> None:
    bench.unregister(1)
    bench.owner.received(1, User().bye())


@pytest.mark.parametrize(
    "end",
    [lambda bench: bench.unregister(1), bye, lambda bench: bench.owner.gone(1)],
    ids=["UNREGISTER", "BYE", "death"],
)
def test_its_ends(end: object) -> None:
    assert callable(end)
    bench = Bench()
    bench.register(1)
    end(bench)
    assert bench.holder is None
    assert bench.register(2) == FREE


def test_neither_a_broken_socket_nor_a_kill_is_its_end_but_the_proof_of_death() -> None:
    bench = Bench()
    bench.register(1)
    bench.owner.request(INO, "fill", Fallocate(1, 0, PAGE_SIZE))
    bench.owner.performed(INO, "fill")
    bench.owner.request(INO, "punch", Fallocate(3, 0, PAGE_SIZE))
    bench.owner.broken(1, "test")
    assert bench.register(2) == HELD
    for _ in range(2):
        bench.owner.timer(INO, "punch")
    assert bench.owner.sessions[1].condemned
    assert bench.register(2) == HELD
    assert any(isinstance(effect, Work) for effect in bench.owner.gone(1))
    assert bench.register(2) == FREE


def test_a_fence_that_holds_is_its_end() -> None:
    bench = Bench()
    bench.hello(1, fence=Fence.UFFD)
    bench.register(1)
    bench.owner.request(INO, "fill", Fallocate(1, 0, PAGE_SIZE))
    bench.owner.performed(INO, "fill")
    bench.owner.request(INO, "punch", Fallocate(3, 0, PAGE_SIZE))
    for _ in range(2):
        bench.owner.timer(INO, "punch")
    assert bench.register(2) == HELD
    bench.owner.fenced(1)
    assert bench.register(2) == FREE


def replaced() -> Bench:
    """Session 2 has replaced session 1, which had the file for itself."""
    bench = Bench()
    bench.register(1)
    bench.owner.broken(1, "test")
    bench.hello(2, replaces=1, pid=101)
    assert list(bench.owner.sessions) == [2]
    return bench


class TestReplacing:
    """The session that takes the place of one that had a file for itself."""

    def test_it_has_the_file_before_it_registers(self) -> None:
        bench = replaced()
        assert bench.register(3) == bench.register(3, exclusive=False) == HELD
        assert bench.register(2) == FREE
        assert bench.register(3) == HELD

    def test_it_may_share_it(self) -> None:
        bench = replaced()
        assert bench.register(2, exclusive=False) == FREE
        assert bench.register(3, exclusive=False) == FREE

    def test_it_may_leave_it_without_a_registration(self) -> None:
        bench = replaced()
        assert bench.unregister(2) == 0
        assert bench.unregister(2) == errno.ENOENT
        assert bench.register(3) == FREE

    def test_its_end_is_that_of_the_right(self) -> None:
        for end in (
            lambda bench: bench.owner.received(2, User().bye()),
            lambda bench: bench.owner.gone(2),
        ):
            bench = replaced()
            end(bench)
            assert bench.register(3) == FREE

    def test_it_may_break_and_be_replaced_as_well(self) -> None:
        bench = replaced()
        bench.owner.broken(2, "test")
        assert bench.register(3) == HELD
        bench.hello(4, replaces=2, pid=101)
        assert bench.holder == 4
        assert bench.register(4) == FREE

    def test_another_process_gets_nothing(self) -> None:
        bench = Bench()
        bench.register(1)
        bench.owner.broken(1, "test")
        bench.hello(2, replaces=1)
        assert bench.holder == 1


def test_a_file_that_is_gone_is_nobodys() -> None:
    bench = replaced()
    effects = bench.owner.release(INO)
    for work in [effect for effect in effects if isinstance(effect, Work)]:
        effects += bench.owner.performed(INO, work.perform.op)
    assert Expire(INO) in effects
    assert bench.holder is None


def test_people_see_who_has_it() -> None:
    bench = Bench()
    bench.register(1)
    bench.register(1, exclusive=False, ino=OTHER)
    assert views.file_stat(bench.owner, INO)["exclusive"] == "vm(101)"
    assert views.file_stat(bench.owner, OTHER)["exclusive"] is None
    (row,) = views.sessions(bench.owner)
    assert (row["files"], row["exclusive"]) == ([INO, OTHER], [INO])
    assert views.sessions_text(bench.owner).splitlines()[1].endswith(" 5:exclusive,6")


def test_the_flag_is_one_of_a_registration() -> None:
    assert User().register(exclusive=True).flags == Flag.FD | Flag.EXCLUSIVE
    assert User().register() == Record(Op.REGISTER, Flag.FD, req=1, start=7)
