# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages that are drawn from tables say what the tables say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_drawn_pages_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "scripts/docs"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
