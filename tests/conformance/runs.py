# SPDX-License-Identifier: GPL-2.0-or-later
"""Each target is run once a session, whatever comes of it."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest

from privfs.testing.conformance import SKIPPED, apart

_found: dict[str, dict[str, str] | Exception] = {}


def _run(target: str) -> None:
    try:
        _found[target] = apart.outcomes(target)
    except Exception as failure:
        _found[target] = failure


def run(targets: Iterable[str]) -> None:
    """Run what has not run yet, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(_run, dict.fromkeys(t for t in targets if t not in _found)):
            pass


def outcomes(target: str) -> dict[str, str]:
    """Return row → outcome of a target, or skip with what the machine lacks."""
    run([target])
    found = _found[target]
    if isinstance(found, apart.Unable):
        pytest.skip(f"{target}: {found}")
    if isinstance(found, Exception):
        raise found
    return found


def outcome(target: str, row: str) -> str:
    """Return the outcome of one row, or skip."""
    found = outcomes(target)[row]
    if found.startswith(SKIPPED):
        pytest.skip(f"{row}: {found.removeprefix(SKIPPED)}")
    return found
