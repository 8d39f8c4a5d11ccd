# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables of the suite themselves, and a runner that survives its probes."""

from __future__ import annotations

import os
import signal

import pytest
from conformance.runs import outcomes

from privfs.testing.conformance import COLUMNS, REFERENCE, ROWS, Memfd, Mode, Row, Start, Subject
from privfs.testing.conformance.reasons import REASONS
from privfs.testing.conformance.report import COMPARED
from privfs.testing.conformance.runner import outcome


def test_every_reason_is_used_and_every_one_used_is_written() -> None:
    named = {differs.reason for row in ROWS for differs in row.fuse}
    assert named == set(REASONS)


def test_every_row_says_what_it_does_and_where_its_answers_come_from() -> None:
    for row in ROWS:
        assert row.source, row.name
        assert row.probe.__doc__, row.name
        assert row.want, row.name
        assert set(row.want) <= set(COLUMNS), row.name


def test_a_difference_is_one() -> None:
    """A row that says how mounts differ differs in at least one personality and mode."""
    idle = [
        row.name
        for row in ROWS
        if row.fuse and not any(row.difference(who, mode) for who in REFERENCE for mode in Mode)
    ]
    assert idle == []


def test_mounts_differ_only_where_the_suite_says_so() -> None:
    for row in ROWS:
        for who in COMPARED:
            for mode in Mode:
                answer = row.answer(who, mode)
                same = answer == row.want.get(REFERENCE[who])
                assert same == (row.difference(who, mode) is None), row.name


@pytest.mark.parametrize("column", ["gm0", "v7", "shim", "resizable"])
def test_a_row_tells_some_file_from_another(column: str) -> None:
    """The suite sees: each column differs from a memfd in many rows."""
    told = [row for row in ROWS if row.want.get(column) not in (None, row.want.get("memfd"))]
    assert len(told) > 60


# --- the runner ---------------------------------------------------------------------------------


def row(probe: object) -> Row:
    return Row("made up", probe, (), Start.HOLES, {"memfd": ""}, "here")  # type: ignore[arg-type]


def ends_with_sigbus(f: Subject) -> None:
    f.note("before")
    os.kill(os.getpid(), signal.SIGBUS)


def hangs(f: Subject) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    while True:
        signal.pause()


def raises(f: Subject) -> None:
    raise RuntimeError("no errno")


def leaves(f: Subject) -> None:
    os._exit(3)


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        (lambda f: "0", "0"),
        (lambda f: os.fstat(f.fd).st_size, "65536"),
        (lambda f: os.close(f.fd), "None"),
        (lambda f: os.close(-1), "EBADF"),
        (ends_with_sigbus, "before; SIGBUS"),
        (raises, "defect in the probe: RuntimeError('no errno')"),
        (leaves, ""),
        (hangs, "hangs"),
    ],
    ids=["text", "number", "nothing", "errno", "signal", "defect", "exit", "hang"],
)
def test_whatever_a_probe_does_is_an_outcome(probe: object, expected: str) -> None:
    patience = 0.2 if probe is hangs else 10
    assert outcome(Memfd(), row(probe), patience) == expected


def test_an_older_kernel_is_not_asked() -> None:
    future = Row("made up", ends_with_sigbus, (), Start.HOLES, {}, "here", since=(99, 0))
    assert outcome(Memfd(), future) == "skipped: Linux 99.0"


def test_a_defect_in_a_probe_is_no_expected_outcome() -> None:
    assert not [name for name, found in outcomes("memfd").items() if "defect" in found]
