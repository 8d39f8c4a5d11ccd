# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest

from kvmsim.invalidate import InvalidateError, MmuInvalidate


def test_quiet_vm_never_retries() -> None:
    invalidate = MmuInvalidate()
    assert not invalidate.retry(0, invalidate.seq)


def test_between_begin_and_the_first_range_everything_retries() -> None:
    invalidate = MmuInvalidate()
    snapshot = invalidate.seq
    invalidate.begin()
    assert invalidate.retry(0, snapshot)
    assert invalidate.retry(1 << 40, snapshot)


@pytest.mark.parametrize(("gfn", "retry"), [(9, False), (10, True), (19, True), (20, False)])
def test_in_progress_concerns_the_range_only(gfn: int, retry: bool) -> None:
    invalidate = MmuInvalidate()
    snapshot = invalidate.seq
    invalidate.begin()
    invalidate.range_add(10, 20)
    assert invalidate.retry(gfn, snapshot) is retry


def test_after_the_end_every_older_snapshot_retries_once() -> None:
    invalidate = MmuInvalidate()
    old = invalidate.seq
    invalidate.begin()
    invalidate.range_add(10, 20)
    invalidate.end()
    assert invalidate.retry(10, old)
    assert invalidate.retry(999, old)  # a false positive, allowed
    assert not invalidate.retry(10, invalidate.seq)


def test_one_bracket_may_add_the_ranges_of_several_slots() -> None:
    invalidate = MmuInvalidate()
    invalidate.begin()
    invalidate.range_add(10, 11)
    invalidate.range_add(30, 31)
    assert invalidate.range == (10, 31)
    assert invalidate.retry(10, invalidate.seq)


def test_ranges_are_kept_until_all_have_ended() -> None:
    invalidate = MmuInvalidate()
    invalidate.begin()
    invalidate.range_add(10, 11)
    invalidate.begin()
    invalidate.range_add(30, 31)
    invalidate.end()
    assert invalidate.range == (10, 31)
    assert invalidate.retry(10, invalidate.seq)
    assert invalidate.retry(30, invalidate.seq)
    invalidate.end()
    assert not invalidate.retry(10, invalidate.seq)
    invalidate.begin()
    assert invalidate.range is None


def test_seq_counts_ends() -> None:
    invalidate = MmuInvalidate()
    for expected in range(1, 6):
        invalidate.begin()
        invalidate.range_add(0, 1)
        assert invalidate.seq == expected - 1
        invalidate.end()
        assert (invalidate.seq, invalidate.in_progress) == (expected, 0)


def _begun() -> MmuInvalidate:
    invalidate = MmuInvalidate()
    invalidate.begin()
    return invalidate


@pytest.mark.parametrize(
    ("invalidate", "call", "message"),
    [
        (MmuInvalidate(), lambda i: i.end(), "without begin"),
        (MmuInvalidate(), lambda i: i.range_add(0, 1), "outside"),
        (_begun(), lambda i: i.end(), "without a range"),
        (_begun(), lambda i: i.range_add(3, 3), "empty"),
        (_begun(), lambda i: i.range_add(4, 3), "empty"),
        (_begun(), lambda i: i.range_add(-1, 3), "negative"),
    ],
)
def test_unbalanced_calls_raise_and_change_nothing(invalidate, call, message) -> None:  # type: ignore[no-untyped-def]
    before = invalidate.key()
    with pytest.raises(InvalidateError, match=message):
        call(invalidate)
    assert invalidate.key() == before


def test_copy_is_apart() -> None:
    one = _begun()
    twin = one.copy()
    twin.range_add(1, 2)
    twin.end()
    assert one.key() == _begun().key()
    assert twin.key() != one.key()
