# SPDX-License-Identifier: GPL-2.0-or-later
"""What a mount may hold, who counts it, and what is refused before anything changes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from actors import Cast, until
from mounts import Mounted, Mounter, privfs

from privfs.machine import Machine

pytest_plugins = ["actor_fixtures"]
pytestmark = pytest.mark.fuse

PAGE = 4096
MIB = 1 << 20
KEEP_SIZE, PUNCH, ZERO_RANGE = 1, 3, 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """Call fallocate(2) and return its errno."""
    return ctypes.get_errno() if _libc.fallocate(fd, mode, offset, length) else 0


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def meminfo(mounted: Mounted) -> dict[str, int]:
    """Return ``.privfs/meminfo`` in bytes."""
    text = (mounted.path / ".privfs/meminfo").read_text()
    rows = [re.fullmatch(r"(\w+): +(\d+) kB", line) for line in text.splitlines()]
    return {row[1]: int(row[2]) * 1024 for row in rows if row}


def everywhere(mounted: Mounted) -> int:
    """Return the memory in use, which every view of it agrees about."""
    files = [path for path in mounted.path.iterdir() if path.is_file()]
    held = sum(path.stat().st_blocks * 512 for path in files)
    place = os.statvfs(mounted.path)
    status = mounted.ask("status")["memory"]
    info = meminfo(mounted)
    assert (place.f_blocks - place.f_bfree) * place.f_frsize == held
    assert (status["used"], status["private"], status["reserved"]) == (held, held, 0)
    assert (info["PrivUsed"], info["Private"], info["PrivReserved"]) == (held, held, 0)
    assert info["PrivTotal"] - info["PrivFree"] == held
    assert info["PrivAvailable"] <= info["PrivFree"]
    for path in files:
        counts = mounted.stat(path.name)
        assert counts["held"] == counts["allocated"] == path.stat().st_blocks * 512
    mounted.audit()
    return held


# --- the budget of a mount -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("16777216", 16 * MIB), ("5000", 2 * PAGE), ("64K", 65536), ("3m", 3 * MIB), ("1G", 1 << 30)],
)
def test_the_budget_is_what_size_says(mount: Mounter, text: str, size: int) -> None:
    mounted = mount(f"size={text}")
    place = os.statvfs(mounted.path)
    assert place.f_blocks * place.f_frsize == meminfo(mounted)["PrivTotal"] == size


def test_a_share_of_the_memory_is_a_budget(mount: Mounter) -> None:
    place = os.statvfs(mount("size=10%").path)
    share = os.sysconf("SC_PHYS_PAGES") // 10
    assert share <= place.f_blocks <= share + 1


@pytest.mark.parametrize("text", ["16T", "101%"])
def test_a_budget_beyond_the_machine_is_refused(tmp_path: Path, text: str) -> None:
    said = privfs("mount", f"-osize={text}", tmp_path)
    assert said.returncode == 2
    assert "more than the memory of this machine" in said.stderr
    assert "size=50%" in said.stderr
    assert len(said.stderr.splitlines()) == 1


def test_all_of_the_budget_can_be_used_and_not_one_page_more(mount: Mounter) -> None:
    mounted = mount("size=4M")
    with opened(mounted.path / "a") as a, opened(mounted.path / "b") as b:
        assert fallocate(a, 0, 0, 3 * MIB) == 0
        os.ftruncate(b, 8 * MIB)
        assert fallocate(b, KEEP_SIZE, 0, MIB + PAGE) == errno.ENOSPC
        assert fallocate(b, 0, 8 * MIB, 2 * MIB) == errno.ENOSPC
        assert os.fstat(b).st_size == 8 * MIB
        assert everywhere(mounted) == 3 * MIB
        assert fallocate(b, KEEP_SIZE, 4 * MIB, MIB) == 0
        assert everywhere(mounted) == 4 * MIB
        assert fallocate(b, KEEP_SIZE, 4 * MIB, MIB) == 0  # what is there costs nothing
        assert fallocate(b, ZERO_RANGE, 4 * MIB, MIB) == 0
        assert fallocate(b, KEEP_SIZE, 0, PAGE) == errno.ENOSPC
        assert fallocate(a, PUNCH, MIB, PAGE) == 0
        assert fallocate(b, KEEP_SIZE, 0, PAGE) == 0
        assert everywhere(mounted) == 4 * MIB


def test_memory_given_back_shows_at_once(mount: Mounter) -> None:
    mounted = mount("size=64M")
    with opened(mounted.path / "f") as fd, opened(mounted.path / "g") as other:
        assert everywhere(mounted) == 0
        assert fallocate(fd, 0, 0, 32 * MIB) == 0
        assert fallocate(other, 0, 0, MIB) == 0
        assert everywhere(mounted) == 33 * MIB
        assert fallocate(fd, PUNCH, 0, 8 * MIB) == 0
        assert everywhere(mounted) == 25 * MIB
        assert fallocate(fd, ZERO_RANGE, 0, 16 * MIB) == 0
        assert everywhere(mounted) == 33 * MIB
        os.ftruncate(fd, 4 * MIB)
        assert everywhere(mounted) == 5 * MIB
        assert fallocate(fd, PUNCH, 0, 1 << 44) == 0
        assert everywhere(mounted) == MIB
    said = privfs("status", mounted.path).stdout
    assert "1M used" in said
    assert "63M free" in said


# --- the quota of a file -------------------------------------------------------------------------


def test_no_file_holds_more_than_its_quota(mount: Mounter) -> None:
    mounted = mount("size=64M", "quota=4M")
    with opened(mounted.path / "f") as fd, opened(mounted.path / "g") as other:
        os.ftruncate(fd, 1 << 40)  # the size is no memory
        assert fallocate(fd, 0, 0, 4 * MIB + PAGE) == errno.ENOSPC
        assert everywhere(mounted) == 0
        assert fallocate(fd, 0, MIB, 4 * MIB) == 0
        assert fallocate(fd, KEEP_SIZE, 0, PAGE) == errno.ENOSPC
        assert fallocate(fd, ZERO_RANGE, 0, 2 * MIB) == errno.ENOSPC
        assert fallocate(fd, 0, 1 << 40, PAGE) == errno.ENOSPC
        assert os.fstat(fd).st_size == 1 << 40
        assert fallocate(fd, ZERO_RANGE, MIB, 4 * MIB) == 0
        assert fallocate(fd, 0, 2 * MIB, 3 * MIB) == 0
        assert everywhere(mounted) == 4 * MIB
        assert fallocate(other, 0, 0, 4 * MIB) == 0  # another file has a quota of its own
        assert fallocate(fd, PUNCH, MIB, MIB) == 0
        assert fallocate(fd, KEEP_SIZE, 1 << 30, MIB) == 0
        assert everywhere(mounted) == 8 * MIB
        assert fallocate(fd, KEEP_SIZE, 0, PAGE) == errno.ENOSPC


def test_a_guest_cannot_get_past_a_quota_either(mount: Mounter, actor: Cast) -> None:
    mounted = mount("quota=64K")
    with opened(mounted.path / "f") as fd:
        os.ftruncate(fd, MIB)
        user = actor("light_user", mounted.path / "f", "ack")
        user.expect("ready")
        assert fallocate(fd, KEEP_SIZE, PAGE, 15 * PAGE) == 0
        user.ask("get 16", f"denied {errno.ENOMEM}")
        assert fallocate(fd, PUNCH, PAGE, PAGE) == 0
        user.ask("get 16", "granted 16 17")
    assert everywhere(mounted) == 64 * 1024


# --- the machine ---------------------------------------------------------------------------------


class Small:
    """Mounts on a machine with as much memory as a test says."""

    def __init__(self, root: Path, mount: Mounter) -> None:
        self.root = root
        self._mount = mount
        (root / "machine/proc").mkdir(parents=True)
        self._write("proc/meminfo", "MemTotal: 4194304 kB\nMemAvailable: 4194304 kB\n")
        source = Path(__file__).with_name("small_machine.py")
        self.program = root / "python"
        self.program.write_text(
            f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{source}" "{root}/machine" "$@"\n'
        )
        self.program.chmod(0o755)

    def _write(self, name: str, text: str) -> None:
        place = self.root / "machine" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_suffix(".new")
        new.write_text(text)
        new.rename(place)

    def cgroup(self, limit: int, usage: int) -> None:
        """Put mounts to come into a cgroup with a limit, in MiB."""
        self._write("proc/self/cgroup", "0::/box\n")
        for name, text in {"max": limit * MIB, "current": usage * MIB, "stat": "anon 1"}.items():
            self._write(f"sys/fs/cgroup/box/memory.{name}", f"{text}\n")

    def mount(self, *options: str) -> Mounted:
        with self._in_place():
            return self._mount(*options)

    def privfs(self, *arguments: str | os.PathLike[str]) -> str:
        """Run privfs there and return what it says."""
        with self._in_place():
            return privfs(*arguments).stderr

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
            patch.setattr(sys, "executable", str(self.program))
            yield

    def spares(self, mounted: Mounted, mebibytes: int) -> None:
        """Let the machine have so much more than its head-room of 128 MiB."""
        available = (mebibytes + 128) * 1024
        self._write("proc/meminfo", f"MemTotal: 4194304 kB\nMemAvailable: {available} kB\n")
        wanted = max(mebibytes * MIB, 0)
        until(lambda: mounted.ask("status")["memory"]["available"] == wanted, "a fresh reading")


@pytest.fixture
def small(mount: Mounter, tmp_path: Path) -> Small:
    """Return another machine, of 4 GiB."""
    return Small(tmp_path / "small", mount)


def test_the_machine_is_asked_before_anything_changes(small: Small) -> None:
    mounted = small.mount("size=1G")
    with opened(mounted.path / "f") as fd:
        assert fallocate(fd, 0, 0, MIB) == 0
        small.spares(mounted, 64)
        assert fallocate(fd, 0, 0, 66 * MIB) == errno.ENOSPC
        assert os.fstat(fd).st_size == MIB
        assert everywhere(mounted) == MIB
        assert fallocate(fd, 0, MIB, 64 * MIB) == 0
        assert everywhere(mounted) == 65 * MIB
        small.spares(mounted, -28)
        assert fallocate(fd, 0, 128 * MIB, PAGE) == errno.ENOSPC
        assert fallocate(fd, 0, 0, 65 * MIB) == 0  # needs nothing
        assert fallocate(fd, PUNCH, 0, MIB) == 0
        small.spares(mounted, 1)
        assert fallocate(fd, 0, 0, MIB) == 0
        assert everywhere(mounted) == 65 * MIB


def test_a_guest_is_told_when_the_machine_is_full(small: Small, actor: Cast) -> None:
    mounted = small.mount("size=1G")
    with opened(mounted.path / "f") as fd:
        os.ftruncate(fd, MIB)
    user = actor("light_user", mounted.path / "f", "ack")
    user.expect("ready")
    small.spares(mounted, 0)
    user.ask("get 40", f"denied {errno.ENOMEM}")
    small.spares(mounted, 1)
    user.ask("get 40", "granted 40 41")


def test_the_limit_of_a_cgroup_is_a_machine(small: Small, tmp_path: Path) -> None:
    small.cgroup(1024, 900)
    assert "our cgroup, which is 1073741824 bytes" in small.privfs("mount", "-osize=2G", tmp_path)
    mounted = small.mount("size=1G")
    assert mounted.ask("status")["memory"]["available"] == (124 - 64) * MIB
    with opened(mounted.path / "f") as fd:
        assert fallocate(fd, 0, 0, 61 * MIB) == errno.ENOSPC
        assert fallocate(fd, 0, 0, 60 * MIB) == 0


def test_this_machine_is_read(mount: Mounter) -> None:
    """What is available moves with what is in use, give or take what others do."""
    mounted = mount("size=50%")
    machine = Machine()
    available = mounted.ask("status")["memory"]["available"]
    assert 0 < available < machine.available_bytes() + 256 * MIB


# --- what others may do at the same time ---------------------------------------------------------


def test_reservations_under_way_are_counted_once(mount: Mounter, actor: Cast) -> None:
    """Two that want three quarters of the budget each: one of them gets it."""
    mounted = mount("size=1G")
    callers = [actor("../fuse/caller", mounted.path / name, "handle") for name in "ab"]
    for caller in callers:
        caller.expect("ready")
    for caller in callers:
        caller.send(f"fallocate 0 0 {768 * MIB}")
    answers = {int(caller.expect(r"returned (\d+)").group(1)) for caller in callers}
    assert answers == {0, errno.ENOSPC}
    assert everywhere(mounted) == 768 * MIB
