# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals end a program, also where Python ignores the exception that they raise."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from privfs.leaving import unwind_on

DEMO = Path(__file__).parents[2] / "scripts" / "demo.d"

_UNWIND = """
import signal, threading
from privfs.leaving import unwind_on
unwind_on(signal.SIGTERM, signal.SIGHUP)
"""
_DEMO = """
import signal, sys, threading
sys.path.insert(0, {path!r})
from interrupts import Interrupted, Signals
signals = Signals()
signals.heed()
"""
_LOSE = """
class Finalized:
    def __del__(self):
        signal.raise_signal(signal.{name})
        for _ in range(1000):
            pass

Finalized()
print("lost", flush=True)
try:
    threading.Event().wait()
finally:
    print("unwound", flush=True)
"""


def end(begin: str, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", begin + _LOSE.format(name=name)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_in_a_finalizer_ends_the_program(name: str) -> None:
    done = end(_UNWIND, name)
    assert (done.stdout, done.stderr) == ("lost\nunwound\n", "")
    assert done.returncode == 128 + signal.Signals[name]


def test_so_does_ctrl_c() -> None:
    done = end(_UNWIND, "SIGINT")
    assert done.stdout == "lost\nunwound\n"
    assert done.stderr.endswith("KeyboardInterrupt\n")
    assert done.returncode == -signal.SIGINT


def test_other_exceptions_there_are_told_as_ever() -> None:
    script = "class F:\n    def __del__(self):\n        raise ValueError('of its own')\nF()\n"
    done = subprocess.run(
        [sys.executable, "-c", _UNWIND + script],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "ValueError: of its own" in done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_in_a_finalizer_ends_the_demonstration(name: str) -> None:
    done = end(_DEMO.format(path=str(DEMO)), name)
    assert done.stdout == "lost\nunwound\n"
    assert done.stderr.endswith(f"interrupts.Interrupted: {int(signal.Signals[name])}\n")


def test_what_was_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        put_back = unwind_on(signal.SIGTERM, signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        put_back()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
