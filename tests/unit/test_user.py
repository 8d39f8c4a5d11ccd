# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno

import pytest

from privfs.notifier.user import (
    Closed,
    Denied,
    ExtentArrived,
    Granted,
    Opened,
    Registered,
    Replied,
    User,
    Zap,
)
from privfs.notifier.wire import VERSION, Flag, Op, Reason, Record, WireError, words_label

INO = 5


def user(ring: int = 4, floor: int = 0) -> User:
    """Return a user registered on ``INO``."""
    made = User(ring)
    req = made.register().req
    made.received(Record(Op.REGISTERED, req=req, obj=INO, start=1, end=100, seq=floor))
    return made


def invalidate(
    subject: User, seq: int, start: int, end: int, reason: Reason = Reason.PUNCH, ino: int = INO
) -> Zap:
    zap = subject.received(Record(Op.INVALIDATE, 0, reason, 0, ino, start, end, seq))
    assert isinstance(zap, Zap)
    return zap


def test_hello_carries_version_and_label() -> None:
    subject = User()
    record = subject.hello("guest")
    assert (record.op, record.start) == (Op.HELLO, VERSION)
    assert words_label(record.obj, record.seq) == "guest"
    assert subject.received(Record(Op.WELCOME, req=record.req, seq=9)) == Opened(record.req, 0, 9)


def test_answers_to_every_question() -> None:
    subject = user()
    req = subject.get(INO, 3, 0, 8, write=True).req
    page = Record(Op.PAGE, req=req, obj=1, start=2, end=5, seq=7)
    assert subject.received(page) == Granted(req, INO, 1, 2, 5, 7)
    req = subject.get(INO, 3, 0, 8, write=False).req
    assert subject.received(Record(Op.PAGE, status=27, req=req)) == Denied(req, INO, 27)
    for record in (
        subject.allocate(INO, 0, 1),
        subject.punch(INO, 0, 1),
        subject.unregister(INO),
    ):
        assert record.obj == INO
        reply = Record(Op.REPLY, status=errno.EIO, req=record.req)
        assert subject.received(reply) == Replied(record.req, errno.EIO)
    req = subject.register().req
    refusal = Record(Op.REGISTERED, status=errno.ENOENT, req=req)
    assert subject.received(refusal) == Registered(req, errno.ENOENT, 0, False, 0)
    assert subject.received(Record(Op.BYE, status=4)) == Closed(4)


def test_records_say_what_they_are_for() -> None:
    subject = user()
    assert subject.register()[:2] == (Op.REGISTER, Flag.FD)
    get = subject.get(INO, 3, 2, 9, write=True, again=True)
    assert (get.flags, get.start, get.end, get.seq) == (Flag.WRITE | Flag.EXTENT, 2, 9, 3)
    assert subject.get(INO, 3, 2, 9, write=False).flags == 0
    assert subject.ack(12) == Record(Op.ACK, seq=12)
    assert subject.bye() == Record(Op.BYE)


def test_request_numbers_are_the_lowest_free_ones() -> None:
    subject = user()
    first = subject.get(INO, 0, 0, 1, write=False).req
    second = subject.get(INO, 1, 1, 2, write=False).req
    assert (first, second) == (1, 2)
    subject.received(Record(Op.PAGE, status=errno.ENOENT, req=first))
    assert subject.get(INO, 2, 2, 3, write=False).req == first


@pytest.mark.parametrize(
    "answer",
    [
        Record(Op.PAGE, req=99, start=0, end=1),  # nobody asked
        Record(Op.REPLY, req=1),  # answers a GET with the wrong op
        Record(Op.WELCOME, req=1),
        Record(Op.REGISTERED, req=1, obj=INO),
    ],
)
def test_an_answer_to_another_question_is_an_error_and_changes_nothing(answer: Record) -> None:
    subject = user()
    assert subject.get(INO, 0, 0, 1, write=False).req == 1
    before = subject.key()
    with pytest.raises(WireError, match="not pending"):
        subject.received(answer)
    assert subject.key() == before


# --- the install rule ---------------------------------------------------------------------------


def test_a_grant_without_a_newer_invalidation_is_installed_whole() -> None:
    subject = user()
    assert subject.installable(INO, 3, 0, 8, 0) == (0, 8)
    invalidate(subject, 1, 0, 8)
    assert subject.installable(INO, 3, 0, 8, 1) == (0, 8)  # the grant is newer


def test_a_newer_invalidation_of_the_page_refuses_the_grant() -> None:
    subject = user()
    invalidate(subject, 1, 3, 4)
    start, end = subject.installable(INO, 3, 0, 8, 0)
    assert start == end


def test_a_newer_invalidation_beside_the_page_clips_the_grant() -> None:
    subject = user(ring=8)
    invalidate(subject, 1, 0, 2)
    invalidate(subject, 2, 6, 7)
    assert subject.installable(INO, 3, 0, 8, 0) == (2, 6)
    assert subject.installable(INO, 3, 0, 8, 1) == (0, 6)
    invalidate(subject, 3, 2, 3)
    invalidate(subject, 4, 4, 5)
    assert subject.installable(INO, 3, 0, 8, 0) == (3, 4)
    assert subject.installable(INO, 3, 3, 4, 0) == (3, 4)


def test_what_the_ring_has_forgotten_is_refused() -> None:
    subject = user(ring=2)
    invalidate(subject, 1, 90, 91)
    invalidate(subject, 2, 90, 91)
    assert subject.installable(INO, 3, 0, 8, 0) == (0, 8)
    invalidate(subject, 3, 90, 91)  # forgets seq 1
    start, end = subject.installable(INO, 3, 0, 8, 0)
    assert start == end
    assert subject.installable(INO, 3, 0, 8, 1) == (0, 8)


def test_a_grant_from_before_a_registration_is_void() -> None:
    subject = user(floor=1)
    req = subject.get(INO, 3, 3, 4, write=False).req
    granted = subject.received(Record(Op.PAGE, req=req, obj=1, start=3, end=4, seq=1))
    assert isinstance(granted, Granted)
    subject.unregister(INO)
    start, end = subject.installable(INO, 3, 3, 4, granted.seq)
    assert start == end
    req = subject.register().req
    subject.received(Record(Op.REGISTERED, req=req, obj=INO, start=1, end=100, seq=2))
    start, end = subject.installable(INO, 3, 3, 4, granted.seq)
    assert start == end
    assert subject.installable(INO, 3, 3, 4, 2) == (3, 4)


def test_files_have_rings_of_their_own() -> None:
    subject = user()
    req = subject.register().req
    subject.received(Record(Op.REGISTERED, req=req, obj=6, start=1, end=100, seq=0))
    invalidate(subject, 1, 3, 4, ino=6)
    assert subject.installable(INO, 3, 3, 4, 0) == (3, 4)
    start, end = subject.installable(6, 3, 3, 4, 0)
    assert start == end


# --- invalidations and extents ------------------------------------------------------------------


def test_an_invalidation_asks_for_a_zap_and_names_its_ack() -> None:
    subject = user()
    assert invalidate(subject, 1, 3, 9) == Zap(INO, 3, 9, 1, Reason.PUNCH, ())
    assert subject.ack(1).seq == 1


def test_an_invalidation_of_a_file_that_was_left_is_acknowledged_all_the_same() -> None:
    subject = user()
    subject.unregister(INO)
    assert invalidate(subject, 1, 0, 9, Reason.TRUNCATE) == Zap(INO, 0, 9, 1, Reason.TRUNCATE, ())


def test_extents_die_with_the_range_that_leaves_the_file() -> None:
    subject = user()
    for instance, start, end in ((1, 0, 10), (2, 10, 20), (3, 20, 40)):
        arrived = subject.received(Record(Op.EXTENT, Flag.FD, 0, 0, INO, start, end, instance))
        assert arrived == ExtentArrived(INO, instance, start, end)
    assert subject.extent(INO, 2) == (10, 20)
    assert invalidate(subject, 1, 0, 40, Reason.PUNCH).dead == ()
    assert invalidate(subject, 2, 11, 2**32, Reason.TRUNCATE).dead == (3,)
    assert subject.extent(INO, 2) == (10, 20)
    assert subject.extent(INO, 3) is None
    assert invalidate(subject, 3, 0, 2**32, Reason.REVOKE).dead == (1, 2)
    assert subject.extent(INO, 1) is None


def test_an_extent_of_a_file_that_was_left_is_still_announced() -> None:
    subject = user()
    subject.unregister(INO)
    # Its descriptor has arrived and must be closed.
    arrived = subject.received(Record(Op.EXTENT, Flag.FD, 0, 0, INO, 0, 10, 1))
    assert arrived == ExtentArrived(INO, 1, 0, 10)
    assert subject.extent(INO, 1) is None


def test_a_copy_goes_its_own_way() -> None:
    subject = user(ring=2)
    subject.get(INO, 0, 0, 1, write=False)
    before = subject.key()
    twin = subject.copy()
    assert twin.key() == before
    for seq in (1, 2, 3):
        invalidate(twin, seq, 0, 1)
    twin.received(Record(Op.EXTENT, Flag.FD, 0, 0, INO, 0, 10, 1))
    twin.unregister(INO)
    assert subject.key() == before
    assert twin.key() != before


def test_an_invalidation_that_was_overtaken_counts_no_less() -> None:
    subject = user()
    invalidate(subject, 3, 20, 21)
    invalidate(subject, 2, 10, 11)
    assert subject.installable(INO, 20, 20, 21, seq=2) == (20, 20)
    assert subject.installable(INO, 10, 10, 11, seq=1) == (10, 10)
    assert subject.installable(INO, 10, 5, 30, seq=2) == (5, 20)


def test_the_floor_never_falls() -> None:
    subject = user(ring=1)
    for seq in (3, 2, 1):
        invalidate(subject, seq, 0, 1)
    assert subject.installable(INO, 9, 9, 10, seq=2) == (9, 9)
    assert subject.installable(INO, 9, 9, 10, seq=3) == (9, 10)


def test_an_invalidation_may_overtake_the_answer_to_a_registration() -> None:
    subject = User()
    req = subject.register().req
    invalidate(subject, 8, 0, 1)
    subject.received(Record(Op.REGISTERED, req=req, obj=INO, start=1, end=100, seq=7))
    assert subject.installable(INO, 0, 0, 1, seq=7) == (0, 0)
    assert subject.installable(INO, 0, 0, 1, seq=8) == (0, 1)
