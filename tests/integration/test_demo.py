# SPDX-License-Identifier: GPL-2.0-or-later
"""The demonstration: all that it claims holds, and it leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mounts import mount_points

pytest_plugins = ["guest_fixtures"]
pytestmark = pytest.mark.fuse

DEMO = Path(__file__).parents[2] / "scripts" / "demo"
SECONDS = 110


@pytest.fixture(autouse=True)
def place(image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the demonstration works; nothing may be left there, and no process."""
    kernel = tmp_path / "kernel.elf"
    kernel.write_bytes(image)
    monkeypatch.setenv("KVMSIM_KERNEL", os.fspath(kernel))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("TMPDIR", os.fspath(work))
    yield work
    mounts = [mounted for mounted in mount_points() if mounted.startswith(os.fspath(work))]
    for mounted in mounts:
        subprocess.run(["umount", "-l", mounted], capture_output=True, check=False)
    assert mounts == []
    assert os.listdir(work) == []
    traces = []
    for process in psutil.process_iter(["cmdline"]):
        if any(os.fspath(work) in word for word in process.info["cmdline"] or ()):
            traces.append(process)
    assert traces == []


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 10)
def test_everything_that_the_demonstration_claims_holds() -> None:
    done = subprocess.run(
        [DEMO], capture_output=True, text=True, timeout=SECONDS, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stderr == ""
    assert "\033" not in done.stdout, "colours are for terminals"
    lines = done.stdout.splitlines()
    assert sum(line.startswith("  ✓") for line in lines) >= 30
    assert lines[-1].startswith("All ")
    for name in ("min", "median", "max"):
        assert f"{name} " in next(line for line in lines if "with the proof of both vCPUs" in line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["1. Memory", "$ kvmsim boot", "vm0> watch"])
def test_an_interrupted_demonstration_leaves_nothing(moment: str, number: signal.Signals) -> None:
    with subprocess.Popen(
        [DEMO], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(moment):
                process.send_signal(number)
                break
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    assert errors == f"demo: ended by {number.name}\n"


def test_a_demonstration_that_differs_says_so_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVMSIM_KERNEL", os.fspath(DEMO))
    done = subprocess.run(
        [DEMO], capture_output=True, text=True, timeout=SECONDS, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1
    assert "demo: vm0 ended before it said" in done.stderr
    assert "not a 64-bit little-endian ELF file" in done.stderr
