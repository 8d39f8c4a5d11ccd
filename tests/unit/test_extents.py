# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfs import extents
from privfs.extents import GROWING, MAX_PAGES, Layout, chunks

MIB = 256  # pages
GIB = 1024 * MIB

EQUAL = Layout(2 * MIB, 0, whole=True)
LAYOUTS = st.sampled_from([GROWING, EQUAL, Layout(1, 8), Layout(4, 4)])

RANGES = st.tuples(st.integers(0, MAX_PAGES), st.integers(0, MAX_PAGES)).map(sorted)


def test_the_published_geometry() -> None:
    assert GROWING.count == 76
    assert MAX_PAGES * extents.PAGE_SIZE == 16 << 40
    assert GROWING.extent_range(0) == (0, 64 * MIB)
    assert GROWING.extent_range(63) == (4 * GIB - 64 * MIB, 4 * GIB)
    for k in range(12):
        assert GROWING.extent_range(64 + k) == (4 * GIB << k, 4 * GIB << (k + 1))


def test_equal_extents_go_on_to_the_end() -> None:
    assert EQUAL.count == MAX_PAGES // (2 * MIB)
    assert EQUAL.extent_range(EQUAL.count - 1) == (MAX_PAGES - 2 * MIB, MAX_PAGES)
    assert EQUAL.extent_of(5 * GIB + 3) == 5 * 512


@pytest.mark.parametrize("layout", [GROWING, Layout(4, 4), Layout(1 << 20, 0)])
def test_the_extents_tile_the_file(layout: Layout) -> None:
    position = 0
    for index in range(layout.count):
        start, end = layout.extent_range(index)
        assert start == position
        assert layout.extent_of(start) == layout.extent_of(end - 1) == index
        position = end
    assert position == MAX_PAGES


@pytest.mark.parametrize("page", [-1, MAX_PAGES])
def test_pages_outside_are_refused(page: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        GROWING.extent_of(page)


@pytest.mark.parametrize("index", [-1, 76])
def test_indexes_outside_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        GROWING.extent_range(index)


@pytest.mark.parametrize(("start", "end"), [(-1, 0), (2, 1), (0, MAX_PAGES + 1)])
def test_bad_ranges_are_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="page range"):
        list(GROWING.split(start, end))
    with pytest.raises(ValueError, match="page range"):
        GROWING.within(start, end)
    with pytest.raises(ValueError, match="page range"):
        list(chunks(start, end))


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        list(chunks(0, 1, pages=0))


@given(RANGES, LAYOUTS)
def test_split_covers_exactly_and_stays_within_extents(bounds: list[int], layout: Layout) -> None:
    start, end = bounds
    if not layout.doubles:
        end = min(end, start + 1000 * layout.pages)
    position = start
    previous = -1
    for index, first, last in layout.split(start, end):
        low, high = layout.extent_range(index)
        assert first == position
        assert low <= first < last <= high
        assert index > previous
        position, previous = last, index
    assert position == end or start == end


@given(st.integers(0, 40), st.integers(0, 40), LAYOUTS, st.integers(0, 17))
def test_within_is_what_split_cuts_nothing_off(a: int, b: int, layout: Layout, up: int) -> None:
    start, end = sorted((a << up, b << up))
    whole = [i for i, *cut in layout.split(start, end) if tuple(cut) == layout.extent_range(i)]
    assert list(layout.within(start, end)) == whole


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
        assert GROWING.extent_of(low) == GROWING.extent_of(high - 1)
