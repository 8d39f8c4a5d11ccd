# SPDX-License-Identifier: GPL-2.0-or-later
"""What a fence is worth to an owner: killed users that cannot exit, and users that lie."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from actors import Actor, Cast, until
from mounts import Mounted, Mounter
from twins import User, healthy, stats, value
from twins import punch as punch_pages

from kvmsim.fence.userfault import Userfault

pytest_plugins = ["guest_fixtures", "actor_fixtures", "twin_fixtures"]
pytestmark = [pytest.mark.fuse]
try:
    Userfault().close()
except OSError as error:
    pytestmark.append(pytest.mark.skip(reason=f"no fence: {error.strerror}"))

PAGE = 4096
PAGES = 64
Slow = tuple[Path, Actor]
SHORT = "t_ack=0.3"
KILLING = r"killing hang\(\d+\): no acknowledgement"
FENCED = r"hang\(\d+\) does not exit, but is fenced off from inode \d+"
UNPROVEN = r"no proof that hang\(\d+\) cannot reach"


def private_file(mounted: Mounted) -> Path:
    path = mounted.path / "ram"
    path.touch()
    os.truncate(path, PAGES * PAGE)
    return path


def user(actor: Cast, path: Path, fence: str, mode: str) -> Actor:
    """A user that has pages 0 to 3 mapped and has stored to them."""
    made = actor("fenced_user", path, fence, mode)
    made.expect("ready")
    for page in range(4):
        made.ask(f"get {page} {page + 1}", f"granted {page} ")
        made.ask(f"touch {page}", "touched")
    return made


def punch(actor: Cast, path: Path, start: int, end: int) -> Actor:
    """A process that punches pages one at a time until all are punched or one fails."""
    made = actor("storm", path, str(start), str(end), "1", "0")
    made.expect("ready")
    return made


@pytest.fixture
def slow(actor: Cast, tmp_path: Path) -> Iterator[Slow]:
    """Another file system, which answers when it is told to."""
    place = tmp_path / "slow"
    place.mkdir()
    served = actor("slow_fs", place)
    try:
        served.expect("ready")
        yield place, served
    finally:
        served.send("answer")
        subprocess.run(["fusermount3", "-u", "-z", place], check=True)


def caught(actor: Cast, slow: Slow, path: Path, fence: str) -> Actor:
    """A user that hangs, with a thread in a system call that will store to its page 3.

    SIGKILL does not end it before the other file system answers; then the kernel stores.
    """
    place, served = slow
    hung = user(actor, path, fence, "hang")
    hung.send(f"getxattr {place} 3")
    served.expect("asked")
    return hung


def test_a_killed_user_that_cannot_exit_is_done_without(
    mount: Mounter, actor: Cast, slow: Slow
) -> None:
    mounted = mount(SHORT, expected_log=f"{KILLING}|{FENCED}")
    path = private_file(mounted)
    hung = caught(actor, slow, path, "uffd")
    punch(actor, path, 3, 4).expect("done 1 0")
    assert mounted.stat("ram")["held"] == 3 * PAGE
    (session,) = mounted.ask("status")["sessions"]
    assert (session["state"], session["fence"]) == ("fenced", "uffd")
    assert hung.process.poll() is None
    punch(actor, path, 2, 3).expect("done 1 0")  # without another ladder
    assert mounted.stat("ram")["held"] == 2 * PAGE
    healthy = actor("fenced_user", path, "uffd", "ack")
    healthy.expect("ready")
    healthy.ask("get 3 4", "granted 3 4")  # the page is somebody else's by now
    slow[1].send("answer")
    assert hung.wait() == -signal.SIGKILL
    assert "got" not in hung.text, "it came back to its program"
    assert healthy.ask("load 3", "loaded .*") == "loaded 0x0", "the kernel stored for the dead"
    until(lambda: len(mounted.ask("status")["sessions"]) == 1, "its session is gone")
    assert mounted.ask("status")["failures"] == 0
    assert mounted.stat("ram")["held"] == 3 * PAGE
    mounted.audit()


@pytest.mark.parametrize("fence", ["mprotect", "none"])
def test_without_the_kernels_fence_nothing_is_freed(
    mount: Mounter, actor: Cast, slow: Slow, fence: str
) -> None:
    """What is left of its system call would bring the page back, or store to the next owner's."""
    mounted = mount(SHORT, expected_log=f"{KILLING}|{UNPROVEN}")
    path = private_file(mounted)
    hung = caught(actor, slow, path, fence)
    punch(actor, path, 3, 4).expect(f"errno {errno.EIO}$")
    assert mounted.stat("ram")["held"] == 4 * PAGE
    (session,) = mounted.ask("status")["sessions"]
    assert (session["state"], session["fence"]) == ("unproven", fence)
    slow[1].send("answer")
    assert hung.wait() == -signal.SIGKILL
    punch(actor, path, 3, 4).expect("done 1 0")
    mounted.audit()


def test_a_user_that_hangs_and_can_exit_is_waited_for(mount: Mounter, actor: Cast) -> None:
    """A fence is the last resort: an exit proves more."""
    mounted = mount(SHORT, expected_log=KILLING)
    path = private_file(mounted)
    hung = user(actor, path, "uffd", "hang")
    punch(actor, path, 3, 4).expect("done 1 0")
    assert hung.wait() == -signal.SIGKILL
    assert "fenced" not in mounted.log()
    mounted.audit()


def test_a_user_that_may_not_be_killed_is_waited_for(mount: Mounter, actor: Cast) -> None:
    """With t_ack=0 nothing but its answer or its end will do: stopped, it could go on."""
    mounted = mount("t_ack=0")
    path = private_file(mounted)
    stopped = user(actor, path, "uffd", "ack")
    stopped.stop()
    caller = punch(actor, path, 3, 4)
    until(lambda: mounted.ask("status")["sessions"][0]["unacknowledged"] == 1, "invalidation")
    assert mounted.stat("ram")["held"] == 4 * PAGE
    stopped.signal(signal.SIGCONT)
    caller.expect("done 1 0")
    assert mounted.stat("ram")["held"] == 3 * PAGE


def test_the_fence_keeps_a_user_that_forgot_to_unmap_from_the_page(
    mount: Mounter, actor: Cast
) -> None:
    """Its acknowledgement was a lie; without a fence this is memory that no file owns."""
    mounted = mount()
    path = private_file(mounted)
    careless = user(actor, path, "uffd", "liar")
    punch(actor, path, 3, 4).expect("done 1 0")
    careless.send("touch 3")
    until(lambda: "was touched ungranted" in careless.text, "it is told")
    until(lambda: careless.text.count("touched\n") == 5, "its store has ended, somewhere else")
    mounted.audit()
    assert mounted.stat("ram")["held"] == 3 * PAGE


def test_status_names_the_fences(mount: Mounter, actor: Cast) -> None:
    mounted = mount()
    path = private_file(mounted)
    for fence in ("uffd", "mprotect", "none"):
        user(actor, path, fence, "ack")
    rows = mounted.ask("status")["sessions"]
    assert [row["fence"] for row in rows] == ["uffd", "mprotect", "none"]
    assert " uffd " in (mounted.path / ".privfs/sessions").read_text()
    punch(actor, path, 0, 4).expect("done 1 0")
    mounted.audit()


# --- a user that was written from the protocol's text alone --------------------------------------


def test_a_fenced_user_in_c_lives_like_any_other(mount: Mounter, user: User, actor: Cast) -> None:
    mounted = mount()
    path = private_file(mounted)
    users = [user(path, "fenced-good", slot=slot) for slot in (1, 2)]
    for seed, one in enumerate(users):
        one.ask(f"work {seed} 0 {PAGES}", "^working$")
    storm = actor("storm", path, "0", str(PAGES), "300", "1")
    storm.expect("done 300 0")
    for one in users:
        one.ask("rest", "^resting$")
        assert healthy(one)["zeroes"] > 0
    assert [row["fence"] for row in mounted.ask("status")["sessions"]] == ["uffd", "uffd"]
    assert mounted.ask("status")["kills"] == 0
    mounted.audit()
    for one in users:
        one.send("leave")
        one.expect("^left 0$")


def test_the_fence_stops_a_liar_in_c(mount: Mounter, user: User) -> None:
    """It sleeps where it touches what it gave up on its word alone."""
    mounted = mount()
    path = private_file(mounted)
    liar = user(path, "fenced-liar")
    value(liar, "touch 3")
    assert punch_pages(path, 3, 4) == 0
    before = stats(liar)["touches"]
    liar.ask("work 1 3 4", "^working$")
    until(lambda: asleep(liar), "it sleeps in a fault")
    assert stats(liar)["touches"] == before
    mounted.audit()
    assert mounted.stat("ram")["held"] == 0
    liar.kill()


def test_a_hung_one_is_killed_as_before(mount: Mounter, user: User) -> None:
    mounted = mount(SHORT, expected_log=r"killing (\S+)\(\d+\): no acknowledgement")
    path = private_file(mounted)
    hung = user(path, "fenced-hung")
    value(hung, "touch 3")
    assert punch_pages(path, 3, 4) == 0
    assert hung.wait() == -signal.SIGKILL
    assert mounted.stat("ram")["held"] == 0
    mounted.audit()


def asleep(one: Actor) -> bool:
    """Whether a thread sleeps in userfaultfd's hands."""
    found = Path(f"/proc/{one.pid}/task").glob("*/wchan")
    return any("userfault" in path.read_text() for path in found)
