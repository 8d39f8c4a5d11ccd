# SPDX-License-Identifier: GPL-2.0-or-later
"""What people can see of it: who is waited for, for what, how long; who was killed, and why."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from actors import Cast, until
from mounts import Mounted, Mounter
from twins import PAGE, User, allocate, private_file, punch, value

pytest_plugins = ["guest_fixtures", "actor_fixtures", "twin_fixtures"]
pytestmark = pytest.mark.fuse

KILLING = r"killing hung\(\d+\): no acknowledgement for inode \d+ pages \[0x3, 0x4\)"


@contextmanager
def events(mounted: Mounted) -> Iterator[subprocess.Popen[str]]:
    """Listen, and return when a first event has been told."""
    command = [sys.executable, "-u", "-m", "privfs", "events", "--json", str(mounted.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            knock = private_file(mounted, "knock", 1)

            def heard() -> bool:
                os.truncate(knock, PAGE)
                return bool(select.select([process.stdout], [], [], 0.2)[0])

            until(heard, "somebody listens")
            yield process
        finally:
            process.kill()


def first(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    """Return the next event of that name."""
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == name:
            return event
    raise AssertionError(f"no {name}")


def test_who_is_waited_for(mount: Mounter, user: User, actor: Cast) -> None:
    mounted = mount("t_ack=300")
    path = private_file(mounted)
    ino = path.stat().st_ino
    hung = user(path, "hung")
    value(hung, "touch 3")
    caller = actor("storm", path, "3", "4", "1", "0")
    until(lambda: mounted.ask("status")["sessions"][0]["unacknowledged"] == 1, "a wait")
    (row,) = mounted.ask("status")["sessions"]
    (wait,) = row["outstanding"]
    assert (wait["inode"], wait["start"], wait["end"]) == (ino, 3 * PAGE, 4 * PAGE)
    assert wait["seq"] > 0
    until(
        lambda: mounted.ask("status")["sessions"][0]["outstanding"][0]["seconds"] > wait["seconds"],
        "time passes",
    )
    said = mounted.privfs("status", mounted.path).stdout
    assert re.search(rf"^hung\({hung.pid}\) +{ino} 0x3000-0x3fff +{wait['seq']} ", said, re.M)
    hung.kill()
    caller.expect("done 1 0")
    assert mounted.ask("status")["sessions"] == []


def test_how_long_invalidations_took(mount: Mounter, user: User) -> None:
    mounted = mount()
    path = private_file(mounted)
    slow = user(path, "slow=50")
    for _ in range(5):
        value(slow, "touch 3")
        assert punch(path, 3, 4) == 0
    found = mounted.ask("status")["invalidations"]
    assert found["total"] == 5
    shares = [found[name] for name in ("p50_us", "p90_us", "p99_us", "max_us")]
    assert shares == sorted(shares)
    assert shares[0] >= 50_000


def test_who_was_killed_and_why(mount: Mounter, user: User) -> None:
    mounted = mount("t_ack=0.3", expected_log=KILLING)
    path = private_file(mounted)
    hung = user(path, "hung")
    value(hung, "touch 3")
    with events(mounted) as listener:
        hung.ask("call 3 4", "^calling$")
        kill = first(listener, "kill")
        answer = first(listener, "answer")
    assert hung.wait() == -signal.SIGKILL
    assert kill["user"] == f"hung({hung.pid})"
    assert answer["errno"] == errno.EIO
    until(lambda: mounted.ask("status")["failures"] == 1, "its own call has failed")
    killed, failed = (one["what"] for one in mounted.ask("status")["incidents"])
    assert re.fullmatch(KILLING, killed)
    ino = path.stat().st_ino
    assert failed.startswith(f"EIO to hung({hung.pid}): Fallocate(mode=3, offset={3 * PAGE}, ")
    assert f" on inode {ino}: " in failed
    said = mounted.privfs("status", mounted.path).stdout
    assert killed in said
    assert failed in said


def test_who_touched_freed_memory(mount: Mounter, user: User) -> None:
    mounted = mount(expected_log="freed memory was touched|nobody else can have touched")
    path = private_file(mounted)
    liar = user(path, "liar")
    value(liar, "touch 3")
    assert punch(path, 3, 4) == 0
    with events(mounted) as listener:
        value(liar, "touch 3")
        assert allocate(path, 3, 4) == errno.EIO
        stray, kill = first(listener, "stray"), first(listener, "kill")
    assert (stray["start"], stray["end"]) == (3 * PAGE, 4 * PAGE)
    assert stray["users"] == kill["user"] == f"liar({liar.pid})"


def test_no_content_can_be_told(mount: Mounter, user: User) -> None:
    """The mount has descriptors of private memory, and never maps any."""
    mounted = mount()
    path = private_file(mounted)
    one = user(path)
    value(one, "touch 3")
    maps = Path(f"/proc/{mounted.process.pid}/maps").read_text()
    assert "python" in maps
    assert "memfd:privfs" not in maps
    assert "memfd:privfs" in Path(f"/proc/{one.pid}/maps").read_text()
