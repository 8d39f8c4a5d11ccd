# SPDX-License-Identifier: GPL-2.0-or-later
"""Transcripts of the owner: records, system calls and deaths in, effects out."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest

from privfs.notifier.effects import (
    Answer,
    Arm,
    Drop,
    Effect,
    Expire,
    Forget,
    Kill,
    Note,
    Rung,
    Send,
    Work,
)
from privfs.notifier.owner import Owner
from privfs.notifier.session import State
from privfs.notifier.wire import MAX_GRANT, VERSION, Flag, Op, Reason, Record, label_words
from privfs.operation import Fallocate, Request, Resize, Step
from privfs.personality import GUEST_MEMFD, PAGE_SIZE, RESIZABLE, Personality

INO = 5
KEEP, PUNCH = 0x01, 0x03


def allocate(start: int, end: int) -> Fallocate:
    return Fallocate(KEEP, start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def punch(start: int, end: int) -> Fallocate:
    return Fallocate(PUNCH, start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def records(effects: list[Effect], sid: int | None = None) -> list[Record]:
    """Return what was sent, to one session or to all."""
    return [e.record for e in effects if isinstance(e, Send) and sid in (None, e.sid)]


def ops(effects: list[Effect], sid: int | None = None) -> list[Op]:
    return [Op(record.op) for record in records(effects, sid)]


def work(effects: list[Effect]) -> list[Step]:
    return [e.perform.step for e in effects if isinstance(e, Work)]


def answers(effects: list[Effect]) -> list[tuple[object, int]]:
    return [(e.op, e.errno) for e in effects if isinstance(e, Answer)]


def dropped(effects: list[Effect]) -> list[int]:
    return [e.sid for e in effects if isinstance(e, Drop)]


@dataclass
class Bench:
    """An owner of one file of 64 pages."""

    personality: Personality = RESIZABLE
    budget: int = 100
    kills: bool = True
    patience: int = 2
    max_parked: int = 8
    owner: Owner = field(init=False)
    _req: int = 0

    def __post_init__(self) -> None:
        self.owner = Owner(
            self.personality,
            self.budget,
            kills=self.kills,
            patience=self.patience,
            max_parked=self.max_parked,
        )
        self.owner.create(INO)
        assert answers(self.owner.request(INO, "size", Resize(64 * PAGE_SIZE))) == [("size", 0)]

    def perform(self, effects: list[Effect], failed: int = 0) -> list[Effect]:
        """Perform every step in ``effects`` and those that follow; return all effects."""
        out = list(effects)
        todo = [e for e in effects if isinstance(e, Work)]
        while todo:
            one = todo.pop(0)
            more = self.owner.performed(one.ino, one.perform.op, failed)
            out += more
            todo += [e for e in more if isinstance(e, Work)]
        return out

    def call(self, op: object, request: Request, caller: int = 0) -> list[Effect]:
        return self.owner.request(INO, op, request, caller)

    def allocate(self, start: int, end: int) -> None:
        assert answers(self.perform(self.call("setup", allocate(start, end)))) == [("setup", 0)]

    def send(
        self, sid: int, record: Record, file: tuple[int, bool] | int | None = None
    ) -> list[Effect]:
        return self.owner.received(sid, record, file)

    def req(self) -> int:
        self._req += 1
        return self._req

    def user(self, sid: int, pid: int = 0, *, writable: bool = True, ino: int = INO) -> int:
        """Open a session and register it; return its sid."""
        self.owner.connect(sid, pid or 1000 + sid)
        assert ops(self.send(sid, Record(Op.HELLO, req=1, start=VERSION))) == [Op.WELCOME]
        self.register(sid, writable=writable, ino=ino)
        return sid

    def register(self, sid: int, *, writable: bool = True, ino: int = INO) -> Record:
        effects = self.send(sid, Record(Op.REGISTER, Flag.FD, req=2), (ino, writable))
        (registered,) = records(effects)
        assert (registered.op, registered.status) == (Op.REGISTERED, 0)
        return registered

    def get(self, sid: int, page: int, start: int = -1, end: int = -1, flags: int = 0,
            req: int = 0) -> list[Effect]:  # fmt: skip
        start, end = (page, page + 1) if start < 0 else (start, end)
        return self.send(sid, Record(Op.GET, flags, 0, req or self.req(), INO, start, end, page))

    def ack(self, sid: int, seq: int) -> list[Effect]:
        return self.send(sid, Record(Op.ACK, seq=seq))

    def unregister(self, sid: int) -> list[Effect]:
        return self.send(sid, Record(Op.UNREGISTER, req=3, obj=INO))

    def invalidated(self, effects: list[Effect], sid: int) -> int:
        """Return the seq of the one INVALIDATE to ``sid``."""
        (record,) = [r for r in records(effects, sid) if r.op == Op.INVALIDATE]
        return record.seq

    def pages(self) -> list[int]:
        return list(self.owner.files[INO].pages)

    def state(self, sid: int) -> State:
        return self.owner.sessions[sid].state


# --- sessions -----------------------------------------------------------------------------------


def test_hello_is_welcomed_with_the_session_number() -> None:
    bench = Bench()
    bench.owner.connect(3, 33)
    low, high = label_words("guest")
    effects = bench.send(3, Record(Op.HELLO, req=9, start=VERSION, obj=low, seq=high))
    assert effects == [Send(3, Record(Op.WELCOME, req=9, start=VERSION, seq=3))]
    assert bench.owner.sessions[3].name == "guest(33)"


@pytest.mark.parametrize(
    ("version", "found", "code"),
    [(VERSION + 1, None, errno.EPROTONOSUPPORT), (VERSION, errno.EPERM, errno.EPERM)],
)
def test_a_refused_hello_ends_the_session(version: int, found: int | None, code: int) -> None:
    bench = Bench()
    bench.owner.connect(3, 33)
    effects = bench.send(3, Record(Op.HELLO, req=9, start=version), found)
    assert [r.status for r in records(effects)] == [code]
    assert [type(e) for e in effects] == [Send, Drop, Forget]
    assert 3 not in bench.owner.sessions


def test_anything_before_hello_ends_the_session() -> None:
    bench = Bench()
    bench.owner.connect(3, 33)
    effects = bench.get(3, 0)
    assert [type(e) for e in effects] == [Drop, Forget]


def test_a_second_hello_ends_the_session() -> None:
    bench = Bench()
    bench.user(1)
    assert dropped(bench.send(1, Record(Op.HELLO, req=1, start=VERSION))) == [1]
    assert bench.state(1) is State.ZOMBIE


def test_records_after_the_end_of_their_session_are_ignored() -> None:
    bench = Bench()
    bench.owner.connect(1, 11)
    bench.send(1, Record(Op.HELLO, req=1, start=VERSION))
    assert bench.send(1, Record(Op.BYE)) == [Forget(1)]
    assert bench.get(1, 0) == []  # the next record of the same frame
    bench.user(2)
    bench.owner.broken(2, "end of file")
    assert bench.get(2, 0) == []
    assert bench.owner.broken(1, "end of file") == []
    assert bench.owner.gone(1) == []


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (errno.EACCES, errno.EACCES),
        (None, errno.EBADF),
        ((INO + 1, True), errno.ENOENT),
        ((INO, True), errno.EEXIST),
    ],
)
def test_register_is_refused(found: tuple[int, bool] | int | None, code: int) -> None:
    bench = Bench()
    bench.user(1)
    before = bench.owner.key()
    (answer,) = records(bench.send(1, Record(Op.REGISTER, Flag.FD, req=7), found))
    assert (answer.op, answer.status, answer.req) == (Op.REGISTERED, code, 7)
    assert bench.owner.key() == before


def test_registered_tells_size_and_rights() -> None:
    bench = Bench()
    bench.owner.connect(1, 11)
    bench.send(1, Record(Op.HELLO, req=1, start=VERSION))
    registered = bench.register(1, writable=False)
    assert (registered.obj, registered.start, registered.end) == (INO, 0, 64)


def test_bye_while_registered_is_a_failure() -> None:
    bench = Bench()
    bench.user(1)
    assert dropped(bench.send(1, Record(Op.BYE))) == [1]
    assert bench.state(1) is State.ZOMBIE  # and still in every wait set
    bench.user(2)
    assert ops(bench.unregister(2)) == [Op.REPLY]
    assert bench.send(2, Record(Op.BYE)) == [Forget(2)]


# --- faults -------------------------------------------------------------------------------------


def test_a_fault_on_a_hole_allocates_its_page_and_brings_the_extent_once() -> None:
    bench = Bench()
    bench.user(1)
    effects = bench.get(1, 7, 0, 16, req=40)
    (todo,) = effects
    assert isinstance(todo, Work)
    assert todo.perform[1:5] == (Step.ALLOCATE, todo.perform.kind, 7, 8)
    extent, page = bench.owner.performed(INO, todo.perform.op)
    assert isinstance(extent, Send)
    assert isinstance(page, Send)
    assert extent.extent == (INO, 0, True)
    assert (extent.record.op, extent.record.seq, extent.record.start) == (Op.EXTENT, 1, 0)
    assert page.record[:7] == (Op.PAGE, 0, 0, 40, 1, 7, 8)
    assert ops(bench.get(1, 7)) == [Op.PAGE]  # present, and the extent is known
    assert ops(bench.perform(bench.get(1, 8))) == [Op.PAGE]
    assert ops(bench.get(1, 7, flags=Flag.EXTENT)) == [Op.EXTENT, Op.PAGE]
    bench.user(2)
    assert ops(bench.get(2, 7)) == [Op.EXTENT, Op.PAGE]


def test_a_grant_covers_what_is_allocated_around_the_fault() -> None:
    bench = Bench()
    bench.allocate(4, 12)
    bench.user(1)
    assert records(bench.get(1, 7, 0, 10))[-1][5:7] == (4, 10)


def test_a_read_only_user_gets_a_read_only_extent_and_no_stores() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1, writable=False)
    (refused,) = records(bench.get(1, 0, flags=Flag.WRITE))
    assert refused.status == errno.EACCES
    extent, _ = bench.get(1, 0)
    assert isinstance(extent, Send)
    assert extent.extent == (INO, 0, False)
    for op in (Op.PUNCH, Op.ALLOCATE):
        (reply,) = records(bench.send(1, Record(op, req=3, obj=INO, start=0, end=1)))
        assert (reply.op, reply.status) == (Op.REPLY, errno.EACCES)


def test_faults_that_cannot_be_served() -> None:
    bench = Bench(budget=1)
    bench.user(1)
    assert [r.status for r in records(bench.get(1, 64))] == [errno.EFBIG]
    bench.allocate(0, 1)
    assert [r.status for r in records(bench.get(1, 1))] == [errno.ENOMEM]
    bench.unregister(1)
    assert [r.status for r in records(bench.get(1, 0))] == [errno.ENOENT]


def test_a_failed_allocation_is_told_to_its_fault() -> None:
    bench = Bench()
    bench.user(1)
    effects = bench.perform(bench.get(1, 1), failed=errno.ENOSPC)
    assert [r.status for r in records(effects)] == [errno.ENOMEM]
    assert bench.owner.budget.used == 0


@pytest.mark.parametrize(("page", "start", "end"), [(5, 6, 8), (8, 6, 8), (0, 0, MAX_GRANT + 1)])
def test_a_senseless_window_ends_the_session(page: int, start: int, end: int) -> None:
    bench = Bench()
    bench.user(1)
    assert dropped(bench.get(1, page, start, end)) == [1]


def test_a_request_number_in_use_ends_the_session() -> None:
    bench = Bench()
    bench.user(1)
    bench.get(1, 0, req=9)
    assert dropped(bench.get(1, 1, req=9)) == [1]
    bench.user(2)
    bench.allocate(3, 4)
    bench.send(2, Record(Op.PUNCH, req=9, obj=INO, start=3, end=4))
    assert dropped(bench.send(2, Record(Op.PUNCH, req=9, obj=INO, start=3, end=4))) == [2]


def test_a_fault_whose_user_died_meanwhile_is_dropped() -> None:
    bench = Bench()
    bench.user(1)
    effects = bench.get(1, 0)
    bench.owner.gone(1)
    assert ops(bench.perform(effects)) == []
    assert bench.pages() == [0]


# --- invalidations ------------------------------------------------------------------------------


def test_invalidate_prove_free_answer() -> None:
    bench = Bench()
    bench.allocate(0, 8)
    bench.user(1)
    bench.user(2)
    effects = bench.call("p", punch(2, 4))
    assert ops(effects, 1) == ops(effects, 2) == [Op.INVALIDATE]
    assert effects[-1] == Arm(INO, "p", Rung.LOG)
    assert {r[2:3] + r[4:7] for r in records(effects)} == {(Reason.PUNCH, INO, 2, 4)}
    assert bench.owner.waiting_for(INO, "p") == {1, 2}
    assert bench.ack(1, bench.invalidated(effects, 1)) == []
    freeing = bench.ack(2, bench.invalidated(effects, 2))
    assert (work(freeing), answers(freeing)) == ([Step.FREE], [])
    assert bench.pages() == list(range(8))
    assert answers(bench.owner.performed(INO, "p")) == [("p", 0)]
    assert bench.pages() == [0, 1, 4, 5, 6, 7]


def test_without_users_nothing_is_waited_for() -> None:
    bench = Bench()
    bench.allocate(0, 2)
    effects = bench.call("p", punch(0, 2))
    assert (work(effects), ops(effects)) == ([Step.FREE], [])


def test_only_the_exact_seq_is_an_acknowledgement() -> None:
    bench = Bench()
    bench.allocate(0, 8)
    bench.user(1)
    first = bench.invalidated(bench.call("p", punch(0, 1)), 1)
    second = bench.invalidated(bench.call("q", punch(4, 5)), 1)
    assert second == first + 1
    assert work(bench.ack(1, second)) == [Step.FREE]
    assert bench.owner.waiting_for(INO, "p") == {1}
    assert bench.owner.waiting_for(INO, "q") == frozenset()
    assert work(bench.ack(1, first)) == [Step.FREE]
    assert dropped(bench.ack(1, first)) == [1]


@pytest.mark.parametrize("seq", [0, 3, 99])
def test_an_acknowledgement_of_what_was_not_sent_ends_the_session(seq: int) -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    assert bench.invalidated(bench.call("p", punch(0, 1)), 1) == 2
    assert dropped(bench.ack(1, seq)) == [1]
    assert bench.owner.waiting_for(INO, "p") == {1}


def test_a_fault_that_meets_an_invalidation_is_parked_and_then_served() -> None:
    bench = Bench()
    bench.allocate(0, 4)
    bench.user(1)
    seq = bench.invalidated(bench.call("p", punch(0, 2)), 1)
    assert bench.get(1, 1, 0, 4) == []
    assert records(bench.get(1, 2, 0, 4))[-1][5:] == (2, 4, seq)  # beside the range: at once
    bench.ack(1, seq)
    effects = bench.owner.performed(INO, "p")
    assert answers(effects) == [("p", 0)]
    assert work(effects) == [Step.ALLOCATE]  # the parked fault finds a hole
    (page,) = records(bench.perform(effects))
    assert (page.op, page.start, page.end, page.seq) == (Op.PAGE, 1, 4, seq)


def test_a_fault_waits_for_every_invalidation_that_it_meets() -> None:
    bench = Bench()
    bench.allocate(0, 4)
    bench.user(1)
    first = bench.invalidated(bench.call("p", punch(0, 2)), 1)
    assert bench.call("q", punch(1, 3)) == []
    assert bench.get(1, 1) == []
    bench.ack(1, first)
    effects = bench.owner.performed(INO, "p")
    second = bench.invalidated(effects, 1)
    assert ops(effects) == [Op.INVALIDATE]
    effects = bench.perform(bench.ack(1, second))
    assert answers(effects) == [("q", 0)]
    assert ops(effects) == [Op.EXTENT, Op.PAGE]


def test_a_late_user_is_not_waited_for_and_its_faults_are_parked() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    seq = bench.invalidated(bench.call("p", punch(0, 1)), 1)
    bench.user(2)
    assert bench.owner.waiting_for(INO, "p") == {1}
    assert bench.get(2, 0) == []
    effects = bench.perform(bench.ack(1, seq))
    assert ops(effects, 2) == [Op.EXTENT, Op.PAGE]


def test_a_user_that_shrinks_the_file_hears_of_its_extents() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    bench.get(1, 0)
    effects = bench.call("r", Resize(0))
    assert records(effects)[0].status == Reason.TRUNCATE
    (todo,) = [e for e in bench.ack(1, bench.invalidated(effects, 1)) if isinstance(e, Work)]
    assert todo.perform.dead == ((0, 1),)
    bench.owner.performed(INO, "r")
    bench.call("grow", Resize(64 * PAGE_SIZE))
    extent, _ = records(bench.perform(bench.get(1, 0)))
    assert (extent.op, extent.seq) == (Op.EXTENT, 2)  # a new instance, hence a new descriptor


# --- unregister ---------------------------------------------------------------------------------


def test_an_unregister_that_crosses_an_invalidation_counts_as_its_ack() -> None:
    bench = Bench()
    bench.allocate(0, 8)
    bench.user(1)
    seq = bench.invalidated(bench.call("p", punch(0, 1)), 1)
    effects = bench.unregister(1)
    assert (ops(effects), work(effects)) == ([Op.REPLY], [Step.FREE])
    bench.perform(effects)
    assert bench.ack(1, seq) == []  # a tombstone: neither proof nor crime
    assert bench.state(1) is State.OPEN
    assert dropped(bench.ack(1, seq)) == [1]  # once


def test_a_tombstone_proves_nothing_for_a_later_registration() -> None:
    bench = Bench()
    bench.allocate(0, 8)
    bench.user(1)
    old = bench.invalidated(bench.call("p", punch(0, 1)), 1)
    bench.perform(bench.unregister(1))
    bench.register(1)
    new = bench.invalidated(bench.call("q", punch(1, 2)), 1)
    assert bench.ack(1, old) == []
    assert bench.owner.waiting_for(INO, "q") == {1}
    assert work(bench.ack(1, new)) == [Step.FREE]


def test_a_registration_voids_older_grants() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    granted = records(bench.get(1, 0))[-1]
    bench.unregister(1)
    bench.perform(bench.call("p", punch(0, 1)))  # without a word to the session
    assert bench.register(1).seq > granted.seq
    assert records(bench.perform(bench.get(1, 0)))[-1].seq > granted.seq


def test_parked_faults_are_answered_when_their_user_unregisters() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    bench.user(2)
    bench.call("p", punch(0, 1))
    bench.get(1, 0, req=77)
    bench.get(2, 0, req=78)
    page, reply = records(bench.unregister(1))
    assert (page.op, page.req, page.status) == (Op.PAGE, 77, errno.ENOENT)
    assert reply.op == Op.REPLY


def test_unregister_of_a_stranger_is_refused() -> None:
    bench = Bench()
    bench.user(1)
    bench.unregister(1)
    assert [r.status for r in records(bench.unregister(1))] == [errno.ENOENT]


# --- failures -----------------------------------------------------------------------------------


def test_the_end_of_a_socket_is_not_an_acknowledgement() -> None:
    bench = Bench()
    bench.allocate(0, 2)
    bench.user(1)
    bench.call("p", punch(0, 1))
    assert bench.owner.broken(1, "end of file") == [Drop(1, "end of file")]
    assert bench.state(1) is State.ZOMBIE
    assert bench.owner.waiting_for(INO, "p") == {1}
    bench.call("q", punch(1, 2))  # and later ones wait for it, too, without a record
    assert bench.owner.waiting_for(INO, "q") == {1}
    effects = bench.owner.gone(1)
    assert work(effects) == [Step.FREE, Step.FREE]
    assert effects[-1] == Forget(1)
    assert bench.owner.broken(1, "late") == []


def test_a_dead_process_is_proof_at_any_time() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    bench.user(2)
    effects = bench.call("p", punch(0, 1))
    assert work(bench.owner.gone(1)) == []
    assert work(bench.ack(2, bench.invalidated(effects, 2))) == [Step.FREE]


def test_the_ladder() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    bench.user(2)
    effects = bench.call("p", punch(0, 1))
    assert effects[-1] == Arm(INO, "p", Rung.LOG)
    bench.ack(2, bench.invalidated(effects, 2))
    note, arm = bench.owner.timer(INO, "p")
    assert isinstance(note, Note)
    assert "user(1001)" in note.text
    assert "user(1002)" not in note.text
    assert arm == Arm(INO, "p", Rung.CONDEMN)
    effects = bench.owner.timer(INO, "p")
    assert [type(e) for e in effects] == [Note, Kill, Drop, Arm]
    assert effects[-1] == Arm(INO, "p", Rung.GIVE_UP)
    assert (bench.state(1), bench.state(2)) == (State.KILLED, State.OPEN)
    bench.get(2, 0, req=50)
    effects = bench.owner.timer(INO, "p")
    assert answers(effects) == [("p", errno.EIO)]
    assert work(effects) == []
    assert bench.pages() == [0]
    assert bench.state(1) is State.UNPROVEN
    assert ops(effects, 2) == [Op.EXTENT, Op.PAGE]  # healthy users go on
    assert bench.owner.timer(INO, "p") == []
    assert bench.owner.gone(1) == [Forget(1)]
    assert bench.pages() == [0]  # the owner never retries by itself


def test_proof_of_exit_after_the_kill_frees() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    bench.call("p", punch(0, 1))
    bench.owner.timer(INO, "p")
    bench.owner.timer(INO, "p")
    effects = bench.owner.gone(1)
    assert work(effects) == [Step.FREE]
    assert answers(bench.perform(effects)) == [("p", 0)]
    assert bench.owner.timer(INO, "p") == []  # the armed rung comes too late


def test_an_unproven_user_makes_the_next_call_wait_for_its_own_ladder() -> None:
    bench = Bench()
    bench.allocate(0, 2)
    bench.user(1)
    bench.call("p", punch(0, 1))
    for _ in Rung:
        bench.owner.timer(INO, "p")
    assert ops(bench.call("q", punch(1, 2))) == []
    bench.owner.timer(INO, "q")
    assert [type(e) for e in bench.owner.timer(INO, "q")] == [Arm]  # killed before
    assert answers(bench.owner.timer(INO, "q")) == [("q", errno.EIO)]


def test_a_stopped_user_is_given_patience_but_not_for_ever() -> None:
    bench = Bench(patience=2)
    bench.allocate(0, 1)
    bench.user(1)
    bench.user(2)
    bench.call("p", punch(0, 1))
    bench.owner.timer(INO, "p")
    stopped = frozenset({1})
    effects = bench.owner.timer(INO, "p", stopped)
    assert [e.sid for e in effects if isinstance(e, Kill)] == [2]
    assert effects[-1] == Arm(INO, "p", Rung.CONDEMN)
    effects = bench.owner.timer(INO, "p", stopped)
    assert effects == [Arm(INO, "p", Rung.CONDEMN)]
    effects = bench.owner.timer(INO, "p", stopped)
    assert [e.sid for e in effects if isinstance(e, Kill)] == [1]
    assert effects[-1] == Arm(INO, "p", Rung.GIVE_UP)


def test_without_a_deadline_nobody_is_killed() -> None:
    bench = Bench(kills=False)
    bench.allocate(0, 1)
    bench.user(1)
    seq = bench.invalidated(bench.call("p", punch(0, 1)), 1)
    assert [type(e) for e in bench.owner.timer(INO, "p")] == [Note]
    assert work(bench.ack(1, seq)) == [Step.FREE]


def test_a_late_acknowledgement_of_a_condemned_user_is_not_heard() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    seq = bench.invalidated(bench.call("p", punch(0, 1)), 1)
    bench.owner.timer(INO, "p")
    bench.owner.timer(INO, "p")
    assert bench.ack(1, seq) == []
    assert bench.owner.waiting_for(INO, "p") == {1}


def test_the_calls_of_a_condemned_process_end_at_once() -> None:
    bench = Bench()
    bench.allocate(0, 8)
    bench.user(1, pid=77)
    bench.call("own", punch(0, 4), caller=77)
    bench.call("queued", punch(0, 1), caller=77)
    bench.call("other", punch(6, 7), caller=88)
    bench.owner.timer(INO, "own")
    effects = bench.owner.timer(INO, "own")
    assert answers(effects) == [("own", errno.EIO), ("queued", errno.EIO)]
    assert answers(bench.call("next", allocate(0, 8), caller=77)) == [("next", errno.EIO)]
    effects = bench.perform(bench.owner.gone(1))
    assert answers(effects) == [("other", 0)]
    assert bench.pages() == [0, 1, 2, 3, 4, 5, 7]  # what was answered with an error is not freed


def test_a_cancelled_call_collects_its_acks_and_frees_nothing() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    seq = bench.invalidated(bench.call("p", punch(0, 1)), 1)
    assert answers(bench.owner.cancel("p", errno.EINTR)) == [("p", errno.EINTR)]
    assert bench.owner.cancel("p", errno.EINTR) == []
    assert bench.owner.waiting_for(INO, "p") == {1}
    assert bench.get(1, 0) == []
    effects = bench.ack(1, seq)
    assert (work(effects), ops(effects)) == ([], [Op.EXTENT, Op.PAGE])
    assert bench.pages() == [0]
    assert bench.owner.cancel("unknown", errno.EINTR) == []


# --- records that are system calls --------------------------------------------------------------


def test_a_user_allocates_and_punches_through_its_session() -> None:
    bench = Bench()
    bench.user(1)
    effects = bench.perform(bench.send(1, Record(Op.ALLOCATE, req=4, obj=INO, start=0, end=3)))
    assert records(effects) == [Record(Op.REPLY, req=4)]
    assert bench.pages() == [0, 1, 2]
    effects = bench.send(1, Record(Op.PUNCH, req=4, obj=INO, start=0, end=2))
    assert ops(effects) == [Op.INVALIDATE]
    effects = bench.perform(bench.ack(1, bench.invalidated(effects, 1)))
    assert records(effects) == [Record(Op.REPLY, req=4)]
    assert bench.pages() == [2]


def test_a_reply_carries_the_errno() -> None:
    bench = Bench(budget=2)
    bench.user(1)
    (reply,) = records(bench.send(1, Record(Op.ALLOCATE, req=4, obj=INO, start=0, end=3)))
    assert reply.status == errno.ENOSPC
    (reply,) = records(bench.send(1, Record(Op.ALLOCATE, req=4, obj=INO, start=63, end=65)))
    assert reply.status == errno.EINVAL
    bench.unregister(1)
    (reply,) = records(bench.send(1, Record(Op.PUNCH, req=4, obj=INO, start=0, end=1)))
    assert reply.status == errno.ENOENT


def test_timers_of_an_earlier_punch_do_not_climb_the_ladder_of_the_next() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    stale: list[Arm] = []
    for _ in range(5):  # every one with the same request number, as User numbers them
        effects = bench.send(1, Record(Op.PUNCH, req=1, obj=INO, start=0, end=1))
        (arm,) = [e for e in effects if isinstance(e, Arm)]
        for old in stale:
            assert bench.owner.timer(old.ino, old.op) == []
        stale.append(arm)
        bench.perform(bench.ack(1, bench.invalidated(effects, 1)))
        bench.allocate(0, 1)
    assert bench.state(1) is State.OPEN


def test_the_punch_of_a_user_that_dies_is_still_performed() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    bench.send(1, Record(Op.PUNCH, req=1, obj=INO, start=0, end=1))
    effects = bench.perform(bench.owner.gone(1))
    assert ops(effects) == []
    assert bench.pages() == []


# --- floods -------------------------------------------------------------------------------------


def test_a_flood_of_parked_faults_ends_the_session_that_made_it() -> None:
    bench = Bench(max_parked=4)
    bench.allocate(0, 1)
    bench.user(1)
    bench.user(2)
    seq = bench.invalidated(bench.call("p", punch(0, 1)), 2)
    for _ in range(4):
        assert bench.get(1, 0) == []
    effects = bench.get(2, 0)
    assert dropped(effects) == [1]
    for _ in range(3):
        assert bench.get(2, 0) == []
    assert dropped(bench.get(2, 0)) == [2]
    assert bench.owner.waiting_for(INO, "p") == {1, 2}
    assert bench.ack(2, seq) == []


def test_a_flood_of_calls_ends_its_session() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    for req in range(10, 10 + 256):
        assert not dropped(bench.send(1, Record(Op.PUNCH, req=req, obj=INO, start=0, end=1)))
    assert dropped(bench.send(1, Record(Op.PUNCH, req=9, obj=INO, start=0, end=1))) == [1]
    effects = bench.perform(bench.owner.gone(1))  # one frees, the others find nothing to do
    assert (work(effects), bench.owner.files[INO].idle) == ([Step.FREE], True)


def test_a_parked_request_number_may_not_be_used_twice() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    seq = bench.invalidated(bench.call("p", punch(0, 1)), 1)
    bench.get(1, 0, req=6)
    bench.get(1, 0, req=6)
    bench.ack(1, seq)
    assert dropped(bench.owner.performed(INO, "p")) == [1]


# --- the end of a file --------------------------------------------------------------------------


def test_a_released_file_lives_until_its_last_user_leaves() -> None:
    bench = Bench()
    bench.allocate(0, 1)
    bench.user(1)
    assert bench.owner.release(INO) == []
    bench.owner.connect(2, 22)
    bench.send(2, Record(Op.HELLO, req=1, start=VERSION))
    (late,) = records(bench.send(2, Record(Op.REGISTER, Flag.FD, req=2), (INO, True)))
    assert late.status == errno.ENOENT
    assert ops(bench.get(1, 0)) == [Op.EXTENT, Op.PAGE]
    effects = bench.perform(bench.unregister(1))
    assert effects[-1] == Expire(INO)
    assert (bench.owner.files, bench.owner.budget.used) == ({}, 0)


def test_a_released_file_whose_user_dies_in_a_fault_is_destroyed_behind_it() -> None:
    bench = Bench()
    bench.user(1)
    bench.owner.release(INO)
    fault = bench.get(1, 0)
    assert work(fault) == [Step.ALLOCATE]
    bench.owner.gone(1)
    assert Expire(INO) in bench.perform(fault)
    assert bench.owner.budget.used == 0


def test_a_released_file_whose_user_leaves_during_its_punch_is_destroyed_behind_it() -> None:
    bench = Bench()
    bench.allocate(0, 2)
    bench.user(1)
    bench.owner.release(INO)
    bench.send(1, Record(Op.PUNCH, req=1, obj=INO, start=0, end=1))
    effects = bench.perform(bench.unregister(1))
    assert work(effects) == [Step.FREE, Step.FREE]
    assert effects[-1] == Expire(INO)


def test_a_released_guest_memfd_is_taken_from_its_users() -> None:
    bench = Bench(GUEST_MEMFD)
    bench.allocate(0, 1)
    bench.user(1)
    effects = bench.owner.release(INO)
    (record,) = records(effects)
    assert (record.op, record.status, record.start, record.end) == (
        Op.INVALIDATE, Reason.REVOKE, 0, 1 << 32,
    )  # fmt: skip
    assert bench.get(1, 0) == []
    effects = bench.perform(bench.ack(1, record.seq))
    assert [r.status for r in records(effects)] == [errno.ENOENT]
    assert Expire(INO) in effects
    assert [r.status for r in records(bench.get(1, 0))] == [errno.ENOENT]
    assert bench.send(1, Record(Op.BYE)) == [Forget(1)]


def test_a_file_that_cannot_be_taken_away_is_kept_until_its_user_is_proven_dead() -> None:
    bench = Bench(GUEST_MEMFD)
    bench.allocate(0, 1)
    bench.user(1)
    (arm,) = [e for e in bench.owner.release(INO) if isinstance(e, Arm)]
    for _ in Rung:
        effects = bench.owner.timer(INO, arm.op)
    assert (answers(effects), work(effects)) == ([], [])
    assert bench.pages() == [0]
    assert Expire(INO) in bench.perform(bench.owner.gone(1))


def test_shutdown_revokes_every_file_that_has_users() -> None:
    bench = Bench()
    bench.owner.create(INO + 1)
    bench.allocate(0, 1)
    bench.user(1)
    effects = bench.owner.shutdown()
    assert [r.status for r in records(effects)] == [Reason.REVOKE]
    again = bench.owner.shutdown()
    assert again == []
    effects = bench.perform(bench.ack(1, bench.invalidated(effects, 1)))
    assert [e for e in effects if isinstance(e, Expire)] == [Expire(INO)]
    assert list(bench.owner.files) == [INO + 1]
    # Descriptors may still be open, but nobody becomes a user any more.
    (late,) = records(bench.send(1, Record(Op.REGISTER, Flag.FD, req=2), (INO + 1, True)))
    assert (late.op, late.status) == (Op.REGISTERED, errno.ENOENT)
    assert answers(bench.call("late", punch(0, 1))) == [("late", errno.ENOENT)]
    assert bench.owner.release(INO) == []


def test_an_inode_number_can_be_used_again() -> None:
    bench = Bench(GUEST_MEMFD)
    bench.allocate(0, 1)
    bench.user(1)
    bench.get(1, 0)
    with pytest.raises(ValueError, match="in use"):
        bench.owner.create(INO)
    effects = bench.owner.release(INO)
    bench.perform(bench.ack(1, bench.invalidated(effects, 1)))
    bench.owner.create(INO)
    bench.call("size", Resize(64 * PAGE_SIZE))
    bench.register(1)
    assert ops(bench.perform(bench.get(1, 0))) == [Op.EXTENT, Op.PAGE]


# --- values -------------------------------------------------------------------------------------


def test_a_copy_goes_its_own_way() -> None:
    bench = Bench()
    bench.allocate(0, 4)
    bench.user(1)
    bench.user(2)
    seq = bench.invalidated(bench.call("p", punch(0, 1)), 1)
    bench.get(1, 0)
    bench.get(1, 9)
    before = bench.owner.key()
    original, twin = bench.owner, bench.owner.copy()
    assert twin.key() == before
    bench.owner = twin
    bench.ack(1, seq)
    bench.owner.timer(INO, "p")
    bench.perform(bench.owner.gone(2))
    bench.unregister(1)
    bench.owner.create(9)
    bench.owner.release(INO)
    assert original.key() == before
    assert twin.key() != before
