# SPDX-License-Identifier: GPL-2.0-or-later
"""The program ``kvmsim``, run to its end."""

from __future__ import annotations

import os
import subprocess
import sys

from mounts import Mounted

MIB = 1 << 20
KVMSIM = [sys.executable, "-m", "kvmsim"]
_SECONDS = 80


def kvmsim(*arguments: str | os.PathLike[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``kvmsim`` with input to its end."""
    return subprocess.run(
        [*KVMSIM, *map(os.fspath, arguments)], input=text, capture_output=True, text=True,
        timeout=_SECONDS, check=False,
    )  # fmt: skip


def play(mounted: Mounted, text: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a script with $RAM, $DIR and more."""
    script = mounted.path.parent / "script.kvs"
    script.write_text(text)
    known = {"RAM": mounted.path / "ram", "DIR": mounted.path} | variables
    given = [word for name, value in known.items() for word in ("--var", f"{name}={value}")]
    return kvmsim("run", script, *given)
