# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs events``: what happens on a mount is told in order, and nobody has to listen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mounts import Mounted, Mounter, privfs

from privfs.cli.events import event_line

pytestmark = pytest.mark.fuse

PAGE = 4096
LIGHT_USER = Path(__file__).parents[1] / "integration/light_user.py"


@contextmanager
def listening(mounted: Mounted, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``privfs events --json`` until it has told of a first call."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "privfs", "events", "--json", *options, str(mounted.path)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        (mounted.path / "knock").touch()
        while not select_line(process, mounted):
            pass
        yield process
    finally:
        process.kill()
        process.communicate()


def select_line(process: subprocess.Popen[str], mounted: Mounted) -> bool:
    """Knock until somebody listens: make a call and see whether it is told."""
    import select

    os.truncate(mounted.path / "knock", PAGE)
    ready, _, _ = select.select([process.stdout], [], [], 0.2)
    return bool(ready)


def told(process: subprocess.Popen[str], last: str) -> list[dict[str, Any]]:
    """Return the events up to the first named ``last``."""
    found = []
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        found.append(event)
        if event["event"] == last:
            return found
    raise AssertionError(f"no {last} in {found}")


def test_the_life_of_a_user_is_told_in_order(mount: Mounter) -> None:
    mounted = mount()
    path = mounted.path / "ram"
    path.touch()
    os.truncate(path, 16 * PAGE)
    with listening(mounted) as process:
        user = subprocess.Popen(
            [sys.executable, str(LIGHT_USER), str(path), "ack", "watched"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert user.stdin is not None
        assert user.stdout is not None
        while "ready" not in user.stdout.readline():
            pass
        subprocess.run(["fallocate", "-p", "-o", "0", "-l", "64K", path], check=True)
        user.stdin.write("leave\n")
        user.communicate()
        events = told(process, "gone")
    names = [event["event"] for event in events]
    wanted = ["hello", "register", "allocate", "invalidate", "ack", "free", "answer", "unregister"]
    positions = [names.index(name, names.index("hello")) for name in wanted]
    assert positions == sorted(positions), names
    invalidate = events[names.index("invalidate")]
    assert invalidate["user"] == f"watched({user.pid})"
    assert (invalidate["start"], invalidate["end"]) == (0, 16 * PAGE)
    assert "grant" not in names


def test_grants_are_told_on_demand(mount: Mounter) -> None:
    mounted = mount()
    path = mounted.path / "ram"
    path.touch()
    os.truncate(path, 16 * PAGE)
    with listening(mounted, "--faults") as process:
        user = subprocess.Popen(
            [sys.executable, str(LIGHT_USER), str(path), "ack"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        grant = told(process, "grant")[-1]
        user.kill()
        user.communicate()
    assert (grant["errno"], grant["start"], grant["end"]) == (0, 0, PAGE)


def test_a_place_without_a_mount(tmp_path: Path) -> None:
    done = privfs("events", str(tmp_path))
    assert done.returncode == 5
    assert "privfs mount" in done.stderr


def test_lines_for_people() -> None:
    line = event_line({"time": 0.25, "event": "invalidate", "user": "vm0(1)", "inode": 7, "seq": 3,
                       "reason": "punch", "start": 0, "end": PAGE})  # fmt: skip
    assert line.endswith("invalidate user=vm0(1) inode=7 seq=3 reason=punch range=0x0-0xfff")
    assert "result=ENOSPC" in event_line({"event": "answer", "call": "4", "errno": 28, "why": ""})
