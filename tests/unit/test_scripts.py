# SPDX-License-Identifier: GPL-2.0-or-later
"""What the programs in scripts/ say of themselves, started as they are from anywhere."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def asked(path: str) -> str:
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("no .venv in the checkout: scripts/setup makes it")
    done = subprocess.run(
        [ROOT / path, "--help"], capture_output=True, text=True, timeout=60, check=False, cwd="/",
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("name", ["docs", "kselftests", "measure", "selftests", "vmm.py"])
def test_a_script_needs_no_environment_and_explains_each_option(name: str) -> None:
    said = asked(f"scripts/{name}")
    assert said.startswith(f"usage: scripts/{name} ")
    options = said.partition("\noptions:\n")[2].partition("\n\n")[0].splitlines()
    assert len(options) > 1
    unsaid = [line for line in options if not re.match(r"  -\S+(,? \S+)*  +\w", line)]
    assert unsaid == []


def test_scripts_are_programs() -> None:
    for path in (ROOT / "scripts").iterdir():
        assert path.is_dir() or os.access(path, os.X_OK), path
