# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals to processes that allocate, punch and truncate: who is interrupted, and what stays.

The rules are those of ``kvm_gmem_allocate()`` (``signal_pending()`` ends it with EINTR, what it
made stays) and of ``shmem_fallocate()`` (a growth that does not succeed leaves nothing); no kernel
lets a signal end a punch or a truncate.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest
from actors import Actor, Cast, until
from mounts import Mounted, Mounter

from privfs.machine import Machine

pytest_plugins = ["actor_fixtures"]
pytestmark = pytest.mark.fuse

MIB = 1 << 20
#: What a signal hits: about half a second of work.
LONG = 2048 * MIB
ROOM = "size=2304M"
KEEP_SIZE, PUNCH, ZERO_RANGE = 1, 3, 16
#: How often a signal may come too late before a test gives up.
TRIES = 5


@pytest.fixture(autouse=True)
def _memory() -> None:
    if Machine().room(0) * 4096 < LONG + 256 * MIB:
        pytest.skip(f"needs {(LONG >> 20) + 256} MiB of memory")


def caller(actor: Cast, path: Path, disposition: str = "handle") -> Actor:
    made = actor("../fuse/caller", path, disposition)
    made.expect("ready")
    return made


def under_way(mounted: Mounted, step: str, name: str = "f") -> None:
    """Wait until a file is at a step of an operation."""
    until(
        lambda: [o["step"] for o in mounted.stat(name)["operations"]] == [step],
        f"{step} of {name}",
    )


def interrupted(
    mounted: Mounted, who: Actor, call: str, reset: str, number: signal.Signals = signal.SIGUSR1
) -> None:
    """Make a long allocation until a signal has hit it."""
    for _ in range(TRIES):
        who.send(call)
        who.expect("calling")
        try:
            until(lambda: bool(mounted.stat("f")["operations"]), "allocation", timeout=2)
        except AssertionError:
            pass  # it was faster than we
        who.signal(number)
        if who.expect(r"returned (\d+) after (\d+)").group(1) == str(errno.EINTR):
            return
        who.ask(reset, r"returned 0 .*")
    raise AssertionError("no signal hit the allocation")


def state(mounted: Mounted) -> tuple[int, int]:
    """Return size and memory of the file, which all counts agree about."""
    counts = mounted.stat("f")
    status = os.stat(mounted.path / "f")
    place = os.statvfs(mounted.path)
    used = (place.f_blocks - place.f_bfree) * place.f_frsize
    assert counts["held"] == counts["allocated"] == status.st_blocks * 512 == used
    assert counts["size"] == status.st_size
    mounted.audit()
    return status.st_size, used


# --- allocations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("personality", "mode"),
    [("guest_memfd", KEEP_SIZE), ("resizable", KEEP_SIZE), ("resizable", 0), ("v7", KEEP_SIZE)],
)
def test_an_interrupted_allocation_keeps_what_it_made(
    mount: Mounter, actor: Cast, personality: str, mode: int
) -> None:
    mounted = mount(ROOM, f"personality={personality}")
    who = caller(actor, mounted.path / "f")
    who.ask(f"truncate {LONG}", "returned 0")
    call = f"fallocate {mode} 0 {LONG}"
    interrupted(mounted, who, call, f"fallocate {PUNCH} 0 {LONG}")
    size, held = state(mounted)
    assert size == LONG
    assert 0 < held < LONG
    who.ask(call, "returned 0 after 1")  # goes on where it was: no page is made twice
    assert state(mounted) == (LONG, LONG)
    who.ask(call, "returned 0 after 1")
    assert state(mounted) == (LONG, LONG)


@pytest.mark.parametrize("personality", ["resizable", "shim", "v7"])
def test_an_interrupted_growth_leaves_size_and_memory(
    mount: Mounter, actor: Cast, personality: str
) -> None:
    mounted = mount(ROOM, f"personality={personality}")
    who = caller(actor, mounted.path / "f")
    if personality == "resizable":  # the others grow from nothing, once
        who.ask(f"fallocate 0 0 {8 * MIB}", "returned 0")
        before = (8 * MIB, 8 * MIB)
    else:  # but may hold memory past their end
        who.ask(f"fallocate {KEEP_SIZE} {MIB} {MIB}", "returned 0")
        before = (0, MIB)
    call = f"fallocate 0 {before[0]} {LONG}"
    interrupted(mounted, who, call, f"truncate {before[0]}")
    assert state(mounted) == before
    who.ask(call, "returned 0 after 1")
    assert state(mounted) == (before[0] + LONG, before[0] + LONG)  # in all, what it held too


@pytest.mark.parametrize("disposition", ["ignore", "block"])
def test_a_signal_that_is_not_delivered_interrupts_nothing(
    mount: Mounter, actor: Cast, disposition: str
) -> None:
    mounted = mount(ROOM)
    who = caller(actor, mounted.path / "f", disposition)
    who.send(f"fallocate 0 0 {LONG}")
    who.expect("calling")
    while "returned" not in who.text:
        who.signal(signal.SIGUSR1)
        who.signal(signal.SIGCHLD)  # ignored by default
        time.sleep(0.01)
    who.expect("returned 0 after 0")
    assert state(mounted) == (LONG, LONG)


def test_a_stopped_caller_is_interrupted_too(mount: Mounter, actor: Cast) -> None:
    """SIGSTOP sets TIF_SIGPENDING: kvm_gmem_allocate() answers EINTR after SIGCONT as well."""
    mounted = mount(ROOM, "personality=guest_memfd")
    who = caller(actor, mounted.path / "f")
    who.ask(f"truncate {LONG}", "returned 0")
    call = f"fallocate {KEEP_SIZE} 0 {LONG}"
    who.send(call)
    under_way(mounted, "allocate")
    who.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, who.pid, os.WSTOPPED)
    until(lambda: not mounted.stat("f")["operations"], "end of the allocation")
    size, held = state(mounted)
    who.signal(signal.SIGCONT)
    answer = who.expect(r"returned (\d+) after 0").group(1)
    assert answer == (str(errno.EINTR) if held < LONG else "0")
    who.ask(call, "returned 0 after 0")
    assert state(mounted) == (size, LONG)


def test_a_storm_of_signals_does_not_keep_an_allocation_from_ending(
    mount: Mounter, actor: Cast
) -> None:
    """Each try makes at least one chunk, so a caller that repeats gets there."""
    mounted = mount(ROOM)
    who = caller(actor, mounted.path / "f")
    length = 1024 * MIB
    who.ask(f"truncate {length}", "returned 0")
    tries = 0
    answer = str(errno.EINTR)
    while answer == str(errno.EINTR):
        before = len(who.text)
        who.send(f"fallocate 0 0 {length}")
        who.expect("calling")
        while "returned" not in who.text[before:]:
            who.signal(signal.SIGUSR1)
            time.sleep(0.005)
        answer = who.expect(r"returned (\d+) after").group(1)
        tries += 1
        assert tries <= length // (64 * MIB)
    assert answer == "0"
    assert state(mounted) == (length, length)


# --- killed callers ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("personality", ["resizable", "guest_memfd"])
def test_a_killed_caller_leaves_a_long_allocation(
    mount: Mounter, actor: Cast, personality: str, number: signal.Signals
) -> None:
    mounted = mount(ROOM, f"personality={personality}")
    mode = 0 if personality == "resizable" else KEEP_SIZE
    who = caller(actor, mounted.path / "f", "default")
    if mode:
        who.ask(f"truncate {LONG}", "returned 0")
    who.send(f"fallocate {mode} 0 {LONG}")
    under_way(mounted, "allocate")
    who.signal(number)
    assert who.wait() == -number
    until(lambda: not mounted.stat("f")["operations"], "end of the allocation")
    size, held = state(mounted)
    if "returned" not in who.text.partition("calling")[2]:
        # Too late for the signal to hit, it is whole; else it was undone, or kept in part.
        assert size == (LONG if mode or held else 0)
        assert held == LONG or (held > 0 if mode else held == 0)
    other = caller(actor, mounted.path / "f")
    other.ask(f"fallocate {mode} 0 {LONG}", "returned 0")
    assert state(mounted) == (LONG, LONG)


@pytest.mark.parametrize(
    "call", [f"fallocate {PUNCH} 0 {MIB}", "truncate 0", f"fallocate {ZERO_RANGE} 0 {MIB}"]
)
def test_a_killed_caller_leaves_a_wait_for_a_user_and_frees_nothing(
    mount: Mounter, actor: Cast, call: str
) -> None:
    mounted = mount("t_ack=0")
    who = caller(actor, mounted.path / "f")
    who.ask(f"fallocate 0 0 {MIB}", "returned 0")
    user = actor("light_user", mounted.path / "f", "held", "held")
    user.expect("ready")
    who.send(call)
    user.expect("zap 0")
    who.signal(signal.SIGKILL)
    assert who.wait(5) == -signal.SIGKILL  # before the user has answered
    assert mounted.stat("f")["operations"], "the zap goes on"
    user.send("ack")
    until(lambda: not mounted.stat("f")["operations"], "end of the zap")
    assert state(mounted) == (MIB, MIB)
    other = caller(actor, mounted.path / "f")
    other.send(f"fallocate {PUNCH} 0 {MIB}")
    user.expect("zap 0 256") if "truncate" not in call else None
    user.send("ack")
    other.expect("returned 0")
    assert state(mounted) == (MIB, 0)


# --- what takes memory away ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "after"),
    [
        (f"fallocate {PUNCH} 0 {MIB}", (2 * MIB, MIB)),
        (f"truncate {MIB}", (MIB, MIB)),
        (f"fallocate {ZERO_RANGE} 0 {MIB}", (2 * MIB, 2 * MIB)),
    ],
)
def test_what_takes_memory_away_ignores_signals(
    mount: Mounter, actor: Cast, call: str, after: tuple[int, int]
) -> None:
    mounted = mount("t_ack=0")
    who = caller(actor, mounted.path / "f")
    who.ask(f"fallocate 0 0 {2 * MIB}", "returned 0")
    user = actor("light_user", mounted.path / "f", "held", "held")
    user.expect("ready")
    who.send(call)
    user.expect("zap")
    who.signal(signal.SIGUSR1)
    who.signal(signal.SIGSTOP)
    mounted.ask("status")  # an interrupt has arrived by now, and must not end it
    under_way(mounted, "invalidate")
    assert "after 1" not in who.text
    who.signal(signal.SIGCONT)
    user.send("ack")
    who.expect("returned 0 after 1")
    assert state(mounted) == after


def test_a_long_punch_ignores_signals(mount: Mounter, actor: Cast) -> None:
    mounted = mount(ROOM)
    who = caller(actor, mounted.path / "f")
    who.ask(f"fallocate 0 0 {LONG}", "returned 0")
    who.send(f"fallocate {PUNCH} 0 {LONG}")
    who.expect("calling")
    while "returned" not in who.text[who.text.rindex("calling") :]:
        who.signal(signal.SIGUSR1)
        time.sleep(0.005)
    who.expect("returned 0 after")
    assert state(mounted) == (LONG, 0)
