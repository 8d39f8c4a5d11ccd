# SPDX-License-Identifier: GPL-2.0-or-later
"""Who was ever given an extent: whom a touch of freed memory can be blamed on."""

from __future__ import annotations

from privfs.notifier.holders import Holders, Ledger

ONE, OTHER = (5, 1), (5, 2)


def test_who_was_given_it_holds_it_until_proven_dead() -> None:
    ledger = Ledger()
    assert ledger.of(ONE).nobody
    ledger.given(ONE, 1)
    ledger.given(ONE, 1)
    ledger.given(ONE, 2)
    ledger.given(OTHER, 2)
    assert ledger.of(ONE) == Holders(frozenset({1, 2}), dead=False, left=False)
    ledger.ended(1, dead=True)
    assert ledger.of(ONE) == Holders(frozenset({2}), dead=True, left=False)
    assert ledger.of(OTHER) == Holders(frozenset({2}), dead=False, left=False)
    ledger.ended(2, dead=True)
    assert ledger.of(ONE).nobody


def test_a_goodbye_proves_nothing() -> None:
    ledger = Ledger()
    ledger.given(ONE, 1)
    ledger.ended(1, dead=False)
    assert not ledger.of(ONE).nobody
    ledger.buried(ONE)
    assert ledger.of(ONE).nobody


def test_a_copy_is_independent() -> None:
    ledger = Ledger()
    ledger.given(ONE, 1)
    twin = ledger.copy()
    twin.given(ONE, 2)
    ledger.buried(ONE)
    assert twin.of(ONE).alive == {1, 2}
    assert ledger.of(ONE).nobody
