# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsim.attributes import GFN_LIMIT, Attributes, Run, check_request
from kvmsim.uapi import KVM_MEMORY_ATTRIBUTE_PRIVATE, PAGE_SIZE, KvmError

PRIVATE = KVM_MEMORY_ATTRIBUTE_PRIVATE
TIB = 1 << 40
DOMAIN = 24

ranges = st.tuples(st.integers(0, DOMAIN - 1), st.integers(1, DOMAIN)).map(
    lambda pair: (pair[0], min(DOMAIN, pair[0] + pair[1]))
)
operations = st.lists(st.tuples(ranges, st.sampled_from([0, 1, PRIVATE])), max_size=30)


def test_everything_is_shared_at_first() -> None:
    attributes = Attributes()
    assert attributes.get(0) == attributes.get(GFN_LIMIT - 1) == 0
    assert attributes.run(12345) == Run(0, GFN_LIMIT, 0)
    assert attributes.uniform(0, GFN_LIMIT)


@given(operations)
def test_map_equals_a_dict_of_every_gfn(script: list[tuple[tuple[int, int], int]]) -> None:
    attributes = Attributes()
    plain = dict.fromkeys(range(DOMAIN + 2), 0)
    for (start, end), value in script:
        would_change = any(plain[gfn] != value for gfn in range(start, end))
        assert attributes.set(start, end, value) == would_change
        plain.update(dict.fromkeys(range(start, end), value))
        assert [attributes.get(gfn) for gfn in plain] == list(plain.values())
    for start in range(DOMAIN):
        for end in range(start + 1, DOMAIN + 1):
            runs = list(attributes.runs(start, end))
            assert [run.value for run in runs for _ in range(run.start, run.end)] == [
                plain[gfn] for gfn in range(start, end)
            ]
            assert runs[0].start == start
            assert runs[-1].end == end
            neighbours = itertools.pairwise(runs)
            assert all(a.end == b.start and a.value != b.value for a, b in neighbours)
            assert attributes.uniform(start, end) == (len(runs) == 1)


@given(operations, operations)
def test_equal_maps_have_equal_keys_and_copies_are_apart(
    first: list[tuple[tuple[int, int], int]], second: list[tuple[tuple[int, int], int]]
) -> None:
    one = Attributes()
    for (start, end), value in first:
        one.set(start, end, value)
    before = one.key()
    twin = one.copy()
    assert twin.key() == before
    for (start, end), value in second:
        twin.set(start, end, value)
    assert one.key() == before
    rebuilt = Attributes()
    for gfn in range(DOMAIN):
        rebuilt.set(gfn, gfn + 1, twin.get(gfn))
    assert rebuilt.key() == twin.key()


def test_the_last_gfn_is_a_gfn_like_any_other() -> None:
    attributes = Attributes()
    assert attributes.set(GFN_LIMIT - 1, GFN_LIMIT, PRIVATE)
    assert attributes.get(GFN_LIMIT - 2) == 0
    assert attributes.run(GFN_LIMIT - 1) == Run(GFN_LIMIT - 1, GFN_LIMIT, PRIVATE)
    assert attributes.set(0, GFN_LIMIT, 0)
    assert attributes.key() == Attributes().key()


def test_a_terabyte_costs_two_boundaries() -> None:
    attributes = Attributes()
    pages = TIB // PAGE_SIZE
    for start in range(0, 100 * pages, pages):
        attributes.set(start, start + pages, PRIVATE)
    assert attributes.key() == ((0, 100 * pages), (PRIVATE, 0))


@pytest.mark.parametrize(("start", "end"), [(5, 5), (6, 5), (-1, 5), (0, GFN_LIMIT + 1)])
def test_a_range_that_is_none_changes_nothing(start: int, end: int) -> None:
    attributes = Attributes()
    with pytest.raises(ValueError):
        attributes.set(start, end, PRIVATE)
    with pytest.raises(ValueError):
        list(attributes.runs(start, end))
    assert attributes.key() == Attributes().key()


GIB = 1 << 30
REFUSED = [
    ("flags", (0, GIB, PRIVATE, 1), "flags"),
    ("other attribute", (0, GIB, PRIVATE | 1, 0), "attribute"),
    ("read, write, execute", (0, GIB, 0b111, 0), "attribute"),
    ("empty", (0, 0, PRIVATE, 0), "size is 0"),
    ("wrap", (GIB, (1 << 64) - GIB + PAGE_SIZE, PRIVATE, 0), "wraps"),
    ("wrap to exactly 0", (GIB, (1 << 64) - GIB, PRIVATE, 0), "wraps"),
    ("address", (1, GIB, PRIVATE, 0), "address is not"),
    ("address, last byte", (PAGE_SIZE - 1, GIB, 0, 0), "address is not"),
    ("size", (0, GIB + 1, PRIVATE, 0), "size is not"),
    ("size, one short", (0, GIB - 1, PRIVATE, 0), "size is not"),
    ("flags come first", (1, 0, 1, 1), "flags"),
]


@pytest.mark.parametrize(("arguments", "reason"), [r[1:] for r in REFUSED], ids=lambda r: str(r))
def test_refused_requests(arguments: tuple[int, int, int, int], reason: str) -> None:
    with pytest.raises(KvmError, match=reason) as caught:
        check_request("KVM_SET_MEMORY_ATTRIBUTES", *arguments, supported=PRIVATE)
    assert caught.value.errno == errno.EINVAL
    assert (caught.value.start, caught.value.size) == arguments[:2]
    assert "KVM_SET_MEMORY_ATTRIBUTES" in str(caught.value)
    assert "EINVAL" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "size", "gfns"),
    [
        (0, PAGE_SIZE, (0, 1)),
        (GIB, GIB, (1 << 18, 1 << 19)),
        (0, (1 << 64) - PAGE_SIZE, (0, GFN_LIMIT - 1)),
    ],
)
def test_accepted_requests(address: int, size: int, gfns: tuple[int, int]) -> None:
    assert check_request("op", address, size, PRIVATE, 0, supported=PRIVATE) == gfns


class _Unable(list[int]):
    """A list that cannot be changed for want of memory."""

    def __setitem__(self, index: object, value: object) -> None:
        raise MemoryError


@pytest.mark.parametrize("failing", ["_starts", "_values"])
def test_without_memory_all_stays_as_it_was(failing: str) -> None:
    attributes = Attributes()
    attributes.set(10, 20, PRIVATE)
    before = attributes.key()
    setattr(attributes, failing, _Unable(getattr(attributes, failing)))
    with pytest.raises(MemoryError):
        attributes.set(12, 14, 0)
    assert attributes.key() == before


def test_a_change_of_many_runs_costs_no_copy_of_them() -> None:
    attributes = Attributes()
    for gfn in range(0, 200_000, 2):
        attributes.set(gfn, gfn + 1, PRIVATE)
    starts = attributes._starts
    assert attributes.set(1, 2, PRIVATE)
    assert attributes._starts is starts
    assert len(starts) == 200_000 - 2
