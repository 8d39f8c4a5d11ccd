# SPDX-License-Identifier: GPL-2.0-or-later
"""Preallocation: holes only, in chunks, EINTR tried again, nothing left where it fails."""

from __future__ import annotations

import errno
import os
from collections import deque
from dataclasses import dataclass, field

import pytest

from kvmsim.vmm.prealloc import EINTR_REPEATS, PreallocError, Progress, preallocate


@dataclass
class Side:
    """Pages 0 to 99; ``fates`` are the errors of the next requests, 0 for none."""

    pages: set[int] = field(default_factory=set)
    fates: deque[int] = field(default_factory=deque)
    is_alone: bool = True
    asked: list[tuple[int, int]] = field(default_factory=list)
    stays_interrupted: bool = False

    def holes(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for page in sorted(set(range(100)) - self.pages):
            if found and found[-1][1] == page:
                found[-1] = (found[-1][0], page + 1)
            else:
                found.append((page, page + 1))
        return found

    def allocate(self, start: int, end: int) -> None:
        self.asked.append((start, end))
        fate = errno.EINTR if self.stays_interrupted else self.fates.popleft() if self.fates else 0
        if fate == errno.EINTR:
            self.pages.add(start)
        if fate:
            raise OSError(fate, os.strerror(fate))
        self.pages.update(range(start, end))

    def punch(self, start: int, end: int) -> None:
        self.pages.difference_update(range(start, end))

    def alone(self) -> bool:
        return self.is_alone


def test_holes_are_filled_in_chunks_and_told() -> None:
    side, told = Side(set(range(20, 50))), list[Progress]()
    assert preallocate(side, told.append, chunk=16) == Progress(70, 70)
    assert side.asked == [(0, 16), (16, 20), (50, 66), (66, 82), (82, 98), (98, 100)]
    assert side.pages == set(range(100))
    assert [p.done for p in told] == [0, 16, 20, 36, 52, 68, 70]
    assert {p.total for p in told} == {70}


def test_a_file_that_has_everything_is_asked_for_nothing() -> None:
    side, told = Side(set(range(100))), list[Progress]()
    assert preallocate(side, told.append) == Progress(0, 0)
    assert (side.asked, told) == ([], [Progress(0, 0)])


def test_eintr_is_tried_again_and_goes_on() -> None:
    side = Side(fates=deque([errno.EINTR, errno.EINTR, 0, errno.EINTR]))
    assert preallocate(side, lambda _: None, chunk=50) == Progress(100, 100)
    assert side.asked == [(0, 50)] * 3 + [(50, 100)] * 2


def test_eintr_for_ever_ends_and_leaves_nothing() -> None:
    side = Side(stays_interrupted=True)
    with pytest.raises(PreallocError, match=f"{EINTR_REPEATS} times") as caught:
        preallocate(side, lambda _: None)
    assert (caught.value.errno, side.pages) == (errno.EINTR, set())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM, errno.ENOTCONN])
def test_memory_that_runs_out_gives_back_what_was_filled_and_no_more(number: int) -> None:
    before = set(range(20, 50))
    side = Side(set(before), deque([0, 0, 0, number]))
    with pytest.raises(PreallocError, match=os.strerror(number)) as caught:
        preallocate(side, lambda _: None, chunk=16)
    assert (caught.value.errno, caught.value.done, caught.value.total) == (number, 36, 70)
    assert not caught.value.left
    assert side.pages == before


def test_pages_that_another_user_may_have_got_stay() -> None:
    side = Side(fates=deque([0, errno.ENOSPC]), is_alone=False)
    with pytest.raises(PreallocError) as caught:
        preallocate(side, lambda _: None, chunk=60)
    assert caught.value.left
    assert side.pages == set(range(60))


def test_an_owner_that_is_gone_cannot_be_given_anything_back() -> None:
    class Gone(Side):
        def alone(self) -> bool:
            raise OSError(errno.ENOTCONN, "no owner")

    with pytest.raises(PreallocError) as caught:
        preallocate(Gone(fates=deque([0, errno.ENOTCONN])), lambda _: None, chunk=60)
    assert caught.value.left


def test_a_person_who_ends_it_gets_everything_back() -> None:
    side = Side({7})

    def told(progress: Progress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preallocate(side, told, chunk=5)
    assert side.pages == {7}
