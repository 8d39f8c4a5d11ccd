# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals for a supervisor are its program's, and end the supervisor only if nothing else helps."""

from __future__ import annotations

import contextlib
import logging
import select
import signal
from collections.abc import Iterator
from subprocess import Popen
from typing import cast

import pytest

from kvmsim.exec.requests import OF_THE_GROUP, PASSED_ON, Requests

LONG = 1000.0


class Left(Exception):
    """What the handler raises."""


class Program:
    """Ends, and hears, as the test says."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.heard: list[int] = []

    def poll(self) -> int | None:
        return self.status

    def send_signal(self, number: int) -> None:
        assert self.status is None
        self.heard.append(number)


@pytest.fixture(autouse=True)
def leaving() -> Iterator[None]:
    def leave(number: int, frame: object) -> None:
        raise Left(number)

    before = {number: signal.signal(number, leave) for number in (*PASSED_ON, *OF_THE_GROUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def program() -> Program:
    return Program()


@contextlib.contextmanager
def made(program: Program, patience: float = LONG, one_wish: float = LONG) -> Iterator[Requests]:
    with Requests(patience, one_wish) as requests:
        requests.pass_to(cast("Popen[bytes]", program))
        yield requests


def told(requests: Requests) -> bool:
    assert select.select([requests.fd], [], [], 10)[0]
    return requests.hear()


@pytest.mark.parametrize("number", PASSED_ON)
def test_a_signal_is_passed_on(number: signal.Signals, program: Program) -> None:
    with made(program) as requests:
        assert not requests.hear()
        signal.raise_signal(number)
        assert not told(requests)
        assert program.heard == [number]


def test_what_came_before_the_program_waits_for_it(program: Program) -> None:
    with Requests() as requests:
        signal.raise_signal(signal.SIGTERM)
        requests.pass_to(cast("Popen[bytes]", program))
        assert not told(requests)
        assert program.heard == [signal.SIGTERM]


def test_a_group_that_is_asked_to_end_is_asked_once(program: Program) -> None:
    with made(program) as requests:
        for _ in range(2):  # as timeout(1) does
            signal.raise_signal(signal.SIGTERM)
            assert not told(requests)
        assert program.heard == [signal.SIGTERM]


def test_who_asks_again_means_it(program: Program, caplog: pytest.LogCaptureFixture) -> None:
    with made(program, one_wish=0) as requests:
        signal.raise_signal(signal.SIGTERM)
        assert not told(requests)
        with caplog.at_level(logging.CRITICAL, "kvmsim.exec.requests"):
            signal.raise_signal(signal.SIGTERM)
            assert told(requests)
        assert requests.over


def test_patience_ends(program: Program, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.CRITICAL, "kvmsim.exec.requests"),
        made(program, patience=0.01) as requests,
    ):
        signal.raise_signal(signal.SIGTERM)
        while not told(requests):
            pass
        assert program.heard == [signal.SIGTERM]


def test_other_signals_mean_what_the_program_says(program: Program) -> None:
    with made(program, patience=0, one_wish=0) as requests:
        for _ in range(2):
            for number in (signal.SIGHUP, signal.SIGUSR1):
                signal.raise_signal(number)
                assert not told(requests)
        assert program.heard == [signal.SIGHUP, signal.SIGUSR1] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_the_program_left_behind_is_not_waited_for_for_ever(
    number: signal.Signals, program: Program, caplog: pytest.LogCaptureFixture
) -> None:
    program.status = 0
    with caplog.at_level(logging.CRITICAL, "kvmsim.exec.requests"):
        with made(program, patience=0.01) as requests:
            signal.raise_signal(number)
            while not told(requests):
                pass
        assert program.heard == []


@pytest.mark.parametrize("number", OF_THE_GROUP)
def test_those_of_the_terminal_do_nothing_here(number: signal.Signals, program: Program) -> None:
    with made(program):
        signal.raise_signal(number)
    assert program.heard == []
    with pytest.raises(Left):
        signal.raise_signal(number)


def test_what_was_ignored_stays_so(program: Program) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with made(program) as requests:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGUSR1)
        assert not told(requests)
        assert program.heard == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("number", PASSED_ON)
def test_afterwards_signals_are_heard_as_before(number: signal.Signals, program: Program) -> None:
    with made(program):
        pass
    with pytest.raises(Left):
        signal.raise_signal(number)
