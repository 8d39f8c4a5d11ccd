# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsim.rangeindex import RangeIndex

entries = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=12)


@given(entries, st.sets(st.integers(0, 11)), st.integers(0, 25), st.integers(0, 10))
def test_agrees_with_looking_at_every_range(
    ranges: list[tuple[int, int]], removed: set[int], start: int, npages: int
) -> None:
    index = RangeIndex()
    for slot, (first, count) in enumerate(ranges):
        index.add(first, count, slot)
    before = index.copy()
    for slot in removed:
        if slot < len(ranges):
            index.remove(*ranges[slot], slot)
    kept = {slot: r for slot, r in enumerate(ranges) if slot not in removed}
    end = start + npages
    expected = sorted(
        (first, slot, max(start, first), min(end, first + count))
        for slot, (first, count) in kept.items()
        if max(start, first) < min(end, first + count)
    )
    assert list(index.meeting(start, end)) == [row[1:] for row in expected]
    assert len(index) == len(kept)
    assert sorted(index) == sorted(kept)
    assert len(before) == len(ranges)


def test_what_is_not_there_cannot_be_removed() -> None:
    index = RangeIndex()
    index.add(3, 4, 0)
    for gone in ((3, 4, 1), (3, 5, 0), (4, 4, 0)):
        with pytest.raises(KeyError):
            index.remove(*gone)
    assert len(index) == 1
