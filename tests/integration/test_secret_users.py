# SPDX-License-Identifier: GPL-2.0-or-later
"""Users of secret memory: what the honest give back, what a liar keeps, what nobody gets."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from actors import ROOT, Actor, Cast, until
from mounts import Mounted, Mounter, privfs
from twins import PAGE, User, healthy, private_file, punch, value

from privfs.backing import choose
from privfs.backing.store import Promise

pytest_plugins = ["guest_fixtures", "actor_fixtures", "twin_fixtures"]
pytestmark = pytest.mark.fuse

MIB = 1 << 20
CHUNK = 2 * MIB
UNIT = CHUNK // PAGE
CHUNKS = 24
ALL = CHUNKS * UNIT
LOW = 2 << 20  #: where private memory begins in a guest


@pytest.fixture
def secret(mount: Mounter) -> Callable[..., Mounted]:
    """Return a function that mounts secret memory."""
    try:
        choose("secretmem")
    except OSError as error:
        pytest.skip(str(error.strerror))

    def make(*options: str, **more: str) -> Mounted:
        return mount("backing=secretmem", *options, **more)

    return make


def unevictable() -> int:
    """Return the bytes of the machine that nothing can reclaim: all secret memory is in there."""
    found = re.search(r"Unevictable: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) << 10


def secrets_of(user: Actor) -> tuple[int, int]:
    """Return how many descriptors and mappings of secret memory a user has.

    The twin hides from nobody, unlike kvmsim.
    """
    proc = Path(f"/proc/{user.pid}")
    links = [os.readlink(link) for link in (proc / "fd").iterdir()]
    maps = (proc / "maps").read_text().splitlines()
    name = "/secretmem (deleted)"
    return links.count(name), sum(name in line for line in maps)


def fill(path: Path, user: Actor, chunks: int = CHUNKS) -> list[int]:
    """Let a user store to a page of each chunk; return what it stored."""
    return [value(user, f"touch {chunk * UNIT + chunk}") for chunk in range(chunks)]


# --- the honest --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["punch", "truncate", "unlink"])
def test_an_honest_user_gives_all_of_it_back(
    secret: Callable[..., Mounted], user: User, way: str
) -> None:
    """Not by dying: it lives on, with no descriptor and no mapping of what is gone."""
    mounted = secret(f"personality={'guest_memfd' if way == 'unlink' else 'resizable'}")
    path = private_file(mounted, pages=ALL)
    one = user(path)
    before = unevictable()
    fill(path, one)
    assert secrets_of(one)[0] == CHUNKS
    assert unevictable() > before + CHUNKS * CHUNK * 3 // 4
    assert mounted.stat("ram")["held"] == CHUNKS * CHUNK
    if way == "punch":
        assert punch(path, 0, ALL) == 0
    elif way == "truncate":
        os.truncate(path, 0)
    else:
        os.unlink(path)
    until(lambda: mounted.ask("status")["memory"]["used"] == 0, "the file gave all up")
    assert secrets_of(one) == (0, 0)
    until(lambda: unevictable() < before + CHUNKS * CHUNK // 4, "the machine has it back")
    healthy(one)
    mounted.audit()


def test_a_part_of_it_comes_back_as_other_memory(
    secret: Callable[..., Mounted], user: User
) -> None:
    mounted = secret()
    path = private_file(mounted, pages=ALL)
    one = user(path)
    written = fill(path, one, 4)
    assert punch(path, UNIT, 2 * UNIT) == 0
    assert secrets_of(one)[0] == 3
    assert value(one, f"read {UNIT + 1}") == 0
    assert secrets_of(one)[0] == 4
    assert [value(one, f"read {chunk * UNIT + chunk}") for chunk in (0, 2, 3)] == [
        written[chunk] for chunk in (0, 2, 3)
    ]
    assert mounted.stat("ram")["held"] == 4 * CHUNK
    healthy(one)
    mounted.audit()


def test_two_users_share_a_chunk_and_both_let_go(
    secret: Callable[..., Mounted], user: User
) -> None:
    mounted = secret()
    path = private_file(mounted, pages=ALL)
    one, two = user(path, label="one"), user(path, label="two", slot=2)
    for actor in (one, two):
        fill(path, actor, 3)
    one.ask("work 1 0 512", "^working$")
    two.ask("work 2 0 512", "^working$")
    for _ in range(5):
        assert punch(path, 0, UNIT) == 0
    for actor in (one, two):
        actor.ask("rest", "^resting$")
        healthy(actor)
        assert secrets_of(actor)[0] <= 3
    mounted.audit()


def test_a_user_that_is_killed_keeps_nothing(secret: Callable[..., Mounted], user: User) -> None:
    mounted = secret("t_ack=0.5", expected_log=r"killing hung\(\d+\): no acknowledgement")
    path = private_file(mounted, pages=ALL)
    before = unevictable()
    hung = user(path, "hung")
    fill(path, hung)
    assert punch(path, 0, ALL) == 0
    assert hung.wait() < 0
    until(lambda: unevictable() < before + CHUNKS * CHUNK // 4, "the machine has it back")
    mounted.audit()


@pytest.mark.root
def test_a_guest_runs_on_while_its_chunks_go(
    secret: Callable[..., Mounted], user: User, actor: Cast, vm_kernel: Path
) -> None:
    """Its kernel, in other chunks, notices nothing; it has let go of each before it is answered."""
    mounted = secret()
    path = private_file(mounted)
    vm = actor("vm_process", vm_kernel, "vm0", path)
    vm.expect(r"^> ")
    first = 4 * UNIT
    for vcpu in range(2):
        assert vm.ask(f"spin {vcpu} {LOW + first * PAGE:#x} 64").startswith("ok")
    one = user(path, slot=2)
    one.ask(f"work 1 {first + 64} {first + UNIT}", "^working$")
    inode = path.stat().st_ino
    for _ in range(20):
        until(lambda: page_users(mounted, inode, first) == 2, "both are at work there")
        assert punch(path, first, first + UNIT) == 0
    one.ask("rest", "^resting$")
    healthy(one)
    assert vm.ask("stop").startswith("ok")
    alive = mounted.stat("ram")["extents"]
    assert secrets_of(one)[0] <= alive
    links = [os.readlink(link) for link in Path(f"/proc/{vm.pid}/fd").iterdir()]
    assert links.count("/secretmem (deleted)") <= alive  # root sees it; nobody else does
    mounted.audit()
    vm.send("halt 0")
    vm.expect("vm ended 0")
    status = mounted.ask("status")
    assert (status["kills"], status["failures"]) == (0, 0)


def page_users(mounted: Mounted, inode: int, page: int) -> int:
    """Return how many users have pages of the chunk from ``page`` on."""
    rows = mounted.ask("map", ino=inode, start=page)["rows"]
    end = (page + UNIT) * PAGE
    return len({name for row in rows if row["start"] < end for name in row["users"]})


# --- a liar ------------------------------------------------------------------------------------


def test_a_liar_keeps_memory_but_sees_nothing_of_anybody(
    secret: Callable[..., Mounted], user: User
) -> None:
    """What is not promised, seen: shown to whoever asks, and no way into the next owner's data."""
    mounted = secret()
    path = private_file(mounted, pages=ALL)
    before = unevictable()
    liar = user(path, "liar")
    written = fill(path, liar)
    assert punch(path, 0, ALL) == 0
    memory = mounted.ask("status")["memory"]
    assert (memory["used"], memory["given_up"]) == (0, CHUNKS * CHUNK)  # as far as one can count
    assert f"{CHUNKS * CHUNK >> 10} kB" in (mounted.path / ".privfs/meminfo").read_text()
    assert secrets_of(liar)[0] == CHUNKS
    assert unevictable() > before + CHUNKS * CHUNK * 3 // 4

    honest = user(path, label="honest", slot=2)
    fill(path, honest, 4)
    for page in range(4):
        index = page * UNIT + page
        assert value(liar, f"read {index}") == written[page]
        assert liar.ask(f"words {index}", "^words .*$") == f"words {index} 1"  # its own
        assert honest.ask(f"words {index}", "^words .*$") == f"words {index} 1"
    healthy(honest)
    found = mounted.ask("audit")
    assert (found["findings"], found["unaudited"]) == (
        [],
        [Promise.RECLAIM.value, Promise.AUDIT.value],
    )
    liar.kill()
    until(lambda: mounted.ask("status")["memory"]["given_up"] == 0, "its death was seen")
    until(lambda: unevictable() < before + 8 * CHUNK, "the machine has it back")


def test_what_is_not_promised_is_said_wherever_figures_are(
    secret: Callable[..., Mounted],
) -> None:
    mounted = secret()
    path = private_file(mounted, pages=UNIT)
    promises = {"reclaim": False, "audit": False}
    assert mounted.ask("status")["backing"]["promises"] == promises
    assert mounted.stat("ram")["backing"]["promises"] == promises
    for said in (privfs("stat", path).stdout, privfs("status", mounted.path).stdout):
        line = next(line for line in said.splitlines() if line.startswith("Beware:"))
        assert line.endswith(f"{Promise.RECLAIM.value}; {Promise.AUDIT.value}")


def test_other_memory_promises_all(mount: Mounter) -> None:
    mounted = mount("pagesize=2M")
    assert mounted.ask("audit")["unaudited"] == []
    assert "Beware" not in privfs("status", mounted.path).stdout


# --- who cannot be a user ----------------------------------------------------------------------


def test_there_are_no_read_only_users(secret: Callable[..., Mounted], user: User) -> None:
    """A descriptor that can be stored through is all that there is to give."""
    mounted = secret()
    path = private_file(mounted, pages=ALL)
    with pytest.raises(AssertionError, match="Permission denied"):
        user(path, "reader")
    done = privfs("seal", "--write", path)
    assert (done.returncode != 0, "never read-only" in done.stderr) == (True, True)
    assert mounted.stat("ram")["seals"] == []


def test_a_vm_that_may_not_lock_enough_says_so(
    secret: Callable[..., Mounted], vm_kernel: Path
) -> None:
    """RLIMIT_MEMLOCK binds whoever maps; without root it is often 8 MiB."""
    tools = [shutil.which(tool) or "" for tool in ("setpriv", "prlimit")]
    if "" in tools:
        pytest.skip("no setpriv or prlimit: apt install util-linux")
    mounted = secret()
    path = private_file(mounted, pages=32 * MIB // PAGE)
    drop = ["--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"] if os.geteuid() == 0 else []
    command = [sys.executable, "-m", "kvmsim", "boot", "--kernel", vm_kernel, "--memory", path]
    done = subprocess.run(
        [tools[0], *drop, tools[1], "--memlock=1048576", *map(str, command)],
        input="test\n", capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "raise RLIMIT_MEMLOCK (ulimit -l)" in done.stderr
    mounted.audit()


# --- errors on the way -------------------------------------------------------------------------


def test_a_punch_that_nobody_can_prove_frees_nothing_and_goes_on(
    secret: Callable[..., Mounted], user: User
) -> None:
    """A caller that is killed leaves a zap alone: the honest closed a chunk that lives on."""
    mounted = secret("t_ack=0")
    path = private_file(mounted, pages=ALL)
    slow = user(path, "slow=500")
    written = value(slow, "touch 3")
    caller = subprocess.Popen([sys.executable, "-c", _PUNCH, path])
    until(lambda: mounted.ask("status")["sessions"][0]["unacknowledged"] == 1, "it is asked")
    caller.kill()
    assert caller.wait() < 0
    until(lambda: mounted.ask("audit")["skipped"] == 0, "the zap has ended")
    assert mounted.stat("ram")["allocated"] == CHUNK
    assert value(slow, "read 3") == written  # asked for again
    healthy(slow)
    mounted.audit()


_PUNCH = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
libc.fallocate(os.open(sys.argv[1], os.O_RDWR), 3, 0, 2 << 20)
"""


def test_the_budget_ends_as_everywhere(secret: Callable[..., Mounted], user: User) -> None:
    mounted = secret("size=8M")
    path = private_file(mounted, pages=ALL)
    one = user(path)
    fill(path, one, 4)
    assert one.ask(f"touch {5 * UNIT}", "^error .*$") == f"error {5 * UNIT} {errno.ENOMEM}"
    assert punch(path, 0, UNIT) == 0
    assert value(one, f"touch {5 * UNIT}")
    healthy(one)
    mounted.audit()
