# SPDX-License-Identifier: GPL-2.0-or-later
"""Users that do not acknowledge, one rung after the other, and whom that concerns."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest
from actors import Actor, Cast, until
from mounts import Mounted, Mounter

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

PAGE = 4096
PAGES = 64
FOR_EVER = "t_ack=0"
LONG = "t_ack=300"
SHORT = "t_ack=0.5"
#: Where fsync(2) sleeps on the lock of an inode; which one depends on the compiler of the kernel.
LOCK = {"fuse_fsync", "rwsem_down_write_slowpath"}
KILLING = r"killing (\S+)\(\d+\): no acknowledgement"


def private_file(mounted: Mounted, name: str = "ram") -> Path:
    path = mounted.path / name
    path.touch()
    os.truncate(path, PAGES * PAGE)
    return path


def allocated(mounted: Mounted, name: str = "ram") -> int:
    """Allocated pages of a file."""
    return int(mounted.stat(name)["allocated"]) // PAGE


def user(actor: Cast, path: Path, mode: str, name: str = "") -> Actor:
    """A user that has page 0."""
    made = actor("light_user", path, mode, name or mode)
    made.expect("ready")
    return made


def puncher(actor: Cast, path: Path, start: int = 0, end: int = 1, count: int = 1) -> Actor:
    """A process that punches one page of [start, end) at a time."""
    made = actor("storm", path, str(start), str(end), str(count), "0")
    made.expect("ready")
    return made


def waits(one: Actor) -> set[str]:
    """Where in the kernel the threads of an actor sleep."""
    return {path.read_text() for path in Path(f"/proc/{one.pid}/task").glob("*/wchan")}


def pass_time(seconds: float) -> None:
    """Let time pass, which is all that the ladder looks at."""
    began = time.monotonic()
    until(lambda: time.monotonic() - began > seconds, "some time")


def test_a_hung_user_is_killed_and_the_punch_succeeds(mount: Mounter, actor: Cast) -> None:
    mounted = mount(SHORT, expected_log=KILLING)
    path = private_file(mounted)
    hung = user(actor, path, "hang")
    puncher(actor, path).expect("done 1 0")
    assert hung.wait() == -signal.SIGKILL
    assert allocated(mounted) == 0
    assert f"killing hang({hung.pid})" in mounted.log()
    status = mounted.ask("status")
    assert (status["kills"], status["failures"], status["sessions"]) == (1, 0, [])
    mounted.audit()


def test_a_stopped_user_gets_more_time(mount: Mounter, actor: Cast) -> None:
    mounted = mount(SHORT)
    path = private_file(mounted)
    stopped = user(actor, path, "ack")
    stopped.stop()
    caller = puncher(actor, path)
    until(lambda: mounted.ask("status")["sessions"][0]["unacknowledged"] == 1, "invalidation")
    pass_time(1)  # twice t_ack
    assert mounted.stat("ram")["operations"], "the punch must wait"
    stopped.signal(signal.SIGCONT)
    caller.expect("done 1 0")
    assert mounted.ask("status")["kills"] == 0


def stand_still(mounted: Mounted, seconds: float) -> None:
    """Stop the mount for a while, as a suspended machine or a frozen container would.

    Its first rung is behind it by then, as each begins when the one before has come.
    """
    pass_time(0.3)
    mounted.process.send_signal(signal.SIGSTOP)
    pass_time(seconds)
    mounted.process.send_signal(signal.SIGCONT)


def test_who_answered_while_the_mount_stood_still_has_answered(mount: Mounter, actor: Cast) -> None:
    mounted = mount(SHORT)
    path = private_file(mounted)
    held = user(actor, path, "held")
    caller = puncher(actor, path)
    held.expect("zap 0 1")
    pass_time(0.3)
    mounted.process.send_signal(signal.SIGSTOP)
    held.send("ack")
    pass_time(1.5)
    mounted.process.send_signal(signal.SIGCONT)
    caller.expect("done 1 0")
    assert mounted.ask("status")["kills"] == 0


def test_time_in_which_the_mount_stood_still_is_nobodys(mount: Mounter, actor: Cast) -> None:
    """What stopped it may have stopped its users as well."""
    mounted = mount("t_ack=2")
    path = private_file(mounted)
    held = user(actor, path, "held")
    caller = puncher(actor, path)
    held.expect("zap 0 1")
    stand_still(mounted, 3)
    assert mounted.stat("ram")["operations"], "it has all of its time left"
    held.send("ack")
    caller.expect("done 1 0")
    assert mounted.ask("status")["kills"] == 0


@pytest.mark.parametrize("t_ack", ["0.3", "0.05"])
def test_but_not_for_ever(mount: Mounter, actor: Cast, t_ack: str) -> None:
    mounted = mount(f"t_ack={t_ack}", expected_log=KILLING)
    path = private_file(mounted)
    stopped = user(actor, path, "ack")
    stopped.stop()
    puncher(actor, path).expect("done 1 0")
    assert stopped.wait() == -signal.SIGKILL


def test_the_end_of_a_socket_is_no_acknowledgement(mount: Mounter, actor: Cast) -> None:
    mounted = mount(FOR_EVER)
    path = private_file(mounted)
    silent = user(actor, path, "ack")
    silent.send("drop")
    silent.expect("lost")
    until(lambda: mounted.ask("status")["sessions"][0]["state"] == "zombie", "end of file")
    caller = puncher(actor, path)
    until(lambda: bool(mounted.stat("ram")["operations"]), "invalidation")
    assert allocated(mounted) == 1
    assert caller.process.poll() is None
    silent.kill()
    caller.expect("done 1 0")
    assert allocated(mounted) == 0


def test_a_process_that_has_closed_its_socket_is_killed(mount: Mounter, actor: Cast) -> None:
    mounted = mount(SHORT, expected_log=KILLING)
    path = private_file(mounted)
    silent = user(actor, path, "ack")
    silent.send("drop")
    silent.expect("lost")
    puncher(actor, path).expect("done 1 0")
    assert silent.wait() == -signal.SIGKILL


def test_a_fault_of_a_late_user_waits_for_the_invalidation(mount: Mounter, actor: Cast) -> None:
    mounted = mount(LONG)
    path = private_file(mounted)
    first = user(actor, path, "held", "first")
    caller = puncher(actor, path)
    first.expect("zap 0 1 PUNCH")
    late = actor("light_user", path, "ack", "late")
    until(lambda: len(mounted.stat("ram")["users"]) == 2, "registration")
    other = user(actor, private_file(mounted, "other"), "ack")  # whose fault was asked later
    assert "granted" not in late.text
    first.send("ack")
    caller.expect("done 1 0")
    late.expect("granted 0 1")
    late.expect("ready")
    assert "zap" not in late.text + other.text


def test_a_hung_user_takes_nothing_from_a_healthy_one(mount: Mounter, actor: Cast) -> None:
    mounted = mount(LONG)
    path = private_file(mounted)
    healthy = user(actor, path, "ack", "healthy")
    hung = user(actor, path, "hang")
    caller = puncher(actor, path)
    healthy.expect("zap 0 1")
    hung.expect("zap 0 1")
    healthy.ask("get 7", "granted 7 8")
    healthy.ask("get 0", "")  # waits for the punch
    healthy.ask("get 8", "granted 8 9")
    hung.kill()
    caller.expect("done 1 0")
    healthy.expect("granted 0 1")


def test_a_slow_user_does_not_delay_another_file(mount: Mounter, actor: Cast) -> None:
    mounted = mount(LONG)
    slow = user(actor, private_file(mounted, "a"), "held")
    quick = user(actor, private_file(mounted, "b"), "ack")
    caller = puncher(actor, mounted.path / "a")
    slow.expect("zap 0 1")
    for _ in range(3):
        puncher(actor, mounted.path / "b").expect("done 1 0")
        quick.expect("zap 0 1")
        quick.ask("get 0", "granted 0 1")
    assert caller.process.poll() is None
    slow.send("ack")
    caller.expect("done 1 0")


def test_without_a_ladder_a_caller_waits_but_can_be_killed(mount: Mounter, actor: Cast) -> None:
    mounted = mount(FOR_EVER)
    path = private_file(mounted)
    held = user(actor, path, "held")
    caller = puncher(actor, path)
    held.expect("zap 0 1")
    caller.signal(signal.SIGUSR1)  # waits for the end of the punch, as with the kernel's own
    mounted.ask("status")
    assert mounted.stat("ram")["operations"]
    assert "signalled" not in caller.text
    caller.kill()
    held.send("ack")
    until(lambda: not mounted.stat("ram")["operations"], "end of the zap")
    assert allocated(mounted) == 1, "nobody was answered, so nothing is freed"
    next_one = puncher(actor, path)
    held.expect("zap 0 1")
    held.send("ack")
    next_one.expect("done 1 0")
    assert allocated(mounted) == 0


@pytest.mark.parametrize("waits_for_itself", [True, False])
def test_a_condemned_caller_gets_an_error_and_dies(
    mount: Mounter, actor: Cast, waits_for_itself: bool
) -> None:
    """It sits in a call on our mount and could not die before that is answered."""
    mounted = mount(SHORT, expected_log=KILLING)
    path, other = private_file(mounted), private_file(mounted, "other")
    hung = user(actor, path, "hang")
    if waits_for_itself:
        hung.send(f"fallocate {path} 0 1")
    else:
        held = user(actor, other, "ack")
        held.stop()  # has more time than the one that hangs
        hung.send(f"fallocate {other} 0 1")
        until(lambda: bool(mounted.stat("other")["operations"]), "its call")
        puncher(actor, path).expect("done 1 0")
        held.signal(signal.SIGCONT)
    assert hung.wait() == -signal.SIGKILL
    puncher(actor, path).expect("done 1 0")
    puncher(actor, other).expect("done 1 0")
    assert allocated(mounted) == allocated(mounted, "other") == 0
    mounted.audit()


def test_a_caller_behind_another_one_cannot_die_before_it(mount: Mounter, actor: Cast) -> None:
    """It sleeps on the lock of the inode that fuse_file_fallocate() holds, and so is harmless."""
    mounted = mount(SHORT, expected_log=KILLING)
    path = private_file(mounted)
    hung = user(actor, path, "hang")
    caller = puncher(actor, path)
    hung.expect("zap 0 1")
    hung.send(f"fallocate {path} 0 1")
    caller.expect("done 1 0")
    assert hung.wait() == -signal.SIGKILL
    assert allocated(mounted) == 0
    status = mounted.ask("status")
    assert (status["kills"], status["failures"], status["sessions"]) == (1, 0, [])
    mounted.audit()


def test_without_a_proof_nothing_is_freed(mount: Mounter, actor: Cast, tmp_path: Path) -> None:
    """SIGKILL does not end a process that sleeps in another, frozen file system.

    What is left of fsync(2) would do no harm; but that is not among what is known to do none.
    """
    frozen = mount(LONG)
    mounted = mount(SHORT, expected_log=rf"{KILLING}|no proof that hang\(\d+\) cannot reach")
    path = private_file(mounted)
    holder = user(actor, private_file(frozen), "held")
    hung = user(actor, path, "hang")
    healthy = user(actor, path, "ack")
    ahead = puncher(actor, frozen.path / "ram")  # has the lock of the inode
    holder.expect("zap 0 1")
    hung.send(f"fsync {frozen.path / 'ram'}")
    until(lambda: bool(LOCK & waits(hung)), "its call waits for that")
    frozen.process.send_signal(signal.SIGSTOP)
    try:
        caller = puncher(actor, path)
        caller.expect(f"errno {errno.EIO}$")
        caller.expect("done 1 1")
        assert allocated(mounted) == 1
        assert "nothing was freed" in mounted.log()
        healthy.ask("get 0", "granted 0 1")
        assert hung.process.poll() is None
    finally:
        frozen.process.send_signal(signal.SIGCONT)
        holder.send("ack")
    ahead.expect("done 1 0")
    assert hung.wait() == -signal.SIGKILL
    puncher(actor, path).expect("done 1 0")
    assert allocated(mounted) == 0
    mounted.audit()
