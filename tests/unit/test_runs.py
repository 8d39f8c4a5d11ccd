# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs of neighbours, held against itertools.groupby()."""

from __future__ import annotations

import os
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwemu.runs import equal_runs, true_runs
from kvmsim.dataruns import data_runs

PAGE = 4096


def grouped(values: list[int]) -> list[tuple[int, int, int]]:
    found, at = [], 0
    for value, group in groupby(values):
        end = at + len(list(group))
        found.append((at, end, value))
        at = end
    return found


@given(st.lists(st.integers(0, 1), max_size=40))
def test_what_is_true(values: list[int]) -> None:
    wanted = [(start, end) for start, end, value in grouped(values) if value]
    for kind in (np.bool_, np.uint8):
        assert list(true_runs(np.array(values, kind))) == wanted


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_what_is_equal(values: list[int]) -> None:
    assert list(equal_runs(np.array(values))) == [run[:2] for run in grouped(values)]


def test_what_of_a_file_holds_something() -> None:
    fd = os.memfd_create("holes")
    try:
        os.truncate(fd, 16 * PAGE)
        for page in (2, 3, 7):
            os.pwrite(fd, b"x", page * PAGE)
        runs = [(2 * PAGE, 4 * PAGE), (7 * PAGE, 8 * PAGE)]
        assert list(data_runs(fd, 0, 16 * PAGE)) == runs
        assert list(data_runs(fd, 3 * PAGE, 7 * PAGE)) == [(3 * PAGE, 4 * PAGE)]
        assert list(data_runs(fd, 8 * PAGE, 16 * PAGE)) == []
    finally:
        os.close(fd)


def test_what_is_no_file_is_an_error() -> None:
    ours, theirs = os.pipe()
    try:
        with pytest.raises(OSError, match="Illegal seek"):
            list(data_runs(ours, 0, PAGE))
    finally:
        os.close(ours)
        os.close(theirs)
