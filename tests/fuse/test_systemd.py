# SPDX-License-Identifier: GPL-2.0-or-later
"""The units of docs/systemd, started by a systemd that is PID 1 of namespaces of its own.

It knows these units and empty targets only, sees no foreign FUSE mount that it could abort when it
ends, and ends by SIGKILL.
"""

from __future__ import annotations

import select
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from integration.actors import until
from rooms import ROOT, USER, Room, room

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.slow]

UNITS: Final = ROOT / "docs" / "systemd"
TARGETS: Final = {
    "system": ("sysinit", "basic", "shutdown", "umount", "local-fs", "local-fs-pre", "multi-user"),
    "user": ("basic", "default", "shutdown"),
}
SECONDS: Final = 30

_BOOT: Final = r"""
set -eu
place=$1 systemd=$2 group=$3
echo $$ >"$group/cgroup.procs"
exec unshare --mount --propagation=private --pid --fork --kill-child --mount-proc \
    --cgroup --ipc --uts sh -euc '
    while read -r _ there type _; do
        case $type in fuse*) umount --lazy "$there" ;; esac
    done </proc/self/mounts
    mount -t tmpfs -o mode=755 run /run
    mkdir -m 755 /run/user
    mkdir -m 700 "/run/user/$3"
    chown "$3:$3" "/run/user/$3"
    mount -t tmpfs -o mode=755 mnt /mnt
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mount --bind "$1/group" /etc/group
    export container=privfs NOTIFY_SOCKET="$1/notify" SYSTEMD_UNIT_PATH="$1/system"
    exec "$2" --system --unit=multi-user.target --show-status=no
' sh "$place" "$systemd" "$4"
"""

_MANAGER_OF_A_USER: Final = """[Service]
Type=notify
User={user}
Environment=XDG_RUNTIME_DIR=/run/user/{user} SYSTEMD_UNIT_PATH={place}/user HOME={place}/home
ExecStart={systemd} --user
Delegate=yes
"""


class Manager:
    """A systemd and a room around it."""

    def __init__(self, house: Room, pid: int) -> None:
        self.house = house
        self._pid = pid

    def run(
        self, *arguments: str | Path, uid: int = 0, status: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command beside it; ``status`` is what must come of it, None whatever."""
        done = self.house.run(
            "nsenter", f"--target={self._pid}", "--mount", "--pid", "--cgroup", "--ipc", "--",
            "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--",
            "env", f"XDG_RUNTIME_DIR=/run/user/{uid}", *arguments, uid=0, timeout=SECONDS,
        )  # fmt: skip
        assert status in (None, done.returncode), done.stdout
        return done

    def ctl(self, *arguments: str, uid: int = 0) -> str:
        """Run systemctl, which must succeed."""
        scope = ["--user"] if uid else []
        return self.run("systemctl", *scope, "--no-pager", *arguments, uid=uid).stdout.strip()

    def show(self, unit: str, *names: str, uid: int = 0) -> list[str]:
        """Return properties of a unit, in the order asked for."""
        return [self.ctl("show", "--value", f"--property={n}", unit, uid=uid) for n in names]

    def mounted(self, where: str) -> str:
        """Return the type of what is mounted there, empty if nothing is."""
        found = self.run("findmnt", "-n", "-o", "FSTYPE", "--mountpoint", where, status=None)
        return found.stdout.strip()


def unified() -> Path | None:
    """Return where the cgroup v2 hierarchy is."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return None


def lay_out(place: Path, systemd: str) -> None:
    """Write what the managers shall know."""
    for scope, names in TARGETS.items():
        (place / scope).mkdir()
        for name in names:
            text = "[Unit]\nDefaultDependencies=no\n"
            (place / scope / f"{name}.target").write_text(text)
    for unit in ("privfs@.service", "mnt-private.mount"):
        shutil.copy(UNITS / unit, place / "system" / unit)
    shutil.copy(UNITS / "user" / "privfs.service", place / "user")
    text = _MANAGER_OF_A_USER.format(user=USER, place=place, systemd=systemd)
    (place / "system" / "manager.service").write_text(text)
    groups = Path("/etc/group").read_text()
    (place / "group").write_text(f"{groups}user{USER}:x:{USER}:\n")


@pytest.fixture(scope="module")
def manager() -> Iterator[Manager]:
    found = [shutil.which("systemd", path=f"/{lib}/systemd") for lib in ("usr/lib", "lib")]
    systemd, group = next((path for path in found if path), None), unified()
    if systemd is None or shutil.which("systemctl") is None:
        pytest.skip("no systemd: apt install systemd")
    for helper in ("fusermount3", "mount.fuse3"):
        if shutil.which(helper, path="/usr/bin:/usr/sbin:/bin:/sbin") is None:
            pytest.skip(f"no {helper}: apt install fuse3")
    if group is None:
        pytest.skip("no cgroup v2 hierarchy")
    with room() as house:
        ours = group / house.place.name
        try:
            ours.mkdir()
        except OSError as error:
            pytest.skip(f"no cgroup of our own: {error}")
        try:
            yield from booted(house, systemd, ours)
        finally:
            remove(ours)


def booted(house: Room, systemd: str, group: Path) -> Iterator[Manager]:
    lay_out(house.place, systemd)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(house.place / "notify"))
        command = house.command(
            "sh", "-c", _BOOT, "sh", house.place, systemd, group, str(USER), uid=0
        )
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as outer:
            try:
                ready(notified, outer)
                scope = group / "init.scope" / "cgroup.procs"
                yield Manager(house, int(house.sh('head -n 1 "$1"', scope, uid=0)))
            finally:
                (group / "cgroup.kill").write_text("1")


def ready(notified: socket.socket, outer: subprocess.Popen[bytes]) -> None:
    """Wait until the manager has reached its target."""
    assert outer.stdout is not None
    while True:
        heard, _, _ = select.select([notified, outer.stdout], [], [], SECONDS)
        if notified in heard:
            if b"READY=1" in notified.recv(4096).splitlines():
                return
        else:
            outer.kill()
            said = outer.stdout.read().decode()
            pytest.skip(f"systemd does not become PID 1 of a namespace here: {said.strip()}")


def remove(group: Path) -> None:
    """Remove a cgroup and those in it once their processes have gone."""

    def removed() -> bool:
        if "populated 1" in (group / "cgroup.events").read_text():
            return False
        for below in sorted(group.glob("**/"), reverse=True):
            below.rmdir()
        return True

    until(removed, "end of the processes of systemd")


@pytest.fixture
def served(manager: Manager) -> Iterator[tuple[str, str]]:
    """The service for a directory, with options in a drop-in, started: its unit and place."""
    where = str(manager.house.directory("served", uid=0))
    name = manager.run("systemd-escape", "--path", where).stdout.strip()
    unit = f"privfs@{name}.service"
    more = manager.house.place / "system" / f"{unit}.d"
    more.mkdir()
    options = "Environment=PRIVFS_OPTIONS=size=64M,personality=guest_memfd"
    (more / "options.conf").write_text(f"[Service]\n{options}\n")
    manager.ctl("daemon-reload")
    manager.ctl("start", unit)
    yield unit, where
    manager.ctl("stop", unit)
    assert manager.mounted(where) == ""
    assert manager.show(unit, "Result", "ActiveState") == ["success", "inactive"]
    shutil.rmtree(more)
    Path(where).rmdir()


def test_a_service_has_started_when_its_mount_answers(
    manager: Manager, served: tuple[str, str]
) -> None:
    unit, where = served
    assert manager.mounted(where) == "fuse.privfs"
    active, says = manager.show(unit, "ActiveState", "StatusText")
    assert (active, says.split(" (")[0]) == ("active", f"serving {where}")
    assert "guest_memfd" in says
    manager.run("truncate", "-s", "2M", f"{where}/f")
    manager.run("fallocate", "-n", "-l", "2M", f"{where}/f", status=None)  # its fsync is refused
    assert manager.run("stat", "-c", "%s %b", f"{where}/f").stdout == "2097152 4096\n"
    size = manager.run("df", "--output=size", "-B1M", where).stdout.split()[-1]
    assert size == "64"


def test_a_service_that_was_killed_is_started_again_in_its_place(
    manager: Manager, served: tuple[str, str]
) -> None:
    unit, where = served
    (first,) = manager.show(unit, "MainPID")
    manager.run("kill", "-KILL", first)
    again = ["1", "active"]
    until(lambda: manager.show(unit, "NRestarts", "ActiveState") == again, "restart")
    assert manager.show(unit, "MainPID") != [first]
    assert manager.mounted(where) == "fuse.privfs"
    manager.run("truncate", "-s", "4K", f"{where}/f")


def test_a_mount_unit_mounts_and_unmounts(manager: Manager) -> None:
    unit = "mnt-private.mount"
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    if total < 4 << 30:
        pytest.skip("the unit asks for 4 GiB")
    manager.ctl("start", unit)
    assert manager.mounted("/mnt/private") == "fuse.privfs"
    assert manager.show(unit, "ActiveState", "SubState") == ["active", "mounted"]
    manager.run("truncate", "-s", "4K", "/mnt/private/f")
    assert manager.run("truncate", "-s", "8K", "/mnt/private/f", status=1).stdout.endswith(
        "Invalid argument\n"
    )  # Options= have arrived: it is a guest_memfd
    manager.ctl("stop", unit)
    assert manager.mounted("/mnt/private") == ""
    assert manager.show(unit, "Result", "ActiveState") == ["success", "inactive"]


def test_a_user_service_serves_the_user(manager: Manager) -> None:
    where = f"/run/user/{USER}/privfs"
    manager.ctl("start", "manager.service")
    manager.ctl("start", "privfs.service", uid=USER)
    assert manager.mounted(where) == "fuse.privfs"
    active, says = manager.show("privfs.service", "ActiveState", "StatusText", uid=USER)
    assert (active, says) == ("active", f"serving {where} (resizable, direct_io)")
    manager.run("truncate", "-s", "1M", f"{where}/f", uid=USER)
    manager.run("stat", where, uid=0, status=1)  # not even root may enter
    manager.ctl("stop", "privfs.service", uid=USER)
    assert manager.mounted(where) == ""
    result = manager.show("privfs.service", "Result", "ActiveState", uid=USER)
    assert result == ["success", "inactive"]
    manager.run("stat", where, status=1)  # RuntimeDirectory= is gone
