# SPDX-License-Identifier: GPL-2.0-or-later
"""Users that lie: they acknowledge, keep their mappings, and touch what was freed."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest
from actors import Actor, until
from mounts import Mounted, Mounter
from twins import PAGE, User, allocate, private_file, punch, value

pytest_plugins = ["guest_fixtures", "actor_fixtures", "twin_fixtures"]
pytestmark = pytest.mark.fuse

TOLD = r"freed memory was touched: inode \d+ pages \[0x3, 0x4\): 1 pages in 1 runs; held by "
KILLED = r"killing liar\(\d+\): nobody else can have touched freed memory"


def lie(path: Path, user: User) -> Actor:
    """A user that touches page 3 after it has acknowledged its loss."""
    liar = user(path, "liar")
    value(liar, "touch 3")
    assert punch(path, 3, 4) == 0
    value(liar, "touch 3")
    return liar


def counts(mounted: Mounted) -> tuple[int, int]:
    status = mounted.ask("status")
    return status["kills"], status["failures"]


def gone(mounted: Mounted) -> None:
    until(lambda: not mounted.ask("status")["sessions"], "all sessions gone")


@pytest.mark.parametrize("found_by", ["allocation", "audit"])
def test_a_liar_who_was_alone_is_killed(mount: Mounter, user: User, found_by: str) -> None:
    mounted = mount(expected_log=f"{TOLD}liar|{KILLED}")
    path = private_file(mounted)
    liar = lie(path, user)
    if found_by == "allocation":
        assert allocate(path, 3, 4) == errno.EIO
    else:
        (found, _) = mounted.ask("audit")["findings"]
        assert (found["finding"], found["start"]) == ("reallocated", 3)
    assert liar.wait() == -signal.SIGKILL
    gone(mounted)
    assert counts(mounted) == (1, int(found_by == "allocation"))
    assert allocate(path, 3, 4) == 0, "what the dead left is given back"
    assert mounted.ask("status")["strays"] == []
    mounted.audit()
    heir = user(path, slot=5)
    assert heir.ask("words 3", "^words .*$") == "words 3 0", "nothing of the liar's"
    assert f"held by liar({liar.pid})" in mounted.log()


def test_on_doubt_nobody_is_killed_and_nothing_given_out(mount: Mounter, user: User) -> None:
    mounted = mount(expected_log=f"{TOLD}healthy.*, liar|{TOLD}liar.*, healthy")
    path = private_file(mounted)
    healthy = user(path, label="healthy", slot=5)
    value(healthy, "touch 8")
    liar = lie(path, user)
    assert allocate(path, 0, 16) == errno.EIO
    assert healthy.ask("touch 3", r"^error 3 \d+$") == f"error 3 {errno.EIO}"
    value(healthy, "touch 9")
    assert counts(mounted)[0] == 0
    (stray,) = mounted.ask("status")["strays"]
    assert stray["runs"] == [[3 * PAGE, 4 * PAGE]]
    assert stray["users"] == [f"healthy({healthy.pid})", f"liar({liar.pid})"]
    assert len(mounted.log().splitlines()) == 1, "it is told once"
    liar.kill()
    assert healthy.ask("touch 3", r"^error 3 \d+$") == f"error 3 {errno.EIO}"
    healthy.kill()
    gone(mounted)
    assert allocate(path, 0, 16) == 0
    mounted.audit()


def test_who_has_left_may_have_been_it(mount: Mounter, user: User) -> None:
    """It has unregistered, in order; its process could still hold a descriptor."""
    mounted = mount(expected_log=f"{TOLD}liar")
    path = private_file(mounted)
    early = user(path, label="early", slot=5)
    value(early, "touch 8")
    early.send("leave")
    assert early.wait() == 0
    liar = lie(path, user)
    assert allocate(path, 3, 4) == errno.EIO
    assert counts(mounted) == (0, 1)
    liar.kill()
    gone(mounted)
    assert allocate(path, 3, 4) == errno.EIO
    path.unlink()
    assert mounted.ask("status")["strays"] == []


def test_who_may_not_be_killed_is_not(mount: Mounter, user: User) -> None:
    mounted = mount("t_ack=0", expected_log=f"{TOLD}liar")
    path = private_file(mounted)
    liar = lie(path, user)
    assert allocate(path, 3, 4) == errno.EIO
    assert counts(mounted) == (0, 1)
    assert punch(path, 3, 4) == 0, "nothing of it is allocated"
    value(liar, "touch 8")
    assert allocate(path, 3, 4) == errno.EIO
