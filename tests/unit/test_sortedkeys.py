# SPDX-License-Identifier: GPL-2.0-or-later
"""Keys in blocks against a plain sorted list."""

from __future__ import annotations

import random
from bisect import bisect_right, insort

import pytest

from kvmsim.sortedkeys import SortedKeys


@pytest.mark.parametrize("spread", [1 << 40, 3000])
def test_against_a_sorted_list(spread: int) -> None:
    chance = random.Random(spread)
    keys: SortedKeys[int] = SortedKeys()
    plain: list[int] = []

    def check() -> None:
        assert len(keys) == len(plain)
        probe = chance.randrange(spread)
        at = bisect_right(plain, probe)
        assert keys.floor(probe) == (plain[at - 1] if at else None)
        assert list(keys.since(probe)) == [key for key in plain if key >= probe]

    check()
    for step in range(6000):
        key = chance.randrange(spread)
        keys.add(key)
        insort(plain, key)
        if step % 50 == 0:
            check()
    assert list(keys) == plain
    twin = keys.copy()
    for step in range(5990):
        key = plain.pop(chance.randrange(len(plain)))
        keys.remove(key)
        if step % 50 == 0:
            check()
    assert list(keys) == plain
    assert len(list(twin)) == len(twin) == 6000, "a copy is its own"


@pytest.mark.parametrize("key", [-1, 1, 4, 99])
def test_what_is_not_there_cannot_be_taken(key: int) -> None:
    keys: SortedKeys[int] = SortedKeys()
    with pytest.raises(KeyError):
        keys.remove(key)
    for present in (0, 3, 5):
        keys.add(present)
    with pytest.raises(KeyError):
        keys.remove(key)
    assert list(keys) == [0, 3, 5]


@pytest.mark.parametrize("order", [1, -1])
def test_a_run_of_keys_comes_and_goes_in_order(order: int) -> None:
    keys: SortedKeys[int] = SortedKeys()
    run = range(5000)[::order]
    for key in run:
        keys.add(key)
    assert list(keys) == list(range(5000))
    for key in run:
        keys.remove(key)
    assert len(keys) == 0
    assert list(keys.since(0)) == []
