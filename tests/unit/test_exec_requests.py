# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals that ask a supervisor to end wait for its convenience, and are not lost."""

from __future__ import annotations

import select
import signal
from collections.abc import Iterator

import pytest

from kvmsim.exec.requests import HELD, Requests


class Left(Exception):
    """What the handler raises."""


@pytest.fixture(autouse=True)
def leaving() -> Iterator[None]:
    def leave(number: int, frame: object) -> None:
        raise Left(number)

    before = {number: signal.signal(number, leave) for number in HELD}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HELD)
def test_a_signal_comes_when_the_work_is_done(number: signal.Signals) -> None:
    requests = Requests()
    with requests:
        assert not requests.hear()
    requests.__enter__()
    signal.raise_signal(number)
    assert select.select([requests.fd], [], [], 10)[0]
    assert requests.hear()
    with pytest.raises(Left, match=str(int(number))):
        requests.__exit__()


def test_a_signal_that_came_last_is_not_lost() -> None:
    requests = Requests()
    requests.__enter__()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Left):
        requests.__exit__()


def test_other_signals_end_nothing() -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with Requests() as requests:
            signal.raise_signal(signal.SIGUSR1)
            assert select.select([requests.fd], [], [], 10)[0]
            assert not requests.hear()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_afterwards_signals_are_heard_at_once() -> None:
    with Requests():
        pass
    with pytest.raises(Left):
        signal.raise_signal(signal.SIGTERM)
