# SPDX-License-Identifier: GPL-2.0-or-later
"""Who asks the questions of ``user:``: an ordinary user, also where root runs the suite."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from privfs.testing import ordinary
from privfs.testing.conformance import apart


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory that all can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="privfs-conformance.") as made:
        yield Path(made)


@pytest.fixture
def possible() -> None:
    """Skips where root cannot become an ordinary user."""
    with tempfile.TemporaryDirectory(prefix="privfs-conformance.") as trial:
        impossible = ordinary.why_not(Path(trial))
    if impossible:
        pytest.skip(impossible)


def said(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, stdin=subprocess.DEVNULL
    )
    return done.stdout.strip()


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.usefixtures("possible")
def test_root_becomes_somebody_who_may_open_fuse_and_nothing_else(place: Path) -> None:
    before = os.stat("/dev/fuse")
    script = (
        "import os; print(os.getresuid(), os.getresgid(), os.getgroups(), "
        "open('/proc/self/status').read().partition('CapEff:')[2].split()[0]); "
        "os.close(os.open('/dev/fuse', os.O_RDWR))"
    )
    found = said(
        ordinary.command(place, [Path(sys.base_prefix).resolve()], sys.executable, "-c", script)
    )
    uid = ordinary.UID
    assert found == f"({uid}, {uid}, {uid}) ({uid}, {uid}, {uid}) [] 0000000000000000"
    assert os.stat("/dev/fuse") == before


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.usefixtures("possible")
def test_the_mount_of_a_user_is_not_root_s(place: Path) -> None:
    command = apart.as_a_user(["cat", "/proc/self/uid_map", "/proc/self/gid_map"], place)
    mapped = ["0", str(ordinary.UID), "1"]
    assert [line.split() for line in said(command).splitlines()] == [mapped, mapped]


def test_what_is_closed_is_covered_once_and_only_what_is_wanted_is_seen(place: Path) -> None:
    place.chmod(0o755)
    closed, opened = place / "closed", place / "opened"
    for name in ("a", "b/c", "d"):
        (closed / name).mkdir(parents=True)
    opened.mkdir()
    closed.chmod(0o700)
    wanted = [closed / "b", closed / "a", closed / "b/c", Path("/usr")]
    over = ordinary.laid_open(opened, wanted)
    cover = opened / "cover0"
    assert over == [
        "bind", f"{closed}/a", f"{cover}/a",
        "bind", f"{closed}/b", f"{cover}/b",
        "rbind", f"{cover}", f"{closed}",
    ]  # fmt: skip
    assert sorted(path.name for path in cover.iterdir()) == ["a", "b"]
