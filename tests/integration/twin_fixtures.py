# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs written in C (tests/twin), built here: users of the channel, and a VMM."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from actors import Actor, Cast
from twins import User

TWIN = Path(__file__).parents[1] / "twin"


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the programs, built here."""
    for tool in ("gcc", "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing: apt install gcc make")
    build = tmp_path_factory.mktemp("twin")
    subprocess.run(["make", "-s", "-C", TWIN, f"BUILD={build}", "CC=gcc"], check=True, timeout=100)
    return build


@pytest.fixture(scope="session")
def twin(twins: Path) -> Path:
    """Return the user."""
    return twins / "user"


@pytest.fixture(scope="session")
def vmm(twins: Path) -> Path:
    """Return the VMM."""
    return twins / "vmm"


@pytest.fixture
def user(actor: Cast, twin: Path) -> User:
    """Return a function that starts a user and waits until it is registered."""

    def start(path: Path, mode: str = "good", label: str = "", slot: int = 1) -> Actor:
        made = actor(twin, path, mode, label or mode, str(slot))
        made.expect(r"^ready \d+ \d+ \d$")
        return made

    return start
