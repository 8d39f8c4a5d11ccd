# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfs import extents
from privfs.extents import MAX_PAGES, chunks, extent_of, extent_range, split

MIB = 256  # pages
GIB = 1024 * MIB

RANGES = st.tuples(st.integers(0, MAX_PAGES), st.integers(0, MAX_PAGES)).map(sorted)


def test_the_published_geometry() -> None:
    assert extents.EXTENT_COUNT == 76
    assert MAX_PAGES * extents.PAGE_SIZE == 16 << 40
    assert extent_range(0) == (0, 64 * MIB)
    assert extent_range(63) == (4 * GIB - 64 * MIB, 4 * GIB)
    for k in range(12):
        assert extent_range(64 + k) == (4 * GIB << k, 4 * GIB << (k + 1))


def test_the_extents_tile_the_file() -> None:
    position = 0
    for index in range(extents.EXTENT_COUNT):
        start, end = extent_range(index)
        assert start == position
        assert extent_of(start) == extent_of(end - 1) == index
        position = end
    assert position == MAX_PAGES


@pytest.mark.parametrize("page", [-1, MAX_PAGES])
def test_pages_outside_are_refused(page: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        extent_of(page)


@pytest.mark.parametrize("index", [-1, 76])
def test_indexes_outside_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        extent_range(index)


@pytest.mark.parametrize(("start", "end"), [(-1, 0), (2, 1), (0, MAX_PAGES + 1)])
def test_bad_ranges_are_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="page range"):
        list(split(start, end))
    with pytest.raises(ValueError, match="page range"):
        list(chunks(start, end))


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        list(chunks(0, 1, pages=0))


@given(RANGES)
def test_split_covers_exactly_and_stays_within_extents(bounds: list[int]) -> None:
    start, end = bounds
    position = start
    previous = -1
    for index, first, last in split(start, end):
        low, high = extent_range(index)
        assert first == position
        assert low <= first < last <= high
        assert index > previous
        position, previous = last, index
    assert position == end or start == end


@given(st.integers(0, 1 << 20), st.integers(0, 3000), st.integers(1, 400))
def test_chunks_cover_exactly_and_are_short(start: int, length: int, pages: int) -> None:
    pieces = list(chunks(start, start + length, pages))
    assert [page for low, high in pieces for page in range(low, high)] == list(
        range(start, start + length)
    )
    assert all(high - low <= pages for low, high in pieces)
    assert all(low % pages == 0 for low, _ in pieces[1:])


def test_default_chunks_stay_within_extents() -> None:
    for low, high in chunks(5, 5 * GIB + 7):
        assert extent_of(low) == extent_of(high - 1)
