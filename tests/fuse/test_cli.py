# SPDX-License-Identifier: GPL-2.0-or-later
"""The program ``privfs`` as a person or a script uses it, with real mounts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mounts import Mounted, Mounter, mount_points, privfs

pytestmark = pytest.mark.fuse

MIB = 1 << 20
USER = Path(__file__).parents[1] / "integration" / "light_user.py"


def left(directory: Path) -> list[str]:
    """Return the mounts and files that are left below a directory."""
    below = [place for place in mount_points() if place.startswith(f"{directory}/")]
    return below + [name for name in os.listdir(directory) if name.startswith("privfs.")]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for temporary mounts; nothing may be left in it."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", os.fspath(place))
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    yield place
    remains = left(place)
    for name in remains:
        subprocess.run(["umount", "-l", place / name], capture_output=True, check=False)
    assert remains == []
    now = psutil.Process().children(recursive=True)
    assert [child for child in now if child.pid not in children] == []


@contextlib.contextmanager
def using(path: Path, mode: str = "ack") -> Iterator[subprocess.Popen[str]]:
    """A user of a private file, as a process of its own that has mapped its first pages."""
    with subprocess.Popen(
        [sys.executable, USER, path, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()},
    ) as user:  # fmt: skip
        assert user.stdout is not None
        try:
            for line in user.stdout:
                if line == "ready\n":
                    break
            yield user
        finally:
            user.kill()


def gone(pid: int, seconds: float = 15) -> bool:
    """Wait for the end of a process that is not our child; who reaps it, and when, is not ours."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


# --- run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "kill -KILL $$"], 137),
        (["sh", "-c", "kill -TERM $$"], 143),
        (["/nonexistent/command"], 127),
        (["no-such-command-anywhere"], 127),
        (["/etc/passwd"], 126),
        (["/"], 126),
    ],
)
def test_run_returns_the_status_of_its_command(
    temporary: Path, command: list[str], status: int
) -> None:
    assert privfs("run", "--", *command).returncode == status


def test_run_gives_the_command_a_mount(temporary: Path) -> None:
    script = 'cd "$PRIVFS" && fallocate -l 1M f && stat -f -c %T . && df --output=size . | tail -1'
    done = privfs("run", "-o", "size=4M", "--", "sh", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["fuseblk", "4096"] or done.stdout.split()[-1] == "4096"


def test_run_takes_arguments_and_input_as_they_are(temporary: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "privfs", "run", "printf", "%s|", "-o", "--", "a b", "--json"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stdout == "-o|--|a b|--json|"
    done = subprocess.run(
        [sys.executable, "-m", "privfs", "run", "cat"],
        input="typed", capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stdout == "typed"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "bogus", "--", "true"], "known: personality="),
        (["-o", "size=many", "--", "true"], "size=BYTES"),
        (["--bogus", "true"], "privfs run --help"),
        ([], "privfs run --help"),
        (["--at", "/etc/passwd", "true"], "not a directory"),
    ],
)
def test_run_fails_with_125_of_its_own(temporary: Path, arguments: list[str], words: str) -> None:
    done = privfs("run", *arguments)
    assert done.returncode == 125
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("privfs: ")


def test_run_mounts_where_it_is_told(temporary: Path) -> None:
    old, new = temporary / "old", temporary / "new"
    old.mkdir()
    for place in (old, new):
        done = privfs("run", "--at", place, "--", "sh", "-c", 'echo "$PRIVFS"; : > "$PRIVFS/f"')
        assert (done.returncode, done.stdout) == (0, f"{place}\n"), done.stderr
    assert old.is_dir()
    assert not new.exists()
    old.rmdir()


class Running:
    """A ``privfs run`` whose command tells its pid and then waits."""

    SCRIPT = (
        'trap "echo got INT; exit 7" INT; trap "echo got TERM; exit 8" TERM; '
        'trap "echo got HUP; exit 9" HUP; echo "$$ $PRIVFS"; while :; do sleep 0.05; done'
    )

    def __init__(self, script: str = SCRIPT) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "privfs", "run", "-v", "--", "sh", "-c", script],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        pid, place = self.process.stdout.readline().split()
        self.command, self.place = int(pid), Path(place)
        (self.daemon,) = (
            child.pid
            for child in psutil.Process(self.process.pid).children()
            if child.pid != self.command
        )

    def finish(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=30)
        return self.process.returncode, said


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 7, "INT"), (signal.SIGTERM, 8, "TERM"), (signal.SIGHUP, 9, "HUP")],
)
def test_run_passes_signals_on(temporary: Path, number: int, status: int, word: str) -> None:
    running = Running()
    running.process.send_signal(number)
    assert running.finish() == (status, f"got {word}\n")


def test_run_killed_takes_the_mount_with_it(temporary: Path) -> None:
    running = Running()
    running.process.kill()
    assert running.process.wait(10) == -signal.SIGKILL
    assert gone(running.daemon)
    assert left(temporary) == []
    os.kill(running.command, signal.SIGKILL)
    assert gone(running.command)
    running.finish()


def test_run_clears_up_when_its_mount_is_killed(temporary: Path) -> None:
    running = Running()
    os.kill(running.daemon, signal.SIGKILL)
    running.process.terminate()
    assert running.finish() == (8, "got TERM\n")


def test_run_leaves_nothing_when_the_command_leaves_users(temporary: Path) -> None:
    script = (
        'echo "$$ $PRIVFS"; cd "$PRIVFS"; fallocate -l 1M f; exec 9<>f; '
        "sleep 30 >/dev/null 2>&1 & echo $!; exit 5"
    )
    running = Running(script)
    status, said = running.finish()
    try:
        assert status == 5
        assert left(temporary) == []
    finally:
        os.kill(int(said), signal.SIGKILL)
    assert gone(int(said))


# --- mount and umount --------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory to mount on; unmounted at the end, which must find nothing to do."""
    directory = tmp_path / "place"
    directory.mkdir()
    yield directory
    stuck = os.fspath(directory) in mount_points()
    if stuck:
        privfs("umount", "--lazy", directory)
    assert not stuck, "left mounted"


def test_daemon_returns_when_the_mount_answers(place: Path) -> None:
    done = privfs("mount", "--daemon", "-o", "size=4M", place)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    status = json.loads(privfs("status", "--json", place).stdout)[0]
    daemon = psutil.Process(status["pid"])
    assert os.getsid(daemon.pid) == daemon.pid
    assert {os.readlink(f"/proc/{daemon.pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    assert os.readlink(f"/proc/{daemon.pid}/cwd") == "/"
    assert privfs("umount", place).returncode == 0
    assert gone(daemon.pid, 0.1)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["mount", "--daemon", "/nonexistent"], 3),
        (["mount", "/nonexistent"], 3),
        (["mount", "--daemon", "/etc/passwd"], 3),
        (["mount", "-o", "personality=none", "/tmp"], 2),
        (["mount", "--daemon", "--foreground", "/tmp"], 2),
        (["mount"], 2),
        (["source", "/nonexistent", "-o", "rw,dev,suid"], 3),
        (["source", "/nonexistent", "-orw,ro"], 2),
        (["umount", "/tmp"], 5),
        (["umount", "/nonexistent"], 5),
        (["status", "/tmp"], 5),
        (["map", "/etc/passwd"], 5),
        (["stat", "/etc/passwd"], 5),
        (["map", "/nonexistent"], 1),
    ],
)
def test_failures_are_one_line_and_a_code(arguments: list[str], status: int) -> None:
    done = privfs(*arguments)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("privfs: ")


def test_foreground_says_that_it_is_ready_and_ends_at_an_interrupt(place: Path) -> None:
    for quiet in ([], ["-q"]):
        process = subprocess.Popen(
            [sys.executable, "-m", "privfs", "mount", "-f", *quiet, "-o", "size=4M", place],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr is not None
        line = "" if quiet else process.stderr.readline()
        deadline = time.monotonic() + 20
        while privfs("status", place).returncode:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=20)[1]
        assert (process.returncode, rest) == (0, "")
        if not quiet:
            assert line.startswith(f"privfs on {place}: resizable, 4 MiB, ")


def test_umount_tells_who_is_in_the_way(mount: Mounter) -> None:
    mounted = mount()
    with open(mounted.path / "f", "w"):
        busy = mounted.privfs("umount", mounted.path)
        assert busy.returncode == 1
        assert "fuser -vm" in busy.stderr
        assert mounted.privfs("umount", "--lazy", mounted.path).returncode == 0
    assert mounted.process.wait(10) == 0


def test_umount_clears_a_dead_mount(mount: Mounter) -> None:
    mounted = mount()
    mounted.kill()
    said = mounted.privfs("status")
    assert said.returncode == 5
    assert f"{mounted.path}: the mount does not answer" in said.stdout
    said = mounted.privfs("events", mounted.path)
    assert said.returncode == 5
    assert "clear the dead mount with: privfs umount DIR" in said.stderr
    assert mounted.privfs("umount", mounted.path).returncode == 0
    assert not mounted.is_mounted()


@pytest.mark.root
def test_mount_8_calls_us(tmp_path: Path, place: Path) -> None:
    """mount.fuse3 runs ``TYPE#SOURCE`` through sh; fstab's fuse.privfs takes the same way."""
    script = tmp_path / "privfs"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m privfs "$@"\n')
    script.chmod(0o755)
    helper = shutil.which("mount.fuse3", path="/sbin:/usr/sbin")
    if helper is None:
        pytest.skip("no mount.fuse3")
    options = "rw,size=4M,noauto,x-systemd.automount,user,defaults,mode=700"
    done = subprocess.run(
        [helper, f"{script}#memory", place, "-o", options], capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with open("/proc/self/mounts") as table:
        (line,) = (line for line in table if f" {place} " in line)
    assert line.startswith(f"memory {place} fuse.privfs ")
    assert {"nosuid", "nodev", "noexec"} <= set(line.split()[3].split(","))
    assert place.stat().st_mode & 0o777 == 0o700
    pid = json.loads(privfs("status", "--json", place).stdout)[0]["pid"]
    subprocess.run(["umount", place], check=True)
    assert gone(pid)
    failed = subprocess.run(
        [helper, f"{script}#memory", place, "-o", "rw,colour=red"], capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert failed.returncode == 2
    assert "unknown mount option 'colour=red'" in failed.stderr


# --- map, stat, status -------------------------------------------------------------------------


@pytest.fixture
def shown(mount: Mounter) -> Mounted:
    """A mount with a file of 1 MiB, of which the second and fourth quarter hold memory."""
    mounted = mount("size=8M")
    subprocess.run(
        "truncate -s 1M f; fallocate -o 256K -l 256K f; fallocate -o 768K -l 256K f",
        shell=True, cwd=mounted.path, check=True,
    )  # fmt: skip
    return mounted


def test_map_in_the_manner_of_lsmem(shown: Mounted) -> None:
    done = shown.privfs("map", shown.path / "f")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "RANGE                                 SIZE STATE     USERS",
        "0x0000000000000000-0x000000000003ffff 256K hole      -",
        "0x0000000000040000-0x000000000007ffff 256K allocated -",
        "0x0000000000080000-0x00000000000bffff 256K hole      -",
        "0x00000000000c0000-0x00000000000fffff 256K allocated -",
        "",
        "File size:         1M",
        "Allocated:       512K",
        "Mapped by users:   0B",
        "Holes:           512K",
    ]
    assert "262144 hole" in shown.privfs("map", "--bytes", shown.path / "f").stdout


def test_map_and_stat_name_the_users(shown: Mounted) -> None:
    with using(shown.path / "f") as user:
        found = json.loads(shown.privfs("map", "--json", shown.path / "f").stdout)
        mapped = [row for row in found["rows"] if row["state"] == "mapped"]
        assert mapped
        assert mapped[0]["start"] == 0
        (name,) = mapped[0]["users"]
        assert str(user.pid) in name
        assert found["totals"]["mapped"] == sum(row["size"] for row in mapped)
        assert sum(row["size"] for row in found["rows"]) == found["size"] == MIB
        (counts,) = json.loads(shown.privfs("stat", "--json", shown.path / "f").stdout)
        assert counts["users"] == [name]
        assert counts["mapped"] == found["totals"]["mapped"]
        assert counts["held"] == counts["allocated"] == found["totals"]["allocated"]
        text = shown.privfs("status", shown.path).stdout
        assert f"{name} " in text
        assert f" {user.pid} " in text


def test_stat_of_several_files(shown: Mounted) -> None:
    (shown.path / "g").touch()
    done = shown.privfs("stat", shown.path / "f", shown.path / "g")
    assert done.returncode == 0
    first, second = done.stdout.split("\n\n")
    assert "Held:        512K in 1 extents" in first
    assert "Size:        0B" in second
    assert shown.privfs("stat", shown.path / "f", shown.path / "none").returncode == 1


def test_status_of_all_mounts(mount: Mounter) -> None:
    first, second = mount("size=4M"), mount("size=8M")
    found = {m["mountpoint"]: m for m in json.loads(first.privfs("status", "--json").stdout)}
    assert found[str(first.path)]["memory"]["total"] == 4 * MIB
    assert found[str(second.path)]["memory"]["total"] == 8 * MIB
    assert found[str(second.path)]["pid"] == second.process.pid
    assert "p99" in first.privfs("status").stdout


def test_a_closed_pipe_is_no_error(shown: Mounted) -> None:
    done = subprocess.run(
        f"{sys.executable} -m privfs status --json {shown.path} | true",
        shell=True, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == ""


def test_doctor_agrees_that_mounting_works(temporary: Path) -> None:
    done = privfs("doctor", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (0, True), done.stdout
    results = {check["check"]: check["result"] for check in found["checks"]}
    assert results["/dev/fuse"] == "PASS"
    assert results["mounting"] in ("PASS", "SKIP")
    for check in found["checks"]:
        assert check["remedy"] if check["result"] != "PASS" else not check["remedy"]
