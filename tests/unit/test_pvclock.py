# SPDX-License-Identifier: GPL-2.0-or-later
"""Clock pages: the arithmetic that a guest repeats, and versions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmsim.pvclock import (
    PVCLOCK_GUEST_STOPPED,
    PVCLOCK_TSC_STABLE_BIT,
    TIME_INFO,
    WALL_CLOCK,
    Scale,
    next_version,
    time_info,
    wall_clock,
)


@settings(deadline=None)
@given(st.integers(1, 10_000_000), st.integers(0, 1 << 45))
def test_a_guest_makes_nanoseconds_of_ticks(khz: int, ticks: int) -> None:
    scale = Scale.of(khz)
    assert 1 << 31 <= scale.mul < 1 << 32, "no bit of precision is given away"
    exact = ticks * 1_000_000 // khz
    # mul is rounded down, and a right shift loses low bits of the counter
    lost = max(0, -scale.shift)
    assert exact - (exact >> 20) - (1 << lost) - 1000 <= scale.nanoseconds(ticks) <= exact


def test_a_counter_that_stands_still_is_none() -> None:
    with pytest.raises(ValueError, match="0 kHz"):
        Scale.of(0)


@pytest.mark.parametrize(
    ("before", "after"), [(0, 2), (2, 4), (1, 2), (3, 4), (0xFFFF_FFFE, 0), (0xFFFF_FFFF, 0)]
)
def test_versions_are_even_and_new(before: int, after: int) -> None:
    assert next_version(before) == after


def test_a_page_keeps_that_the_guest_was_stopped() -> None:
    scale = Scale.of(2_000_000)
    first = time_info(bytes(32), 1000, 5, scale, stopped=False)
    assert TIME_INFO.unpack(first) == (2, 0, 1000, 5, scale.mul, scale.shift, 1)
    second = time_info(first, 2000, 6, scale, stopped=True)
    third = time_info(second, 3000, 7, scale, stopped=False)
    for page in (second, third):
        assert TIME_INFO.unpack(page)[-1] == PVCLOCK_TSC_STABLE_BIT | PVCLOCK_GUEST_STOPPED


def test_the_wall_clock_is_when_the_system_time_began() -> None:
    page = wall_clock(WALL_CLOCK.pack(4, 9, 9), 1_700_000_000_123_456_789)
    assert WALL_CLOCK.unpack(page) == (6, 1_700_000_000, 123_456_789)
