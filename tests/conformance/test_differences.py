# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/differences.md says what mounts answer today, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
from conformance.runs import outcomes

from privfs.testing.conformance import REFERENCE, ROWS, Mode, apart, report

PAGE = Path(__file__).parents[2] / "docs" / "differences.md"


def as_expected() -> dict[str, dict[Mode, dict[str, str]]]:
    """What the tables say that mounts answer."""
    return {
        who: {mode: {row.name: row.answer(who, mode) or "" for row in ROWS} for mode in Mode}
        for who in report.COMPARED
    }


def test_the_page_is_what_the_tables_say() -> None:
    assert report.draw(as_expected()) == PAGE.read_text(), "run scripts/conformance differences"


@pytest.mark.fuse
@pytest.mark.timeout(600)  # it may be the one that waits for all targets
@pytest.mark.parametrize("target", report.TARGETS)
def test_the_page_is_what_a_mount_says(ran: None, target: str) -> None:
    which = apart.mounted(target)
    assert which is not None
    runs = as_expected()
    runs[which.personality][which.mode] = outcomes(target)
    assert report.draw(runs) == PAGE.read_text(), "run scripts/conformance differences"


def test_a_difference_without_a_reason_is_an_error() -> None:
    runs = as_expected()
    runs["guest_memfd"][Mode.PASSTHROUGH]["read"] = "4096"
    with pytest.raises(report.Unexplained, match="guest_memfd, passthrough: read: 4096 instead"):
        report.draw(runs)


@pytest.mark.parametrize(("mode", "most"), [(Mode.PASSTHROUGH, 90), (Mode.DIRECT_IO, 71)])
def test_a_mount_differs_from_guest_memfd_only_where_it_must(mode: Mode, most: int) -> None:
    """A new difference must be argued for, not only written down."""
    different = [
        row.name
        for row in ROWS
        if REFERENCE["guest_memfd"] in row.want and row.difference("guest_memfd", mode) is not None
    ]
    assert len(different) <= most, different
