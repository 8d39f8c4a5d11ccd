# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes that die in the middle of it: what is left is right, and nobody hangs."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
from pathlib import Path

import pytest
from actors import Actor, Cast, until
from mounts import Mounted, Mounter, mount_points

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

PAGE = 4096
RAM = 16 << 20
LOW = 2 << 20  # guest RAM begins above the shared low memory
FIRST, END = 2048, 2112  # pages of the file that are punched, behind the guest kernel
GPA = LOW + FIRST * PAGE
GONE = (errno.ECONNABORTED, errno.ENOTCONN)


def private_file(mounted: Mounted, name: str = "ram") -> Path:
    path = mounted.path / name
    path.touch()
    os.truncate(path, RAM)
    return path


def boot(actor: Cast, vm_kernel: Path, *paths: Path, label: str = "vm0") -> Actor:
    """A VM whose vCPUs stamp the pages that will be punched."""
    vm = actor("vm_process", vm_kernel, label, *paths)
    vm.expect(r"^> ")
    for vcpu in range(2):
        assert vm.ask(f"spin {vcpu} {GPA:#x} {END - FIRST}").startswith("ok")
    return vm


def storm(actor: Cast, path: Path, count: int, seed: int = 0) -> Actor:
    made = actor("storm", path, str(FIRST), str(END), str(count), str(seed))
    made.expect("ready")
    return made


def no_sleepers(*actors: Actor) -> None:
    """Assert that no thread is in uninterruptible sleep for longer than a moment."""
    until(lambda: all("D" not in one.states() for one in actors), "no thread in state D")


def settled(mounted: Mounted) -> None:
    """Assert that bitmaps, memory and budget agree and that no user is left."""
    until(lambda: mounted.ask("status")["sessions"] == [], "all sessions gone")
    mounted.audit()
    memory = mounted.ask("status")["memory"]
    assert memory["used"] == memory["private"]


@pytest.mark.parametrize("seed", range(3))
def test_a_vm_killed_in_a_storm(mount: Mounter, actor: Cast, vm_kernel: Path, seed: int) -> None:
    mounted = mount()
    path = private_file(mounted)
    vm = boot(actor, vm_kernel, path)
    dice = random.Random(seed)
    punches = storm(actor, path, 600, seed)
    punches.expect(f"punched {20 * dice.randrange(1, 16)}$")
    vm.kill()
    punches.expect("done 600 0")
    no_sleepers(punches)
    settled(mounted)
    assert mounted.ask("status")["kills"] == 0
    again = boot(actor, vm_kernel, path, label="again")
    assert again.ask("stop").startswith("ok")
    assert again.ask(f"test {GPA:#x} 16").startswith("ok")
    storm(actor, path, 40).expect("done 40 0")
    again.send("halt 0")
    again.expect("vm ended 0")
    settled(mounted)


def test_the_mount_killed_in_a_storm(mount: Mounter, actor: Cast, vm_kernel: Path) -> None:
    mounted = mount()
    path = private_file(mounted)
    vm = boot(actor, vm_kernel, path)
    punches = storm(actor, path, 1_000_000)
    punches.expect("punched 40$")
    mounted.kill()
    code = int(punches.expect(r"errno (\d+)").group(1))
    assert code in GONE
    punches.expect(r"done \d+ 1$")
    vm.expect("vm ended 1 machine check: the owner of private memory is gone")
    assert vm.wait() == 1
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        path.stat()
    assert mounted.is_mounted()
    again = mount(at=mounted.path, expected_log="killed|dead|stale")
    assert re.search("killed|dead|stale", again.log()), "the next mount says what it cleared"
    assert mount_points().count(os.fspath(again.path)) == 1
    path = private_file(again)
    boot(actor, vm_kernel, path).send("halt 0")
    settled(again)


@pytest.mark.parametrize("mode", ["held", "hang"])
def test_a_killed_caller_leaves_at_once(mount: Mounter, actor: Cast, mode: str) -> None:
    """The zap that it began ends without it and frees nothing."""
    mounted = mount("t_ack=300")
    path = private_file(mounted)
    user = actor("light_user", path, mode)
    user.expect("ready")
    before = mounted.stat("ram")["allocated"]
    assert before == PAGE
    caller = actor("storm", path, "0", "1", "1", "0")
    user.expect("zap 0 1")
    caller.kill()
    assert mounted.stat("ram")["operations"], "the invalidation goes on"
    if mode == "held":
        user.send("ack")
    else:
        user.kill()
    until(lambda: not mounted.stat("ram")["operations"], "end of the zap")
    assert mounted.stat("ram")["allocated"] == before, "nothing was freed"
    mounted.audit()
    following = actor("storm", path, "0", "1", "1", "0")
    if mode == "held":
        user.expect("zap 0 1")
        user.send("ack")
    following.expect("done 1 0")
    assert mounted.stat("ram")["allocated"] == 0
    mounted.audit()


@pytest.mark.parametrize("seed", range(3))
def test_callers_killed_in_a_storm(mount: Mounter, actor: Cast, vm_kernel: Path, seed: int) -> None:
    mounted = mount()
    path = private_file(mounted)
    vm = boot(actor, vm_kernel, path)
    dice = random.Random(seed)
    for _ in range(5):
        caller = storm(actor, path, 1_000_000, seed)
        caller.expect(f"punched {20 * dice.randrange(1, 4)}$")
        caller.kill()
    no_sleepers(vm)
    until(lambda: not mounted.stat("ram")["operations"], "end of all calls")
    assert vm.ask("stop").startswith("ok")
    mounted.audit()
    storm(actor, path, 40).expect("done 40 0")
    vm.send("halt 0")
    vm.expect("vm ended 0")
    settled(mounted)


@pytest.mark.parametrize("stormy", [False, True])
def test_the_mount_ends_in_order_under_a_vm(
    mount: Mounter, actor: Cast, vm_kernel: Path, stormy: bool
) -> None:
    mounted = mount()
    path = private_file(mounted)
    vm = boot(actor, vm_kernel, path)
    punches = None
    if stormy:
        punches = storm(actor, path, 1_000_000)
        punches.expect("punched 40$")
    mounted.end()
    assert not mounted.is_mounted()
    assert os.listdir(mounted.path) == []
    vm.expect("vm ended 1 machine check")
    assert vm.wait() == 1
    if punches is not None:
        punches.expect(r"done \d+ \d+")
        assert punches.wait() == 0


def test_an_interrupt_names_the_users_first(mount: Mounter, actor: Cast, vm_kernel: Path) -> None:
    warning = r"in use by vm0\((\d+)\); interrupt again"
    mounted = mount(expected_log=warning)
    vm = boot(actor, vm_kernel, private_file(mounted))
    mounted.process.send_signal(signal.SIGINT)
    until(lambda: bool(re.search(warning, mounted.log())), "the warning")
    assert f"in use by vm0({vm.pid})" in mounted.log()
    assert vm.ask("stop").startswith("ok"), "nothing was taken away yet"
    mounted.process.send_signal(signal.SIGINT)
    vm.expect("vm ended 1 machine check")
    assert mounted.process.wait(60) == 0
    assert not mounted.is_mounted()
