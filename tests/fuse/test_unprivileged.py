# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounts of ordinary users: through setuid fusermount3, in user namespaces, without either."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rooms import NAMELESS, OTHER, ROOT, USER, Room, room

pytestmark = [pytest.mark.fuse, pytest.mark.root]

PYTHON = (sys.executable, "-P")
KERNEL = ROOT / "scripts" / "guests" / "build" / "kernel.elf"


@pytest.fixture(scope="module")
def house() -> Iterator[Room]:
    if shutil.which("fusermount3") is None:
        pytest.skip("no fusermount3: apt install fuse3")
    with room() as made:
        yield made


@pytest.fixture
def mounted(house: Room, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A mount of an ordinary user, unmounted at the end if it is still there."""
    place = house.directory(f"{request.node.name}-mount".replace("/", "-"))
    done = house.privfs("mount", "--daemon", "-o", "size=128M", place)
    assert (done.returncode, done.stdout) == (0, "")
    yield place
    if is_mounted(house, place):
        house.privfs("umount", "--lazy", place)


def is_mounted(house: Room, place: Path) -> bool:
    return house.run("mountpoint", "-q", place).returncode == 0


def gone(house: Room, pid: int) -> bool:
    """Wait for the end of a process of the room."""
    wait = "import os, select, sys; p = os.pidfd_open(int(sys.argv[1])); select.select([p], [], [])"
    said = house.run(*PYTHON, "-c", wait, str(pid), timeout=20).stdout
    return said == "" or "ProcessLookupError" in said


# --- life --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", [["fusermount3", "-u"], ["umount"], ["privfs", "umount"]])
def test_an_idle_mount_is_unmounted_by_any_tool(
    house: Room, mounted: Path, tool: list[str]
) -> None:
    status = house.status(mounted)
    assert (status["mode"], status["passthrough_errno"]) == ("direct_io", errno.EPERM)
    assert status["pinned"] is False
    house.sh('fallocate -l 1M "$1/f"', mounted)
    done = house.run(*tool, mounted)
    assert (done.returncode, done.stdout) == (0, "")
    assert not is_mounted(house, mounted)
    assert gone(house, status["pid"])
    assert os.listdir(mounted) == []


@pytest.mark.parametrize("tool", [["fusermount3", "-u"], ["umount"], ["privfs", "umount"]])
def test_a_busy_mount_stays(house: Room, mounted: Path, tool: list[str]) -> None:
    house.sh(': > "$1/f"', mounted)
    script = 'exec 3<"$1/f"; shift; "$@"'
    done = house.run("sh", "-c", script, "sh", mounted, *tool, mounted)
    assert done.returncode in (1, 32)
    assert "busy" in done.stdout
    if tool[0] == "privfs":
        assert "in use by sh (" in done.stdout
        assert ", open file)" in done.stdout
    assert is_mounted(house, mounted)
    assert house.status(mounted)["mountpoint"] == str(mounted)


@pytest.mark.parametrize(
    ("held", "how"), [('cd "$1"', "directory"), ('exec 3>"$1/f"', "open file")]
)
def test_umount_names_who_is_in_the_way(house: Room, mounted: Path, held: str, how: str) -> None:
    done = house.run("sh", "-c", f'{held}; privfs umount "$1"', "sh", mounted)
    assert done.returncode == 1
    assert f", {how})" in done.stdout
    lazily = house.run("sh", "-c", f'{held}; privfs umount --lazy "$1"', "sh", mounted)
    assert (lazily.returncode, lazily.stdout) == (0, "")
    assert not is_mounted(house, mounted)


def test_a_dead_mount_is_cleared_by_the_next(house: Room, mounted: Path) -> None:
    house.sh('kill -KILL "$1"', str(house.status(mounted)["pid"]))
    said = house.run("ls", mounted).stdout
    assert "not connected" in said or "connection abort" in said
    again = house.privfs("mount", "--daemon", "-v", "-o", "size=64M", mounted)
    assert again.returncode == 0, again.stdout
    assert house.status(mounted)["memory"]["total"] == 64 << 20


def test_run_leaves_nothing(house: Room) -> None:
    done = house.privfs("run", "--", "sh", "-c", 'cd "$PRIVFS"; fallocate -l 1M f; stat -c %b f')
    assert (done.returncode, done.stdout) == (0, "2048\n")
    assert os.listdir(house.place / "tmp") == []


# --- who may enter -----------------------------------------------------------------------------


def test_others_and_root_are_kept_out(house: Room, mounted: Path) -> None:
    for uid in (OTHER, 0):
        done = house.run("ls", mounted, uid=uid)
        assert (done.returncode, "Permission denied" in done.stdout) == (2, True), uid


def test_allow_other_needs_the_permission_of_root(house: Room) -> None:
    place = house.directory("refused")
    done = house.privfs("mount", "-o", "allow_other", place)
    assert done.returncode == 4
    assert "user_allow_other" in done.stdout
    found = json.loads(house.privfs("doctor", "--json").stdout)["checks"]
    (check,) = (check for check in found if check["check"] == "allow_other")
    assert check["result"] == "SKIP"
    assert "echo user_allow_other >> /etc/fuse.conf" in check["remedy"]


def test_with_that_permission_modes_decide() -> None:
    with room(user_allow_other=True) as house:
        place = house.directory("shared")
        done = house.privfs("mount", "--daemon", "-o", "allow_other,size=64M", place)
        assert (done.returncode, done.stdout) == (0, "")
        house.sh('umask 022; truncate -s 1M "$1/mine"; : > "$1/all"; chmod 666 "$1/all"', place)
        house.sh('truncate -s 1M "$1/all"; cat "$1/.privfs/meminfo"', place, uid=OTHER)
        for command in ('truncate -s 2M "$1/mine"', 'rm "$1/mine"', ': > "$1/new"'):
            done = house.run("sh", "-c", command, "sh", place, uid=OTHER)
            assert "Permission denied" in done.stdout, command
        assert house.sh('stat -c "%u %g %a %s" "$1/mine"', place) == f"{USER} {USER} 644 1048576\n"
        house.sh('truncate -s 3M "$1/mine"', place, uid=0)
        assert house.run("privfs", "umount", place).returncode == 0


def test_a_user_without_a_name_is_explained(house: Room) -> None:
    place = house.directory("nameless", NAMELESS)
    done = house.privfs("mount", place, uid=NAMELESS)
    assert done.returncode == 4
    assert "privfs doctor" in done.stdout
    said = house.privfs("doctor", uid=NAMELESS)
    assert said.returncode == 6
    assert f"useradd --uid {NAMELESS}" in said.stdout


# --- without passthrough -----------------------------------------------------------------------

TOUCH = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
flags = mmap.MAP_PRIVATE | (mmap.MAP_POPULATE if sys.argv[2] == "populate" else 0)
found = mmap.mmap(fd, os.fstat(fd).st_size, flags)
print("mapped", flush=True)
print(found[0])
"""


def test_private_mappings_get_sigbus(house: Room, mounted: Path) -> None:
    house.sh('fallocate -l 1M "$1/f"', mounted)
    done = house.run(*PYTHON, "-c", TOUCH, mounted / "f", "touch")
    assert (done.returncode, done.stdout) == (128 + 7, "mapped\n") or done.returncode == -7


def test_populating_a_private_mapping_costs_next_to_nothing(house: Room, mounted: Path) -> None:
    """The kernel repeats READ until the caller is killed; each waits for its turn."""
    house.sh('fallocate -l 1M "$1/f"', mounted)
    pid = house.status(mounted)["pid"]
    ticks = "cut -d' ' -f14,15 /proc/$1/stat | tr ' ' +"
    script = (
        f'before=$(( $({ticks}) )); shift; timeout -s KILL 2 "$@" >/dev/null 2>&1; '
        f"set -- {pid}; echo $(( $({ticks}) - before ))"
    )
    done = house.run(
        "sh", "-c", script, "sh", str(pid), *PYTHON, "-c", TOUCH, mounted / "f", "populate"
    )
    used = int(done.stdout.split()[-1]) / os.sysconf("SC_CLK_TCK")
    assert used < 1, "seconds of the daemon's CPU in two seconds"
    assert house.status(mounted)["mountpoint"] == str(mounted)


# --- guests ------------------------------------------------------------------------------------


@pytest.mark.skipif(not KERNEL.exists(), reason="no guest kernel: scripts/setup")
def test_a_guest_boots_in_a_users_memory(house: Room, mounted: Path) -> None:
    house.sh('fallocate -l 32M "$1/ram"', mounted)
    done = house.run(
        *PYTHON, "-m", "kvmsim", "boot", "--timeout", "60", "--memory", mounted / "ram",
        input="test\n", timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " ok test " in f" {done.stdout}".replace(">", " ")
    audit = "from privfs import control; import sys; print(control.ask(sys.argv[1], 'audit'))"
    said = house.run(*PYTHON, "-c", audit, mounted).stdout
    assert said == "{'findings': [], 'skipped': 0, 'unaudited': []}\n"
    assert house.run("fusermount3", "-u", mounted).returncode == 0


# --- user namespaces ---------------------------------------------------------------------------


def test_root_of_a_user_namespace_needs_no_fusermount3(house: Room) -> None:
    place = house.directory("namespace")
    script = (
        'privfs mount --daemon -o size=64M "$1" && privfs status --json "$1" && '
        'fallocate -l 1M "$1/f" && umount "$1" && ls -A "$1"'
    )
    done = house.run(
        "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", place
    )
    if "unshare" in done.stdout:
        pytest.skip(f"no user namespaces for users: {done.stdout}")
    assert done.returncode == 0, done.stdout
    (status,) = json.loads(done.stdout)
    assert (status["pinned"], status["mode"]) == (False, "direct_io")


# --- where nobody may make a clone -------------------------------------------------------------


@pytest.fixture
def confined(house: Room) -> list[str]:
    """The beginning of a command line of the user in a chroot(2): no user namespaces there."""
    jail = house.place / "jail"
    if not jail.exists():
        jail.mkdir()
        house.sh('mount --rbind / "$1"', jail, uid=0)
    user = ["chroot", f"--userspec={USER}:{USER}", "--groups=", str(jail)]
    assert house.run(*user, "unshare", "--user", "true", uid=0).returncode == 1
    return user


def test_a_pinned_mount_ends_by_privfs_umount(house: Room, confined: list[str]) -> None:
    place = house.directory("pinned")

    def run(*command: str | Path) -> tuple[int, str]:
        done = house.run(*confined, *command, uid=0)
        return done.returncode, done.stdout

    assert run("privfs", "mount", "--daemon", "-o", "size=64M", place) == (0, "")
    status = json.loads(run("privfs", "status", "--json", place)[1])[0]
    assert status["pinned"] is True
    assert "busy" in run("fusermount3", "-u", place)[1]
    code, said = run("sh", "-c", 'exec 3>"$1/f"; privfs umount "$1"', "sh", place)
    assert (code, "in use by sh (" in said) == (1, True), said
    assert run("privfs", "umount", place) == (0, "")
    assert gone(house, status["pid"])
    assert run("mountpoint", "-q", place)[0] != 0


# --- doctor ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "check", "result", "remedy"),
    [
        ("chmod 600 /dev/fuse", "/dev/fuse", "FAIL", "chmod 666 /dev/fuse"),
        ("mount --bind /dev/null /dev/fuse", "/dev/fuse", "FAIL", "mknod"),
        ("hide fusermount3", "fusermount3", "FAIL", "apt install fuse3"),
        ("plain fusermount3", "fusermount3", "FAIL", "chmod u+s"),
        ("hide mount.fuse3", "mount -t fuse.privfs", "SKIP", "apt install fuse3"),
        ("umount /usr/local/bin", "mount -t fuse.privfs", "SKIP", "ln -s"),
        ("hide gcc", "gcc", "SKIP", "apt install gcc"),
        (":", "allow_other", "SKIP", "echo user_allow_other >> /etc/fuse.conf"),
        (":", "mounting", "SKIP", "mount as root"),
    ],
)
def test_doctor_names_what_is_missing_and_what_mends_it(
    house: Room, broken: str, check: str, result: str, remedy: str
) -> None:
    """Each machine is broken in a mount namespace of its own."""
    script = """
        hide() {  # whatever is called so is no program any more
            for place in /bin /sbin /usr/bin /usr/sbin; do
                if [ -e "$place/$1" ]; then mount --bind "$empty" "$place/$1"; fi
            done
        }
        plain() {
            cp "$(command -v "$1")" "$empty"
            chmod 755 "$empty"
            mount --bind "$empty" "$(readlink -f "$(command -v "$1")")"
        }
        empty=$1
        : >"$empty"
        chmod 644 "$empty"
        mknod "$empty.fuse" c 10 229
        chmod 666 "$empty.fuse"
        mount --bind "$empty.fuse" /dev/fuse
        BROKEN
        shift
        exec setpriv --reuid="$1" --regid="$1" --clear-groups "$2" -P -m privfs doctor --json
    """.replace("BROKEN", broken)
    scratch = house.place / f"broken{len(list(house.place.glob('broken*')))}"
    done = house.run(
        "unshare", "--mount", "sh", "-euc", script, "sh", scratch, str(USER), sys.executable, uid=0
    )
    found = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    (row,) = (row for row in found["checks"] if row["check"] == check)
    assert row["result"] == result, row
    assert remedy in row["remedy"]
    failed = any(row["result"] == "FAIL" for row in found["checks"])
    assert (done.returncode, found["ok"]) == ((6, False) if failed else (0, True))
    assert failed == (result == "FAIL")
