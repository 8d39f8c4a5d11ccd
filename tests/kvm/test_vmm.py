# SPDX-License-Identifier: GPL-2.0-or-later
"""The example VMM and the manual's first steps run on both devices, unchanged."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from kvm.world import KINDS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "vmm.py"
MANUAL = (ROOT / "docs" / "api.md").read_text()


def vmm(*options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *options],
        capture_output=True, text=True, timeout=60, check=False, cwd="/", env={"PYTHONPATH": ROOT},
    )  # fmt: skip


def shown(device: str) -> str:
    """What the manual says that the example prints."""
    found = re.search(rf"\$ python scripts/vmm\.py --{device}.*\n((?:(?!\$|```).*\n)+)", MANUAL)
    assert found
    return found[1]


@pytest.mark.kvm
def test_the_example_on_the_kernel(kernel_has_flags_3: None) -> None:
    done = vmm("--real")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == shown("real")


@pytest.mark.fuse
def test_the_example_on_the_simulator(directory: Path) -> None:
    done = vmm("--simulated", directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == shown("simulated")
    assert list(directory.iterdir()) == [directory / ".privfs"] or not list(directory.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [([], "one of the arguments --real --simulated is required"),
     (["--simulated", "/proc"], "KVM_CREATE_GUEST_MEMFD"),
     (["--simulated", "/nonexistent"], "/nonexistent")],
)  # fmt: skip
def test_what_is_wrong_is_one_line(options: list[str], said: str) -> None:
    done = vmm(*options)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_it_is_as_short_as_the_manual_says() -> None:
    lines = [line for line in SCRIPT.read_text().splitlines() if line.strip()]
    assert len(lines) < 120


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_steps(
    kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r"## First steps\n+```python\n(.*?)```", MANUAL, re.DOTALL)
    assert found
    program = found[1]
    if kind == "simulated":
        directory = request.getfixturevalue("directory")
        device, other = 'Kvm("/dev/kvm")', 'Kvm(Simulation("/mnt/private"))'
        assert device in program
        assert other in program
        program = program.replace(device, f"Kvm(Simulation({str(directory)!r}))")
    exec(program, {})
    assert capsys.readouterr().out == "42\n"
