# SPDX-License-Identifier: GPL-2.0-or-later
"""A confidential VM's file is that VM's alone, whatever process another VM is in."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from actors import Cast, until
from kvmsim_program import kvmsim
from mounts import Mounted

from kvmsim.cli.exitcodes import Exit
from privfs.notifier.lane import Lane, LinkError, find_socket
from privfs.notifier.user import Registered, Zap

pytest_plugins = ["actor_fixtures", "guest_fixtures", "program_fixtures"]
pytestmark = [pytest.mark.fuse, pytest.mark.usefixtures("kernel")]


class Idle:
    """A process that maps nothing."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def zap(self, zap: Zap) -> None:
        """Nothing to zap."""

    def drain(self, tickets: list[object]) -> None:
        """Nothing to wait for."""

    def lost(self, why: str) -> None:
        """Nothing to stop."""


@contextmanager
def session(path: Path, label: str) -> Iterator[Lane]:
    lane = Lane(Idle())  # type: ignore[arg-type]
    lane.start(find_socket(path), label)
    with closing(lane):
        yield lane


def register(lane: Lane, path: Path, *, exclusive: bool) -> Registered:
    fd = os.open(path, os.O_RDWR)
    try:
        return lane.register(fd, exclusive=exclusive)
    finally:
        os.close(fd)


def test_two_emulators_do_not_share_a_confidential_vms_file(mounted: Mounted, actor: Cast) -> None:
    ram = mounted.path / "ram"
    boot = ("boot", "--memory", str(ram), "--vcpus", "1", "--kind")
    vm = actor(Path(sys.executable), "-m", "kvmsim", *boot, "tdx", "--name", "td")
    vm.expect("in private memory")
    name = f"td({vm.pid})"
    assert mounted.stat("ram")["exclusive"] == name
    for kind in ("snp", "shared-bit"):
        done = kvmsim(*boot, kind)
        assert done.returncode == Exit.MEMORY, done.stderr
        assert done.stderr == (
            f"kvmsim: {ram} is the memory of a confidential VM, {name}, and of no other VM; use "
            f"another file, or end {name}; see: privfs status\n"
        )
    with session(ram, "next") as lane:
        for exclusive in (False, True):
            with pytest.raises(LinkError) as caught:
                register(lane, ram, exclusive=exclusive)
            assert caught.value.errno == errno.EBUSY
        assert vm.ask("info", "ok info .*"), "it has noticed nothing"
        vm.kill()
        until(lambda: mounted.stat("ram")["exclusive"] is None, "its death was seen")
        ino = register(lane, ram, exclusive=True).ino
        lane.unregister(ino)


def test_a_confidential_vm_does_not_come_to_a_file_that_has_a_user(mounted: Mounted) -> None:
    ram = mounted.path / "ram"
    with session(ram, "user") as lane:
        ino = register(lane, ram, exclusive=False).ino
        done = kvmsim("boot", "--memory", ram, "--kind", "pkvm")
        assert done.returncode == Exit.MEMORY, done.stderr
        name = f"user({os.getpid()})"
        assert done.stderr == (
            f"kvmsim: {ram} is memory of {name}, and a confidential VM shares its file with "
            f"nobody; use another file, or end {name}; see: privfs status\n"
        )
        assert mounted.stat("ram")["users"] == [name]
        lane.unregister(ino)
