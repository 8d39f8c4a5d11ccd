# SPDX-License-Identifier: GPL-2.0-or-later
"""A sealed file under a guest: what allocates by itself no more becomes an exit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mounts import Mounter, privfs

pytestmark = pytest.mark.fuse

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


def boot(file: Path, commands: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "kvmsim", "boot", "--memory", str(file), "--timeout", "60"]
    return subprocess.run(
        arguments, input=commands, capture_output=True, text=True, timeout=90, check=False
    )


@pytest.fixture
def sealed(mount: Mounter) -> Path:
    """A file of 32 MiB, its first 16 MiB allocated, then sealed against all other allocation."""
    file = mount().path / "ram"
    subprocess.run(["truncate", "-s", "32M", file], check=True)
    subprocess.run(["fallocate", "-l", "16M", file], check=True)
    assert privfs("seal", "--auto-allocate", str(file)).returncode == 0
    return file


def test_a_guest_runs_in_what_is_allocated(sealed: Path) -> None:
    done = boot(sealed, "test 0x400000 16\nhalt\n")
    assert done.returncode == 0, done.stderr
    assert "errors=0" in done.stdout


def test_an_access_to_a_hole_is_an_exit_and_allocates_nothing(sealed: Path) -> None:
    before = sealed.stat().st_blocks
    done = boot(sealed, "poke 0x1800000 1\nhalt\n")
    assert done.returncode == 123, (done.stdout, done.stderr)
    assert "none may be made" in done.stderr
    assert sealed.stat().st_blocks == before


def test_fallocate_still_allocates_and_a_punch_brings_the_rule_back(sealed: Path) -> None:
    subprocess.run(["fallocate", "-n", "-o", "20M", "-l", "4M", sealed], check=True)
    assert boot(sealed, "poke 0x1800000 1\nhalt\n").returncode == 0
    subprocess.run(["fallocate", "-p", "-o", "20M", "-l", "4M", sealed], check=True)
    assert boot(sealed, "poke 0x1800000 1\nhalt\n").returncode == 123


def test_what_was_promised_is_shown(sealed: Path) -> None:
    assert boot(sealed, "halt\n").returncode == 0
    shown = privfs("stat", str(sealed)).stdout
    assert "UNMOVABLE" in shown
    assert "AUTO_ALLOCATE" in shown
