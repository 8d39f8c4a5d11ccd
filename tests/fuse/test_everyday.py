# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounts in everyday use: mount(8), fstab(5), owners and modes, who is in the way, systemd."""

from __future__ import annotations

import itertools
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounts import Mounter
from rooms import OTHER, ROOT, USER, Room, room

pytestmark = pytest.mark.fuse

MIB = 1 << 20
KERNEL = ROOT / "scripts" / "guests" / "build" / "kernel.elf"
UNITS = ROOT / "docs" / "systemd"
_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def house() -> Iterator[Room]:
    if shutil.which("mount.fuse3", path="/sbin:/usr/sbin") is None:
        pytest.skip("no mount.fuse3: apt install fuse3")
    with room() as made:
        yield made


@pytest.fixture
def listed(house: Room, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory with a line in the room's fstab; its options are the test's parameter."""
    place = house.directory(f"listed{next(_NUMBERS)}")
    options = getattr(request, "param", "size=64M")
    (house.place / "fstab").write_text(f"memory {place} fuse.privfs noauto,{options} 0 0\n")
    yield place
    house.run("privfs", "umount", "--lazy", place, uid=0)


# --- mount(8) ----------------------------------------------------------------------------------


@pytest.mark.root
def test_mount_8_by_type(house: Room) -> None:
    place = house.directory("by type")
    options = "size=1G,personality=guest_memfd"
    done = house.run("mount", "-t", "fuse.privfs", "privfs", place, "-o", options, uid=0)
    assert (done.returncode, done.stdout) == (0, "")
    status = house.status(place, uid=0)
    assert (status["personality"], status["memory"]["total"]) == ("guest_memfd", 1 << 30)
    done = house.run("umount", place, uid=0)
    assert (done.returncode, done.stdout) == (0, "")
    assert house.run("mountpoint", "-q", place).returncode != 0


@pytest.mark.root
@pytest.mark.parametrize("listed", ["size=64M,mode=1777,allow_other,nofail,_netdev"], indirect=True)
def test_a_line_of_fstab_and_what_tools_say_of_it(house: Room, listed: Path) -> None:
    house.sh('mount "$1"', listed, uid=0)
    table = house.sh('findmnt -n -o SOURCE,FSTYPE,OPTIONS "$1"', listed).split()
    assert table[:2] == ["memory", "fuse.privfs"]
    assert {"rw", "nosuid", "nodev", "noexec", "default_permissions", "allow_other"} <= set(
        table[2].split(",")
    )
    assert "is a mountpoint" in house.sh('mountpoint "$1"', listed)
    house.sh('fallocate -l 1M "$1/f"', listed)
    df = house.sh('df -k --output=source,fstype,size,used,target "$1" | tail -1', listed).split()
    assert df == ["memory", "fuse.privfs", "65536", "1024", str(listed)]
    assert house.sh('stat -c %a "$1"', listed) == "1777\n"
    again = house.run("mount", listed, uid=0)
    assert again.returncode == 3
    assert "already" in again.stdout
    assert house.run("mount", "-a", uid=0).returncode == 0
    assert str(listed) in house.sh("mount -t fuse.privfs")


@pytest.mark.root
def test_mount_with_another_fstab(house: Room) -> None:
    place = house.directory("other-table")
    table = house.place / "table"
    table.write_text(f"mine {place} fuse.privfs size=8M 0 0\n")
    house.sh('mount -T "$1" "$2"; umount "$2"', table, place, uid=0)


@pytest.mark.root
@pytest.mark.parametrize("listed", ["user,size=8M"], indirect=True)
def test_a_user_mounts_what_fstab_lets_them(house: Room, listed: Path) -> None:
    house.sh('mount "$1"; : > "$1/f"; test "$(stat -c %u "$1")" = "$(id -u)"', listed)
    denied = house.run("umount", listed, uid=OTHER)
    assert denied.returncode != 0
    house.sh('umount "$1"', listed)
    done = house.run("mount", listed, uid=OTHER)
    assert done.returncode == 3
    assert f"chown {OTHER}" in done.stdout


@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("remount,size=128M", "unmount it and mount it again"),
        ("remount,ro", "no read-only mount"),
    ],
)
def test_a_mount_keeps_its_options(house: Room, listed: Path, options: str, words: str) -> None:
    house.sh('mount "$1"', listed, uid=0)
    done = house.run("mount", "-o", options, listed, uid=0)
    assert done.returncode == 2
    assert words in done.stdout
    assert house.status(listed, uid=0)["memory"]["total"] == 64 * MIB
    house.sh('mount -o remount,bind,ro "$1"; ! touch "$1/f"', listed, uid=0)  # the kernel's own


@pytest.mark.root
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["-o", "colour=red"], 2, "unknown mount option 'colour=red'"),
        (["-r"], 2, "no read-only mount"),
        (["-o", "size=0"], 2, "write size=BYTES"),
        (["-o", "personality=secret"], 2, "personality=resizable|"),
    ],
)
def test_what_mount_8_cannot_have(
    house: Room, tmp_path: Path, arguments: list[str], status: int, words: str
) -> None:
    done = house.run("mount", "-t", "fuse.privfs", *arguments, "x", tmp_path, uid=0)
    assert done.returncode in (1, status)  # -r: mount(8) says 1 whatever its helper says
    assert words in done.stdout


# --- owners and modes --------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("listed", ["allow_other,size=64M,mode=1777"], indirect=True)
def test_owners_and_modes_hold_for_everybody(house: Room, listed: Path) -> None:
    house.sh('mount "$1"', listed, uid=0)
    house.sh('umask 027; truncate -s 1M "$1/mine"; mkdir "$1/dir"; : > "$1/dir/f"', listed)
    assert house.sh('stat -c "%u %g %a" "$1/mine"', listed) == f"{USER} {USER} 640\n"
    for command in (
        'truncate -s 2M "$1/mine"', 'fallocate -l 2M "$1/mine"', 'exec <"$1/mine"',
        'rm "$1/mine"', 'mv "$1/mine" "$1/theirs"', 'chmod 666 "$1/mine"', 'ls "$1/dir"',
    ):  # fmt: skip
        done = house.run("sh", "-c", command, "sh", listed, uid=OTHER)
        assert done.returncode != 0, command
        assert "denied" in done.stdout or "not permitted" in done.stdout, command
    house.sh('chmod 666 "$1/mine"', listed)
    house.sh('fallocate -l 2M "$1/mine"', listed, uid=OTHER)
    denied = house.run("privfs", "map", listed / "mine", uid=OTHER)  # answers for all files
    assert (denied.returncode, "Permission denied" in denied.stdout) == (1, True)
    house.sh('chown "$2" "$1/mine"', listed, str(OTHER), uid=0)
    house.sh('rm "$1/mine"', listed, uid=OTHER)


@pytest.mark.root
@pytest.mark.skipif(not KERNEL.exists(), reason="no guest kernel: scripts/setup")
@pytest.mark.parametrize("listed", ["allow_other,size=128M,mode=1777"], indirect=True)
def test_a_user_boots_a_guest_in_a_mount_of_root(house: Room, listed: Path) -> None:
    """The descriptor of the file is what counts, so anybody may speak to the owner."""
    house.sh('mount "$1"', listed, uid=0)
    house.sh('umask 077; fallocate -l 32M "$1/ram"', listed)
    boot = [sys.executable, "-P", "-m", "kvmsim", "boot", "--timeout=60", "--memory"]
    done = house.run(*boot, listed / "ram", input="test\n", timeout=90)
    assert done.returncode == 0, done.stdout
    assert "ok test " in done.stdout
    denied = house.run(*boot, listed / "ram", uid=OTHER)
    assert denied.returncode == 120
    assert "Permission denied" in denied.stdout


@pytest.mark.root
def test_only_root_enters_a_mount_of_root(house: Room, listed: Path) -> None:
    house.sh('mount "$1"; chmod 777 "$1"', listed, uid=0)
    done = house.run("ls", listed)
    assert (done.returncode, "Permission denied" in done.stdout) == (2, True)


# --- who is in the way -------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("tool", ["lsof", "fuser"])
def test_tools_find_who_is_in_the_way(house: Room, listed: Path, tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool}: apt install lsof psmisc")
    ask = {"lsof": 'lsof -w -t "$1/f"', "fuser": 'fuser "$1/f" 2>/dev/null'}[tool]
    script = f"""
        mount "$1"; exec 3>"$1/f"
        echo $$; {ask} | cat; echo
        umount "$1" || echo stayed
        exec 3>&-
        {ask} | cat
        umount "$1"
    """
    found = house.sh(script, listed, uid=0).split()
    assert found[1] == found[0]
    assert "busy." in found
    assert found[-1] == "stayed"
    assert house.run("mountpoint", "-q", listed).returncode != 0


@pytest.mark.root
def test_a_mount_in_the_mount_is_in_the_way(house: Room, listed: Path) -> None:
    house.sh('mount "$1"; mkdir "$1/in"; mount -t tmpfs none "$1/in"', listed, uid=0)
    done = house.run("privfs", "umount", listed, uid=0)
    assert done.returncode == 1
    assert f"in use by a mount on {listed}/in" in done.stdout
    house.sh('umount "$1/in"; privfs umount "$1"', listed, uid=0)


# --- service managers --------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_a_service_manager_is_told(tmp_path: Path, abstract: bool) -> None:
    name = f"@privfs-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    place = tmp_path / "mount"
    place.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0", 1) if abstract else name)
        manager.settimeout(30)
        with subprocess.Popen(
            [sys.executable, "-m", "privfs", "mount", "-q", "-o", "size=8M", place],
            stdin=subprocess.DEVNULL, env=os.environ | {"NOTIFY_SOCKET": name},
        ) as process:  # fmt: skip
            try:
                said = manager.recv(4096).decode().splitlines()
                assert said[:2] == ["READY=1", f"MAINPID={process.pid}"]
                assert said[2].startswith(f"STATUS=serving {place} (resizable, ")
                assert os.path.ismount(place)
                process.send_signal(signal.SIGTERM)
                assert manager.recv(4096).startswith(b"STOPPING=1\n")
                assert process.wait(30) == 0
            finally:
                process.kill()
    assert not os.path.ismount(place)


def test_only_the_mount_itself_speaks_to_a_service_manager(tmp_path: Path) -> None:
    """The command of ``privfs run`` may have something to say; its mount has not."""
    path = str(tmp_path / "notify")
    tell = 'printf "%s" "$NOTIFY_SOCKET"'
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        done = subprocess.run(
            [sys.executable, "-m", "privfs", "run", "-o", "size=8M", "--", "sh", "-c", tell],
            stdout=subprocess.PIPE, timeout=60, check=True,
            env=os.environ | {"NOTIFY_SOCKET": path},
        )  # fmt: skip
        assert done.stdout.decode() == path
        assert select.select([manager], [], [], 0)[0] == []


@pytest.mark.root
@pytest.mark.parametrize("unit", ["privfs@.service", "mnt-private.mount", "user/privfs.service"])
def test_the_units_are_sound(house: Room, unit: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: apt install systemd")
    place = house.place / "units"
    place.mkdir(exist_ok=True)
    name = Path(unit).name.replace("@.", "@mnt-private.")
    shutil.copy(UNITS / unit, place / name)
    scope = ["--user"] if "user/" in unit else []
    command = ["env", f"XDG_RUNTIME_DIR={place}", "systemd-analyze", *scope, "verify"]
    done = house.run(*command, "--man=no", place / name, uid=0)
    assert (done.returncode, done.stdout) == (0, "")
    text = (place / name).read_text()
    broken = text.replace("Type=notify", "Type=notified").replace("Where=/mnt/", "Where=/srv/")
    (place / name).write_text(broken)
    assert house.run(*command, "--man=no", place / name, uid=0).stdout != ""


def test_what_a_unit_starts_is_a_command_line(mount: Mounter, tmp_path: Path) -> None:
    """The ExecStart and ExecStopPost of the service, with systemd's specifiers filled in."""
    place = tmp_path / "served"
    place.mkdir()
    lines = dict(
        line.split("=", 1)
        for line in (UNITS / "privfs@.service").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    options = lines["Environment"].removeprefix("PRIVFS_OPTIONS=").replace("%%", "%")
    words = lines["ExecStart"].replace("${PRIVFS_OPTIONS}", options).replace("%f", str(place))
    program, *arguments = words.split()
    assert program == "/usr/local/bin/privfs"
    with subprocess.Popen(
        [sys.executable, "-m", "privfs", *arguments], stdin=subprocess.DEVNULL
    ) as process:
        try:
            while not (place / ".privfs" / "control").exists():
                assert process.poll() is None
                select.select([], [], [], 0.02)
            process.kill()
            process.wait(10)
            after = lines["ExecStopPost"].removeprefix("-").replace("%f", str(place)).split()
            done = subprocess.run(
                [sys.executable, "-m", "privfs", *after[1:]], check=False, timeout=60
            )
            assert done.returncode == 0
        finally:
            process.kill()
    assert not os.path.ismount(place)
    assert os.listdir(place) == []
