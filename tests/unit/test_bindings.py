# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose memory a private file is, among the VMs of one host."""

from __future__ import annotations

import errno

import pytest

from kvmsim.bindings import Bindings
from privfs.notifier.lane import LinkError

FILE, OTHER = ("/mount/.privfs/socket", 7), ("/mount/.privfs/socket", 8)


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
