# SPDX-License-Identifier: GPL-2.0-or-later
"""Every row on every target; a failure names both.  The kernel's own files are in tests/kvm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conformance.runs import outcome, outcomes

from privfs.testing.conformance import REFERENCE, ROWS, SKIPPED, apart, model

#: Whichever test comes first waits for all targets, on a busy machine for long.
pytestmark = [pytest.mark.usefixtures("ran"), pytest.mark.timeout(600)]

#: mount: by root, the kernel refuses; user: without privileges, the daemon does.
KINDS = ("mount", "user")
#: One test a row; the others are compared as a whole.
CLOSELY = ("guest_memfd",)


def expected(target: str) -> dict[str, str]:
    """Return row → outcome that a target must show."""
    kind, _, who = target.partition(":")
    mounted = apart.mounted(target)
    found: dict[str, str | None]
    if mounted is not None:
        found = {row.name: row.answer(who, mounted.mode) for row in ROWS}
    elif kind == "model":
        found = {row.name: model.expected(who, row) for row in ROWS}
    else:
        found = {row.name: row.want.get(target) for row in ROWS if not row.vast}
    return {name: answer for name, answer in found.items() if answer is not None}


def marked(target: str) -> list[pytest.MarkDecorator]:
    """Only root gets passthrough."""
    return [pytest.mark.root] if target.startswith("mount:") else []


def rows() -> Iterator[object]:
    for target in (f"{kind}:{who}" for who in CLOSELY for kind in KINDS):
        for name, answer in expected(target).items():
            yield pytest.param(target, name, answer, id=f"{target}-{name}", marks=marked(target))


@pytest.mark.fuse
@pytest.mark.parametrize(("target", "row", "answer"), [*rows()])
def test_a_mount_answers_as_its_personality(target: str, row: str, answer: str) -> None:
    assert outcome(target, row) == answer


def compared(target: str) -> None:
    """Compare all rows of a target; the rows that differ are named."""
    found, wanted = outcomes(target), expected(target)
    assert len(found) > 150
    assert set(found) == set(wanted)
    different = {
        name: f"{answer} instead of {wanted[name]}"
        for name, answer in found.items()
        if answer != wanted[name] and not answer.startswith(SKIPPED)
    }
    assert different == {}


@pytest.mark.fuse
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(f"{kind}:{who}", marks=marked(f"{kind}:"))
        for who in REFERENCE if who not in CLOSELY for kind in KINDS
    ],
)  # fmt: skip
def test_a_mount_answers_as_the_file_of_its_time(target: str) -> None:
    compared(target)


@pytest.mark.parametrize("target", [f"model:{who}" for who in REFERENCE])
def test_the_model_answers_as_its_personality(target: str) -> None:
    compared(target)


@pytest.mark.parametrize("target", ["memfd"])
def test_an_ordinary_memfd_shows_that_each_probe_can_succeed(target: str) -> None:
    compared(target)
