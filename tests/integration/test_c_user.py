# SPDX-License-Identifier: GPL-2.0-or-later
"""A user written in C from docs/protocol.md alone (tests/twin/user.c): is the text enough?"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from actors import Cast, until
from mounts import Mounter
from twins import PAGE, PAGES, User, healthy, private_file, punch, stats, value

pytest_plugins = ["guest_fixtures", "actor_fixtures", "twin_fixtures"]
pytestmark = pytest.mark.fuse

SHORT = "t_ack=0.5"
KILLING = r"killing (\S+)\(\d+\): no acknowledgement"
#: Where test_two_users_and_a_vm lets the guest work, behind its kernel; the C users have the rest.
LOW = 2 << 20
GUEST, GUEST_END = 2048, 2112


def test_a_life(mount: Mounter, user: User) -> None:
    """Faults, values that stay, a punch that zeroes, both ways of leaving memory, the end."""
    mounted = mount()
    path = private_file(mounted)
    one = user(path, label="sixteen bytes 16")
    written = value(one, "touch 3")
    assert written != 0
    assert value(one, "read 3") == written
    assert one.ask("words 3", "^words .*$") == "words 3 1"
    assert one.ask("map 4 0 16", "^granted .*$") == "granted 3 5"
    status = mounted.ask("status")["sessions"]
    assert [row["user"] for row in status] == [f"sixteen bytes 16({one.pid})"]
    assert mounted.stat("ram")["mapped"] == 2 * PAGE
    assert punch(path, 3, 4) == 0
    assert mounted.stat("ram")["allocated"] == PAGE
    mounted.audit()
    assert one.ask("words 3", "^words .*$") == "words 3 0"
    assert one.ask("alloc 8 12", "^reply .*$") == "reply 0"
    assert one.ask("map 9 0 512", "^granted .*$") == "granted 8 12"
    assert one.ask("punch 0 16", "^reply .*$") == "reply 0"
    assert mounted.stat("ram")["allocated"] == 0
    healthy(one)
    one.send("leave")
    one.expect("^left 0$")
    assert one.wait() == 0
    assert mounted.ask("status")["sessions"] == []
    mounted.audit()


def test_the_ends_of_a_file(mount: Mounter, user: User) -> None:
    mounted = mount()
    path = private_file(mounted)
    one = user(path)
    assert one.ask(f"read {PAGES}", "^error .*$") == f"error {PAGES} {errno.EFBIG}"
    value(one, "touch 2000")
    os.truncate(path, 100 * PAGE)
    assert one.ask("read 2000", "^error .*$") == f"error 2000 {errno.EFBIG}"
    os.truncate(path, 0)  # the extent dies
    mounted.audit()
    os.truncate(path, PAGES * PAGE)
    assert one.ask("words 2000", "^words .*$") == "words 2000 0"
    os.unlink(path)
    assert value(one, "touch 2001")  # it lives as long as it has a user
    healthy(one)
    one.send("leave")
    one.expect("^left 0$")
    until(lambda: mounted.ask("status")["memory"]["used"] == 0, "the file is gone")


def test_a_read_only_user(mount: Mounter, user: User) -> None:
    mounted = mount()
    path = private_file(mounted)
    one = user(path)
    written = value(one, "touch 7")
    other = user(path, "reader")
    assert value(other, "read 7") == written
    assert other.ask("touch 7", "^error .*$") == f"error 7 {errno.EACCES}"
    assert other.ask("touch 8", "^error .*$") == f"error 8 {errno.EACCES}"
    assert other.ask("punch 7 8", "^reply .*$") == f"reply {errno.EACCES}"
    assert value(one, "touch 7") > written


def test_extents_far_away_and_asked_for_again(mount: Mounter, user: User) -> None:
    mounted = mount()
    path = private_file(mounted, pages=1 << 20)
    one = user(path)
    for page in (0, 16384, 40000, (1 << 20) - 1):
        written = value(one, f"touch {page}")
        first, last = map(int, one.ask(f"again {page}", "^extent .*$").split()[1:])
        assert first <= page < last
        assert punch(path, page, page + 1) == 0
        assert one.ask(f"words {page}", "^words .*$") == f"words {page} 0"
        assert value(one, f"touch {page}") != written
    assert mounted.stat("ram")["extents"] == 4
    healthy(one)


def test_no_descriptor_left_for_an_extent(mount: Mounter, user: User) -> None:
    """The record comes without its descriptor; later it can be asked for again."""
    mounted = mount()
    path = private_file(mounted)
    one = user(path)
    assert one.ask("starve", "^starving$")
    assert one.ask("touch 5", "^error .*$") == f"error 5 {errno.EMFILE}"
    assert one.ask("feed", "^fed$")
    assert value(one, "touch 5")
    assert punch(path, 0, 16) == 0
    healthy(one)


def test_killed_while_it_works(mount: Mounter, user: User) -> None:
    mounted = mount()
    path = private_file(mounted)
    one = user(path)
    one.ask("work 1 0 64", "^working$")
    until(lambda: stats(one)["touches"] > 20, "it works")
    for start in range(0, 64, 8):
        assert punch(path, start, start + 8) == 0
    until(lambda: healthy(one)["zeroes"] > 0, "a page that was punched and read again")
    one.kill()
    assert punch(path, 0, 64) == 0
    until(lambda: mounted.ask("status")["sessions"] == [], "its session is gone")
    assert mounted.stat("ram")["allocated"] == 0
    mounted.audit()
    assert mounted.ask("status")["kills"] == 0


@pytest.mark.parametrize(
    ("mode", "ending"),
    [("hung", -signal.SIGKILL), ("close", -signal.SIGKILL), ("crash", -signal.SIGSEGV)],
)
def test_a_user_that_does_not_answer(mount: Mounter, user: User, mode: str, ending: int) -> None:
    """It works on until its death is proven; then, and only then, the caller is answered."""
    mounted = mount(SHORT, expected_log=KILLING)
    path = private_file(mounted)
    bad = user(path, mode)
    bad.ask("work 1 0 16", "^working$")
    until(lambda: mounted.stat("ram")["allocated"] > 8 * PAGE, "it works")
    good = user(path, label="good", slot=2)
    good.ask("work 2 0 16", "^working$")
    assert punch(path, 0, 16) == 0
    assert bad.wait() == ending
    good.ask("rest", "^resting$")
    healthy(good)
    assert punch(path, 0, 16) == 0
    assert mounted.stat("ram")["allocated"] == 0
    mounted.audit()


def test_a_slow_user_is_waited_for(mount: Mounter, user: User) -> None:
    mounted = mount()
    path = private_file(mounted)
    slow = user(path, "slow=300")
    slow.ask("work 1 0 16", "^working$")
    until(lambda: stats(slow)["touches"] > 20, "it works")
    for _ in range(3):
        assert punch(path, 0, 16) == 0
    slow.ask("rest", "^resting$")
    healthy(slow)
    mounted.audit()
    assert mounted.ask("status")["kills"] == 0


def test_a_user_that_calls_the_mount_itself(mount: Mounter, user: User) -> None:
    """From another thread than the one that acknowledges; and hung, from any."""
    mounted = mount(SHORT, expected_log=KILLING)
    path = private_file(mounted)
    one = user(path)
    value(one, "touch 3")
    one.ask("call 0 16", "^calling$")
    one.expect("^called 0$")
    healthy(one)
    hung = user(path, "hung")
    value(hung, "touch 4")
    hung.ask("call 4 5", "^calling$")
    assert hung.wait() == -signal.SIGKILL
    until(lambda: not mounted.stat("ram")["operations"], "end of its call")
    mounted.audit()


@pytest.mark.parametrize("mode", ["slow=60000", "hung"])
def test_a_user_that_waits_behind_its_waiter(
    mount: Mounter, user: User, actor: Cast, mode: str
) -> None:
    """Its call waits for the inode's lock, whose holder waits for its death: no EIO for either."""
    mounted = mount(SHORT, expected_log=KILLING)
    path = private_file(mounted)
    dying = user(path, mode, label="dying", slot=2)
    value(dying, "touch 3")
    caller = actor("storm", path, "3", "4", "1", "0")
    caller.expect("ready")
    until(lambda: bool(mounted.stat("ram")["operations"]), "the caller waits")
    dying.ask("call 3 4", "^calling$")
    if mode != "hung":
        dying.signal(signal.SIGKILL)
    caller.expect("done 1 0")
    assert dying.wait() == -signal.SIGKILL
    until(lambda: not mounted.stat("ram")["operations"], "end of all calls")
    assert mounted.ask("status")["failures"] == 0
    mounted.audit()


def test_a_child_that_keeps_the_socket_open(mount: Mounter, user: User) -> None:
    """The death of the user counts, not the end of its socket."""
    mounted = mount()
    path = private_file(mounted)
    parent = user(path)
    value(parent, "touch 3")
    child = int(parent.ask("fork", r"^child \d+$").split()[1])
    try:
        parent.kill()
        assert punch(path, 3, 4) == 0
        until(lambda: mounted.ask("status")["sessions"] == [], "its session is gone")
        assert os.path.exists(f"/proc/{child}"), "the child was to outlive it"
        mounted.audit()
    finally:
        os.kill(child, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{child}/cwd").exists(), "the child is gone")


def test_the_owner_dies(mount: Mounter, user: User) -> None:
    mounted = mount()
    one = user(private_file(mounted))
    one.ask("work 1 0 64", "^working$")
    mounted.kill()
    one.expect("^eof$")
    assert one.wait() == 3


def test_two_users_and_a_vm(mount: Mounter, user: User, actor: Cast, vm_kernel: Path) -> None:
    """Three users of one file, two of them sharing pages, under punches from two callers."""
    mounted = mount()
    path = private_file(mounted)
    vm = actor("vm_process", vm_kernel, "vm0", path)
    vm.expect(r"^> ")
    gpa = LOW + GUEST * PAGE
    for vcpu in range(2):
        assert vm.ask(f"spin {vcpu} {gpa:#x} {GUEST_END - GUEST}").startswith("ok")
    users = [user(path, label=f"twin{slot}", slot=slot) for slot in (1, 2)]
    for seed, one in enumerate(users):
        one.ask(f"work {seed} {GUEST_END} {GUEST_END + 64}", "^working$")
    assert mounted.stat("ram")["users"] == [
        f"vm0({vm.pid})", *(f"twin{slot}({users[slot - 1].pid})" for slot in (1, 2))
    ]  # fmt: skip
    storms = [
        actor("storm", path, str(GUEST), str(GUEST_END + 64), "300", str(seed)) for seed in (1, 2)
    ]
    for storm in storms:
        storm.expect("done 300 0")
    for one in users:
        one.ask("rest", "^resting$")
        found = healthy(one)
        assert found["zeroes"] > 0
        assert found["zaps"] > 0
    assert vm.ask("stop").startswith("ok")
    mounted.audit()
    for one in users:
        one.send("leave")
        one.expect("^left 0$")
    vm.send("halt 0")
    vm.expect("vm ended 0")
    status = mounted.ask("status")
    assert (status["kills"], status["failures"], status["sessions"]) == (0, 0, [])
    assert status["memory"]["used"] == status["memory"]["private"]
