# SPDX-License-Identifier: GPL-2.0-or-later
"""Who ends kvmsim exec ends the program, which has its /dev/kvm until it is gone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mounts import Mounter

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64",
                       reason="the program's ioctls are x86-64's"),
]  # fmt: skip

IN_ORDER = """
import fcntl, signal
numbers = {signal.SIGTERM, signal.SIGHUP}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
kvm = open("/dev/kvm", "rb+", buffering=0)
print("up", flush=True)
number = signal.sigwait(numbers)
for _ in range(100):
    fcntl.ioctl(kvm, 0xAE00, 0)
print(number.name, fcntl.ioctl(kvm, 0xAE00, 0))
raise SystemExit(5)
"""
NEVER = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
while True:
    signal.pause()
"""
LEAVES_ANOTHER = """
import fcntl, os, select, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
kvm = open("/dev/kvm", "rb+", buffering=0)
parent = os.pidfd_open(os.getpid())
ready, done = os.pipe()
if not os.fork():
    os.write(done, b"r")
    signal.sigwait({signal.SIGTERM})
    select.select([parent], [], [])  # it is gone
    print("the other", fcntl.ioctl(kvm, 0xAE00, 0), flush=True)
    os._exit(0)
os.read(ready, 1)
print("up", flush=True)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
while True:
    signal.pause()
"""


@contextlib.contextmanager
def running(program: str, mount: Mounter | None) -> Iterator[subprocess.Popen[str]]:
    """Run a Python program in a group of its own and wait until it is up."""
    options = []
    if mount is not None:
        options = ["--memory", os.fspath(mount("personality=guest_memfd").path)]
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "kvmsim", "exec", *options, "--", sys.executable, "-c", program],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip
    try:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "up\n"
        yield supervisor
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(supervisor.pid, signal.SIGKILL)
        supervisor.communicate()


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGTERM, True), (signal.SIGHUP, False)]
)
def test_a_program_ends_in_order(number: signal.Signals, whole_group: bool, mount: Mounter) -> None:
    with running(IN_ORDER, mount) as supervisor:
        if whole_group:  # as timeout(1): its child, then the group
            supervisor.send_signal(number)
            os.killpg(supervisor.pid, number)
        else:
            supervisor.send_signal(number)
        said, complained = supervisor.communicate(timeout=60)
        assert (said, complained) == (f"{number.name} 12\n", "")
        assert supervisor.returncode == 5


def test_what_it_leaves_behind_ends_in_order_too(mount: Mounter) -> None:
    with running(LEAVES_ANOTHER, mount) as supervisor:
        os.killpg(supervisor.pid, signal.SIGTERM)
        said, complained = supervisor.communicate(timeout=60)
        assert (said, complained) == ("the other 12\n", "")
        assert supervisor.returncode == 128 + signal.SIGTERM


def test_one_that_does_not_end_is_killed_when_asked_again(mount: Mounter) -> None:
    with running(NEVER, mount) as supervisor:
        (program,) = psutil.Process(supervisor.pid).children()
        heard: list[object] = []
        while not heard:  # what comes within a second is one wish
            supervisor.terminate()
            heard = select.select([supervisor.stderr], [], [], 0.2)[0]
        _, complained = supervisor.communicate(timeout=60)
        assert complained == "kvmsim: asked to end again: the program has not, it is killed\n"
        assert supervisor.returncode == 128 + signal.SIGKILL
        assert not program.is_running()


def test_a_program_begins_with_the_signals_of_any_other(mount: Mounter) -> None:
    asked = ["grep", "^Sig[BI]", "/proc/self/status"]
    place = os.fspath(mount("personality=guest_memfd").path)
    command = [sys.executable, "-m", "kvmsim", "exec", "--memory", place, "--"]
    beside, inside = (
        subprocess.run([*before, *asked], capture_output=True, text=True, timeout=60, check=True)
        for before in ([], command)
    )
    assert inside.stdout == beside.stdout


def test_a_killed_supervisor_leaves_no_folder_and_no_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path))
    with running(NEVER, None) as supervisor:
        (folder,) = tmp_path.iterdir()
        children = psutil.Process(supervisor.pid).children()
        owner, program = sorted(children, key=lambda child: "mount" not in child.cmdline())
        supervisor.kill()
        owner.wait(30)
        assert list(tmp_path.iterdir()) == []
        assert os.fspath(folder) not in Path("/proc/self/mounts").read_text()
        assert program.is_running()
