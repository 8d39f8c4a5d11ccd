# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose memory a private file is, among the VMs of one host."""

from __future__ import annotations

import errno

import pytest

from kvmsim.bindings import Bindings, taken
from privfs.notifier.lane import LinkError

FILE, OTHER = ("/mount/.privfs/socket", 7), ("/mount/.privfs/socket", 8)


class View:
    """What the owner says of a file; nothing if it does not answer."""

    def __init__(self, exclusive: str | None = None, *users: str, answers: bool = True) -> None:
        self._exclusive, self._users, self._answers = exclusive, users, answers

    def exclusive(self, ino: int) -> str | None:
        if not self._answers:
            raise LinkError(errno.ETIMEDOUT, "no answer")
        return self._exclusive

    def users(self, ino: int) -> tuple[str, ...]:
        return self._users


@pytest.mark.parametrize(
    ("view", "why"),
    [
        (View("td(1)", "td(1)"), "the memory of a confidential VM, td(1), and of no other VM; "
         "use another file, or end td(1)"),
        (View(None, "a(1)", "b(2)"), "memory of a(1), b(2), and a confidential VM shares its file "
         "with nobody; use another file, or end a(1), b(2)"),
        (View(answers=False), "memory of another process, and a confidential VM shares its file "
         "with nobody; use another file, or end that"),
    ],
)  # fmt: skip
def test_a_refusal_by_the_owner_names_who_has_the_file(view: View, why: str) -> None:
    error = taken("/mount/ram", view, 7)  # type: ignore[arg-type]
    assert (error.errno, error.strerror) == (errno.EINVAL, f"/mount/ram is {why}")


def refused(bindings: Bindings, vm: object, *, exclusive: bool) -> None:
    with pytest.raises(LinkError) as caught:
        bindings.take(FILE, vm, exclusive=exclusive)
    assert caught.value.errno == errno.EINVAL


def test_ordinary_vms_share_a_file() -> None:
    bindings = Bindings()
    for vm in ("one", "two", "one"):
        bindings.take(FILE, vm, exclusive=False)


def test_a_confidential_vm_shares_none_whoever_comes_first() -> None:
    bindings = Bindings()
    bindings.take(FILE, "td", exclusive=True)
    bindings.take(FILE, "td", exclusive=True)
    refused(bindings, "other", exclusive=False)
    refused(bindings, "other td", exclusive=True)
    bindings.take(OTHER, "other", exclusive=False)
    bindings.drop("td", FILE)
    bindings.take(FILE, "other", exclusive=False)
    refused(bindings, "td", exclusive=True)


def test_a_refusal_leaves_no_trace_and_a_vm_that_ends_has_none() -> None:
    bindings = Bindings()
    bindings.take(FILE, "one", exclusive=False)
    refused(bindings, "td", exclusive=True)
    bindings.drop("one")
    bindings.take(FILE, "td", exclusive=True)
    bindings.drop("td")
    bindings.drop("td")
    bindings.take(FILE, "two", exclusive=False)
