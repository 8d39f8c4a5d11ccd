# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs of neighbours in an array that are alike, as half-open ranges of indices."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt


def true_runs(flags: npt.NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of what is true, ascending; ``flags`` are booleans, or 0 and 1."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0)).tolist()
    yield from zip(edges[::2], edges[1::2], strict=True)


def equal_runs(values: npt.NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of what has one value; of an array with one element at least."""
    yield from pairwise([0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)])
